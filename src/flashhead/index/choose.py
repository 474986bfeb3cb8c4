"""Which bits and planes a head gets, and what they are expected to read.

The dense logits of a few calibration states say how many rows lie within reach of the best one and
how much probability lies below each; the tables of the quantiser say what standard error so many
bits leave. Together they predict the rows that each stage of a search takes on, and so its bytes,
for every number of bits and planes. An index serves two uses, complete logits and the certified
token alone, which want more bits and fewer: the one with the smallest product of the two costs is
built. A gathered byte counts more than a scanned one.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from flashhead.index.bound import SHARES, z_score
from flashhead.index.codes import MOST_PLANES, UNIT
from flashhead.options import CodesOptions

ERROR = {1: (0.571, 0.040, 0.0056), 2: (0.152, 0.0122, 0.0026), 4: (0.0128, 0.0012, 0.0004)}
"""Squared error of a unit Gaussian by base bits: base, one plane, two planes (docs/log.md)."""
BITS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
"""What `bits=None` chooses from."""
CHOICE_STATES = 128
GATHER_COST = 3
"""What a gathered byte counts against a scanned one. Measured time: 1.6 (docs/log.md); the rest is
for text that is harder than what the model samples itself."""
INT8_SHARE = 0.6
"""The KL budget, as a share of what an int8 head with one scale a row is expected to lose. On text
that a model samples itself, an int8 head loses 1.2-1.7 times what it loses on wikitext."""
UNCALIBRATED_BITS, UNCALIBRATED_BUDGET = 2.0, 7e-4
"""Without calibration states."""


@dataclasses.dataclass(frozen=True)
class Expectation:
    """What was chosen and why.

    Args:
        options: with `bits`, `planes` and `kl_budget` filled in.
        table: a row for each choice: bits, planes, survivors, exact rows, bytes as a share of the
            head's, for complete logits (`bytes_fraction`) and for the certified token alone
            (`certified_bytes_fraction`), and `cost`, which is minimised; empty without calibration
            states.
        int8_kl: nats that an int8 head is expected to lose, or None.
    """

    options: CodesOptions
    table: list[dict[str, float]]
    int8_kl: float | None

    @property
    def chosen(self) -> dict[str, float] | None:
        """The row of what is built."""
        same = [
            row
            for row in self.table
            if (row["bits"], row["planes"]) == (self.options.bits, self.options.planes)
        ]
        return same[0] if same else None


def allocate(variances: Tensor, bits: float) -> list[int]:
    """Base bits (1, 2 or 4) of each unit of 32 coordinates: reverse water-filling from 1 bit.

    Args:
        variances: `float64[D]`, of the whitened coordinates.
        bits: mean over all units.
    """
    units = variances.view(-1, UNIT).sum(1).tolist()
    base_bits = [1] * len(units)
    spare = round((bits - 1) * len(units))
    while spare > 0:
        offers = [
            (unit * (ERROR[b][0] - ERROR[2 * b][0]) / b, i)
            for i, (unit, b) in enumerate(zip(units, base_bits, strict=True))
            if b < 4 and b <= spare
        ]
        if not offers:
            break
        best = max(offers)[1]
        spare -= base_bits[best]
        base_bits[best] *= 2
    return base_bits


def choose(
    variances: Tensor, weight: Tensor, options: CodesOptions, hidden: Tensor | None
) -> Expectation:
    """Fill in what the options leave open.

    Args:
        variances: `float64[D]`, of the whitened coordinates.
        weight: floating `[V, d]`.
        options: what is not None stays.
        hidden: floating `[n, d]`, calibration states, or None.
    """
    if hidden is None or hidden.shape[0] == 0:
        filled = dataclasses.replace(
            options,
            bits=options.bits or UNCALIBRATED_BITS,
            planes=options.planes or 1,
            kl_budget=options.kl_budget or UNCALIBRATED_BUDGET,
        )
        return Expectation(filled, [], None)
    some = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(options.seed))
    states = hidden[some[:CHOICE_STATES]]
    logits = torch.nn.functional.linear(states.to(weight.dtype), weight).float()
    int8_kl = _int8_kl(states.float(), weight, logits)
    budget = options.kl_budget or min(1.0, max(1e-9, INT8_SHARE * int8_kl))
    options = dataclasses.replace(options, kl_budget=budget)
    logits = logits.sort(1).values
    below = torch.softmax(logits, 1).cumsum(1)  # probability of this row and all lower ones
    table = [
        _expect(variances, (logits, below), weight, options, bits, planes)
        for bits in ([options.bits] if options.bits else BITS)
        for planes in ([options.planes] if options.planes else range(1, MOST_PLANES + 1))
    ]
    best = min(table, key=lambda row: row["cost"])
    filled = dataclasses.replace(options, bits=best["bits"], planes=int(best["planes"]))
    return Expectation(filled, table, int8_kl)


def _expect(
    variances: Tensor,
    sorted_logits: tuple[Tensor, Tensor],
    weight: Tensor,
    options: CodesOptions,
    bits: float,
    planes: int,
) -> dict[str, Any]:
    """One row of the table."""
    logits, below = sorted_logits
    (rows, d), units = weight.shape, variances.view(-1, UNIT).sum(1)
    base_bits = allocate(variances, bits)
    widths = sorted(set(base_bits))
    scanned = rows * (UNIT // 8 * sum(base_bits) + 2 * len(widths) + 4) + 2 * len(variances) * d
    plane_bytes = 4 + sum(-(-base_bits.count(b) * UNIT // 64) * 16 for b in widths)
    z, budget = z_score(options.failure_probability or 1e-6, planes + 1), options.kl_budget
    assert budget is not None
    counts, certified = [], []
    for stage in range(planes + 1):
        error = torch.tensor([ERROR[b][stage] for b in base_bits], dtype=torch.float64)
        variance = float((units * error).sum())
        # half a sigma for the noise of the estimates themselves
        least = logits[:, -1:] - (z + 0.5) * variance**0.5
        mass = budget * SHARES[planes][stage] / max(math.expm1(variance / 2), 1e-30)
        by_rank = rows - torch.searchsorted(logits, least)
        by_mass = rows - torch.searchsorted(below, torch.full_like(least, mass), right=True)
        counts.append(float(torch.maximum(by_rank, by_mass).double().mean()))
        certified.append(float(by_rank.double().mean()))
    sizes = [plane_bytes] * planes + [d * weight.element_size()]
    gathered, alone = (
        sum(count * size for count, size in zip(taken, sizes, strict=True))
        for taken in (counts, certified)
    )
    head = rows * d * weight.element_size()
    return {
        "bits": float(bits),
        "planes": planes,
        "survivors": counts[0],
        "exact_rows": counts[-1],
        "bytes_fraction": (scanned + gathered) / head,
        "certified_bytes_fraction": (scanned + alone) / head,
        "cost": (scanned + GATHER_COST * gathered) * (scanned + GATHER_COST * alone) / head**2,
    }


def _int8_kl(states: Tensor, weight: Tensor, logits: Tensor) -> float:
    """Nats an int8 head (one scale a row, rounding to nearest) is expected to lose: half the
    variance of its logit errors under the distribution, sum p (1 - p) sigma^2 / 2.
    """
    step = torch.cat([part.abs().amax(1) for part in weight.split(2**14)]).float() / 127
    mass = torch.softmax(logits, 1)
    variance = states.square().sum(1, keepdim=True) * step.square() / 12
    return float((mass * (1 - mass) * variance).sum(1).double().mean() / 2)
