"""Whether the standard error that the index states is the error that its estimates have.

The certificate of a token rests on it: with sigma_v too small, rows that can win are left out.
Checked on the standardised errors of all rows,

    x_nv = (estimate_nv - logit_nv) / sigma_nv        position n, row v

A standard normal x has mean 0, std 1, and lies beyond 3 and 4 with probability 2.7e-3 and 6.3e-5.

The row w that wins is not any row: it points where the query points, and what a quantiser cuts off
a row points there too. Its x is therefore negative on average, on real models by 0.3 to 2, and lies
outside z more often than any row's: it is shown apart. What the candidate rule allows for is a
distance between two rows, which is twice as wide,

    needed z = max_u (estimate_u - estimate_w) / (sigma_u + sigma_w)

w is lost where that is above the z of the index.

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
from flashhead.evaluate.crossed import CrossedMean, Figure
from flashhead.evaluate.estimates import STAGES, Estimates, estimate_chunks
from flashhead.index.codes import CodesIndex

STD_RANGE = (0.95, 1.1)
"""Where the standard deviation of x must lie."""
DEVIATIONS = (3, 4)
SURE = 3.0
"""Standard errors beyond a limit that count as a finding: with the 6 figures of a model just at its
limits, less than one in a hundred by chance."""


def gaussian_tail(deviation: float, std: float = 1.0) -> float:
    """Probability that a normal variable of mean 0 lies further than `deviation` from 0."""
    return math.erfc(deviation / std / math.sqrt(2))


@dataclasses.dataclass(frozen=True)
class StageErrors:
    """Standardised errors of one stage.

    Args:
        mean: of x.
        std: of x.
        beyond: share of |x| above 3 and above 4, in the order of `DEVIATIONS`.
        winner_mean: mean of x at the row with the largest float32 logit.
        winner_rms: root mean square of x there.
        winner_outside: positions whose winner has |x| above the z of the index.
        needed_z: 99th percentile and maximum, over positions, of the z that keeps the winner.
        lost: positions that need more than the z of the index.
    """

    mean: Figure
    std: Figure
    beyond: tuple[Figure, ...]
    winner_mean: Figure
    winner_rms: Figure
    winner_outside: int
    needed_z: tuple[float, float]
    lost: int

    @property
    def too_small(self) -> list[str]:
        """What shows, beyond chance, that sigma is too small; empty: nothing.

        The limit of the std is the upper end of `STD_RANGE`; a tail may be as heavy as that of a
        normal variable with this std, and no heavier. A lost winner is a finding by itself.
        """
        top = STD_RANGE[1]
        checks = [("std", self.std, top)]
        for deviation, share in zip(DEVIATIONS, self.beyond, strict=True):
            name = f"share beyond {deviation} sigma"
            checks.append((name, share, gaussian_tail(deviation, top)))
        found = [
            f"{name} is {figure.value:.3g}, wanted at most {limit:.3g}"
            for name, figure, limit in checks
            if figure.value - SURE * figure.stderr > limit
        ]
        if self.lost:
            found.append(f"{self.lost} winners lost, one needs z = {self.needed_z[1]:.2f}")
        return found

    @property
    def too_large(self) -> bool:
        """Whether sigma is, beyond chance, larger than it need be: that costs bytes only."""
        return self.std.value + SURE * self.std.stderr < STD_RANGE[0]


@dataclasses.dataclass(frozen=True)
class ErrorModel:
    """The check of both stages.

    Args:
        positions: hidden states looked at.
        rows: rows V of the head, all looked at.
        z: of the index.
        base: errors of the scan.
        refined: errors after the refinement.
    """

    positions: int
    rows: int
    z: float
    base: StageErrors
    refined: StageErrors

    @property
    def too_small(self) -> list[str]:
        """What shows that a sigma is too small, by stage; empty: the certificate's z holds."""
        found = {"base": self.base.too_small, "refined": self.refined.too_small}
        return [f"{stage}: {finding}" for stage, all_of in found.items() for finding in all_of]

    def document(self) -> dict[str, Any]:
        """JSON-able, with the Gaussian's figures beside the measured ones."""
        gaussian = {str(k): gaussian_tail(k) for k in DEVIATIONS}
        stages: dict[str, Any] = {}
        for name in STAGES:
            stage: StageErrors = getattr(self, name)
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
            "gaussian_beyond": gaussian,
            **stages,
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
    totals = ErrorTotals(index.vocab_size, index.options.z)
    for chunk in estimate_chunks(index, weight, bias, hidden, impl=impl):
        totals.add(chunk)
    return totals.result()


class ErrorTotals:
    """Sums over chunks of estimates.

    Args:
        rows: rows V of the head.
        z: of the index.
    """

    def __init__(self, rows: int, z: float) -> None:
        self._rows, self._z = rows, z
        self._stages = [_StageTotals(rows) for _ in STAGES]

    def add(self, chunk: Estimates) -> None:
        """Add the errors of one chunk."""
        least = chunk.rounding.clamp_min(torch.finfo(torch.float32).tiny)
        winner = chunk.truth.argmax(1, keepdim=True)
        for stage, totals in enumerate(self._stages):
            sigma = torch.maximum(chunk.sigma[stage], least)
            estimate = chunk.estimate[stage]
            totals.add((estimate - chunk.truth).double() / sigma, winner)
            totals.add_needed_z(estimate, sigma, winner)

    def result(self) -> ErrorModel:
        """The figures.

        Raises:
            FlashHeadError: fewer than two positions were added.
        """
        positions = self._stages[0].positions
        if positions < 2:
            raise FlashHeadError(
                f"error model of {positions} hidden states: wanted 2 or more, use a longer text"
            )
        base, refined = (totals.result(self._z) for totals in self._stages)
        return ErrorModel(positions, self._rows, self._z, base, refined)


class _StageTotals:
    def __init__(self, rows: int) -> None:
        self._first, self._second = CrossedMean(rows), CrossedMean(rows)
        self._beyond = [CrossedMean(rows) for _ in DEVIATIONS]
        self._winner: list[Tensor] = []
        self._needed_z: list[Tensor] = []

    @property
    def positions(self) -> int:
        return sum(len(x) for x in self._winner)

    def add(self, x: Tensor, winner: Tensor) -> None:
        """Add errors `float64[n, V]`, the row that wins being `int64[n, 1]`."""
        self._winner.append(x.gather(1, winner)[:, 0])
        self._first.add(x)
        for deviation, mean in zip(DEVIATIONS, self._beyond, strict=True):
            mean.add((x.abs() > deviation).double())
        self._second.add(x.square())

    def add_needed_z(self, estimate: Tensor, sigma: Tensor, winner: Tensor) -> None:
        """Add positions by their estimates and standard errors `float32[n, V]`."""
        ahead = estimate - estimate.gather(1, winner)
        self._needed_z.append((ahead / (sigma + sigma.gather(1, winner))).amax(1).double())

    def result(self, z: float) -> StageErrors:
        mean, second = self._first.figure(), self._second.figure()
        std = math.sqrt(max(0.0, second.value - mean.value**2))
        winner, needed = torch.cat(self._winner), torch.cat(self._needed_z)
        square = winner.square()
        n, rms = len(winner), math.sqrt(float(square.mean()))
        return StageErrors(
            mean,
            Figure(std, _root_stderr(second.stderr, std)),
            tuple(share.figure() for share in self._beyond),
            Figure(float(winner.mean()), float(winner.std()) / math.sqrt(n)),
            Figure(rms, _root_stderr(float(square.std()) / math.sqrt(n), rms)),
            int((winner.abs() > z).sum()),
            (float(needed.quantile(0.99)), float(needed.max())),
            int((needed > z).sum()),
        )


def _root_stderr(stderr: float, root: float) -> float:
    """Standard error of a root from that of its square, to first order."""
    return stderr / (2 * root) if root > 0 else 0.0
