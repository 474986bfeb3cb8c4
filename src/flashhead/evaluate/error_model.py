"""Whether the standard error that the index states is the error that its estimates have.

The certificate of a token rests on it: with sigma_v too small, rows that can win are left out.
Checked on the standardised errors of all rows,

    x_nv = (estimate_nv - logit_nv) / sigma_nv        position n, row v

A standard normal x has mean 0, std 1, and lies beyond 3 and 4 with probability 2.7e-3 and 6.3e-5.

The row w that wins is the one the certificate is about, and it is not any row: it points where the
query points. A code that cuts off a part of every row, such as one with dimensions that have no
bits, cuts off what points there too: with such dimensions x_w was measured at 1-2 below zero, rms
1.4-2.3, while all rows together looked Gaussian. Every dimension of this index has a bit and a
code's error is orthogonal to its row (`index.codes`), so x_w has mean 0 and std 1 as well, and that
is checked apart. A search leaves w out at a stage only if

    estimate_w + z sigma_w < E <= logit_w        E: an exact logit, at most the winner's

so w is lost only if -x_w > z: -x_w is the z that it needs. A share Q(z) of positions may be lost at
each stage (`index.bound`); more than chance explains is a finding.

Standard errors count positions and rows, not their product (`crossed`). Logits of float32 are
rounded: sigma is taken as at least that rounding, so that rows which the codes hold exactly do not
divide by zero.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from flashhead.errors import FlashHeadError
from flashhead.evaluate.crossed import CrossedMean, Figure, grouped_mean
from flashhead.evaluate.estimates import Estimates, estimate_chunks, index_z, stage_names
from flashhead.index.codes import CodesIndex

STD_RANGE = (0.95, 1.1)
"""Where the standard deviation of x must lie, and the rms of x_w at most."""
WINNER_MEAN = STD_RANGE[0] - 1
"""Least mean of x_w: off by as many sigma as the std may be."""
DEVIATIONS = (3, 4)
SURE = 3.0
"""Standard errors beyond a limit that count as a finding: with the 6 figures of a model just at its
limits, less than one in a hundred by chance. Lost winners: as improbable."""


def gaussian_tail(deviation: float, std: float = 1.0) -> float:
    """Probability that a normal variable of mean 0 lies further than `deviation` from 0."""
    return math.erfc(deviation / std / math.sqrt(2))


def poisson_tail(count: int, expected: float) -> float:
    """Probability of at least `count` rare events where so many are expected."""
    if count == 0:
        return 1.0
    shape, rate = (torch.tensor(value, dtype=torch.float64) for value in (count, expected))
    return float(torch.special.gammainc(shape, rate))


@dataclasses.dataclass(frozen=True)
class StageErrors:
    """Standardised errors of one stage.

    Args:
        mean: of x.
        std: of x.
        beyond: share of |x| above 3 and above 4, in the order of `DEVIATIONS`.
        winner_mean: mean of x at the row with the largest float32 logit.
        winner_rms: root mean square of x there.
        needed_z: 99th percentile and maximum, over positions, of the z that keeps the winner.
        lost: positions that need more than the z of the index.
        expected_lost: as many a Gaussian loses.
    """

    mean: Figure
    std: Figure
    beyond: tuple[Figure, ...]
    winner_mean: Figure
    winner_rms: Figure
    needed_z: tuple[float, float]
    lost: int
    expected_lost: float

    @property
    def too_small(self) -> list[str]:
        """What shows, beyond chance, that sigma is too small; empty: nothing.

        The limit of std and rms is the upper end of `STD_RANGE`; a tail may be as heavy as that of
        a normal variable with this std, and no heavier. Winners may be estimated too high: that
        loses none.
        """
        top = STD_RANGE[1]
        checks = [("std", self.std, top), ("rms of winners", self.winner_rms, top)]
        for deviation, share in zip(DEVIATIONS, self.beyond, strict=True):
            name = f"share beyond {deviation} sigma"
            checks.append((name, share, gaussian_tail(deviation, top)))
        found = [
            f"{name} is {figure.value:.3g}, wanted at most {limit:.3g}"
            for name, figure, limit in checks
            if figure.value - SURE * figure.stderr > limit
        ]
        mean = self.winner_mean
        if mean.value + SURE * mean.stderr < WINNER_MEAN:
            found.append(f"mean of winners is {mean.value:.3g}, wanted at least {WINNER_MEAN:.2g}")
        if poisson_tail(self.lost, self.expected_lost) < gaussian_tail(SURE) / 2:
            found.append(
                f"{self.lost} winners lost, expected {self.expected_lost:.2g}; one needs "
                f"z = {self.needed_z[1]:.2f}"
            )
        return found

    @property
    def too_large(self) -> bool:
        """Whether sigma is, beyond chance, larger than it need be: that costs bytes only."""
        return self.std.value + SURE * self.std.stderr < STD_RANGE[0]


@dataclasses.dataclass(frozen=True)
class ErrorModel:
    """The check of all stages.

    Args:
        positions: hidden states looked at.
        rows: rows V of the head, all looked at.
        z: of the index.
        stages: by name: errors of the scan ("base") and with each plane ("plane 1", ...).
    """

    positions: int
    rows: int
    z: float
    stages: dict[str, StageErrors]

    @property
    def too_small(self) -> list[str]:
        """What shows that a sigma is too small, by stage; empty: the certificate's z holds."""
        return [
            f"{name}: {finding}"
            for name, stage in self.stages.items()
            for finding in stage.too_small
        ]

    def document(self) -> dict[str, Any]:
        """JSON-able, with the Gaussian's figures beside the measured ones."""
        gaussian = {str(k): gaussian_tail(k) for k in DEVIATIONS}
        stages: dict[str, Any] = {}
        for name, stage in self.stages.items():
            figures = dataclasses.asdict(stage)
            figures["beyond"] = dict(zip(gaussian, figures["beyond"], strict=True))
            figures["needed_z"] = {"p99": stage.needed_z[0], "max": stage.needed_z[1]}
            stages[name] = figures | {
                "too_small": stage.too_small,
                "too_large": stage.too_large,
            }
        return {
            "positions": self.positions,
            "rows": self.rows,
            "z": self.z,
            "std_range": list(STD_RANGE),
            "least_winner_mean": WINNER_MEAN,
            "gaussian_beyond": gaussian,
            "stages": stages,
        }


def error_model(
    index: CodesIndex,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    *,
    impl: str = "auto",
) -> ErrorModel:
    """Measure the standardised errors of all rows on some hidden states.

    Args:
        index: codes of `weight`.
        weight: floating `[V, d]`.
        bias: floating `[V]` or None.
        hidden: floating `[n, d]`, n >= 2, not those the index was shaped by.
        impl: "auto", "cpu" or "reference".

    Raises:
        FlashHeadError: fewer than two hidden states, or shapes that do not fit.
    """
    totals = ErrorTotals(index)
    for chunk in estimate_chunks(index, weight, bias, hidden, impl=impl):
        totals.add(chunk)
    return totals.result()


class ErrorTotals:
    """Sums over chunks of estimates.

    Args:
        index: whose estimates they are.
    """

    def __init__(self, index: CodesIndex) -> None:
        self._rows, self._z = index.vocab_size, index_z(index)
        names = stage_names(index.planes + 1)
        self._stages = {name: _StageTotals(index.vocab_size) for name in names}

    def add(self, chunk: Estimates) -> None:
        """Add the errors of one chunk."""
        least = chunk.rounding.clamp_min(torch.finfo(torch.float32).tiny)
        winner = chunk.truth.argmax(1)
        for totals, estimate, sigma in zip(
            self._stages.values(), chunk.estimate, chunk.sigma, strict=True
        ):
            totals.add((estimate - chunk.truth).double() / torch.maximum(sigma, least), winner)

    def result(self) -> ErrorModel:
        """The figures.

        Raises:
            FlashHeadError: fewer than two positions were added.
        """
        positions = self._stages["base"].positions
        if positions < 2:
            raise FlashHeadError(
                f"error model of {positions} hidden states: wanted 2 or more, use a longer text"
            )
        stages = {name: totals.result(self._z) for name, totals in self._stages.items()}
        return ErrorModel(positions, self._rows, self._z, stages)


class _StageTotals:
    def __init__(self, rows: int) -> None:
        self._first, self._second = CrossedMean(rows), CrossedMean(rows)
        self._beyond = [CrossedMean(rows) for _ in DEVIATIONS]
        self._winner: list[Tensor] = []
        self._error: list[Tensor] = []

    @property
    def positions(self) -> int:
        return sum(len(rows) for rows in self._winner)

    def add(self, x: Tensor, winner: Tensor) -> None:
        """Add errors `float64[n, V]`, the row that wins being `int64[n]`."""
        self._winner.append(winner)
        self._error.append(x.gather(1, winner[:, None])[:, 0])
        self._first.add(x)
        for deviation, mean in zip(DEVIATIONS, self._beyond, strict=True):
            mean.add((x.abs() > deviation).double())
        self._second.add(x.square())

    def result(self, z: float) -> StageErrors:
        mean, second = self._first.figure(), self._second.figure()
        std = math.sqrt(max(0.0, second.value - mean.value**2))
        winner, x = torch.cat(self._winner), torch.cat(self._error)
        square = grouped_mean(x.square(), winner)
        rms, needed = math.sqrt(square.value), -x
        return StageErrors(
            mean,
            Figure(std, _root_stderr(second.stderr, std)),
            tuple(share.figure() for share in self._beyond),
            grouped_mean(x, winner),
            Figure(rms, _root_stderr(square.stderr, rms)),
            (float(needed.quantile(0.99)), float(needed.max())),
            int((needed > z).sum()),
            len(x) * gaussian_tail(z) / 2,
        )


def _root_stderr(stderr: float, root: float) -> float:
    """Standard error of a root from that of its square, to first order."""
    return stderr / (2 * root) if root > 0 else 0.0
