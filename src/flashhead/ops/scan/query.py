"""A hidden state in the form the codes are multiplied with: int8 coordinates, one step a segment.

All implementations multiply the same integers. With q = round(h_g / s_g), s_g = max|h_g| / 127, the
base code k, c = (2^b - 1)/2 and the fields f_j of the planes, a row is estimated by

    s_v = sum_g scale_gv s_g step_g (q.k - c sum(q)) + direction_v (h.r) + h.m
    and plane j adds sum_g scale_gv s_g step_g / 4^j (q.f_j - 1.5 sum(q)).

Its variance at stage j (base, first plane, ...) is a sum over the segments, for every row by its
scales alone:

    sigma_v^2 = factor_jv sum_g scale_gv^2 A_jg + floor^2        (factor 1 at the base)
    A_jg = ||h_g||^2 error_jg / n_g     coding; random direction, see `index.codes`
         + s_g^2 energy_g / 12          rounding of the query, uniform

The deterministic bound on |s_v - h.w_v| is the Cauchy-Schwarz inequality for both parts,
sum_g scale_gv B_jg <= sqrt(G sum_g scale_gv^2 B_jg^2) with

    B_jg = ||h_g|| sqrt(worst_jg) + s_g sqrt(n_g energy_g) / 2.

`floor` is what float32 arithmetic itself may err by.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from flashhead.index.bound import z_score
from flashhead.index.codes import CodesIndex

ROUNDING = 4e-6
"""Error of float32 sums of this size, relative to the terms."""


@dataclasses.dataclass(frozen=True)
class CodesQuery:
    """n hidden states, prepared once; G segments, S = planes + 1 stages.

    Args:
        integers: `int8[n, D]`, coordinates.
        gathered: `int8[n, refine_words / 4, 4, 4, 4]`, the same by chunk of 4 words, field, word,
            byte, as `refine` is multiplied.
        step: `float32[n, G]`, s_g.
        total: `float32[n, G]`, s_g sum(q).
        along: `float32[n]`, h.r, multiplies `direction`.
        shift: `float32[n]`, h.m, added to every logit.
        variance: `float32[n, S, G]`, A.
        spread: `float32[n, S, G]`, the squared half-width of the interval is
            factor sum_g scale_g^2 spread_g + floor: z^2 A, or, with factor 1, G B^2.
        floor: `float32[n]`, added to both, squared nats.
    """

    integers: Tensor
    gathered: Tensor
    step: Tensor
    total: Tensor
    along: Tensor
    shift: Tensor
    variance: Tensor
    spread: Tensor
    floor: Tensor


@dataclasses.dataclass(frozen=True)
class CodesPlan:
    """What every query of one index shares: where words and segments lie.

    Args:
        runs: `int64[runs, 4]`: first word, words, bits of a field, first coordinate.
        run_segment: `int64[runs]`.
        run_gain: `float32[runs]`, step times 4 for the high bits of a 4-bit segment.
        bounds: `int64[G + 1]`, first coordinate of each segment.
        refine_bounds: `int64[G + 1]`, first word of each segment in a plane.
        gather: `int64[refine_words / 4, 4, 4, 4]`, coordinate of each query byte, -1: padding.
        step: `float32[G]`.
        centre: `float32[G]`, c.
        size: `float32[G]`, n_g.
        error: `float32[S, G]`.
        worst: `float32[S, G]`.
        energy: `float32[G]`.
        reach: largest |direction|, for the floor.
        memo: what an implementation derives from index and plan, by its name.
    """

    runs: Tensor
    run_segment: Tensor
    run_gain: Tensor
    bounds: Tensor
    refine_bounds: Tensor
    gather: Tensor
    step: Tensor
    centre: Tensor
    size: Tensor
    error: Tensor
    worst: Tensor
    energy: Tensor
    reach: float
    memo: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @property
    def stages(self) -> int:
        """Stages S before the exact rows: the base and each plane."""
        return int(self.error.shape[0])


def _reals(values: Any) -> Tensor:
    """Whatever the default dtype is: engines change it while they load."""
    return torch.tensor(values, dtype=torch.float32)


def make_plan(index: CodesIndex) -> CodesPlan:
    """Lay out the runs of words of an index, in the order `build_codes` wrote them."""
    runs: list[tuple[int, int, int, int]] = []
    run_segment: list[int] = []
    run_gain: list[float] = []
    bounds, refine_bounds, gather, word = [0], [0], [], 0
    for number, segment in enumerate(index.segments):
        width = min(2, segment.base_bits)
        count = segment.dims * width // 32
        for level in range(segment.base_words // count - 1, -1, -1):
            runs.append((word, count, width, bounds[-1]))
            run_segment.append(number)
            run_gain.append(segment.step * 4.0**level)
            word += count
        coordinates = torch.full((segment.refine_words * 16,), -1)
        coordinates[: segment.dims] = bounds[-1] + torch.arange(segment.dims)
        gather.append(coordinates.view(-1, 4, 4, 4).transpose(1, 2))
        bounds.append(bounds[-1] + segment.dims)
        refine_bounds.append(refine_bounds[-1] + segment.refine_words)
    segments = index.segments
    return CodesPlan(
        runs=torch.tensor(runs, dtype=torch.int64),
        run_segment=torch.tensor(run_segment),
        run_gain=_reals(run_gain),
        bounds=torch.tensor(bounds),
        refine_bounds=torch.tensor(refine_bounds),
        gather=torch.cat(gather).contiguous(),
        step=_reals([segment.step for segment in segments]),
        centre=_reals([(2**segment.base_bits - 1) / 2 for segment in segments]),
        size=_reals([segment.dims for segment in segments]),
        error=_reals([segment.error for segment in segments]).T.contiguous(),
        worst=_reals([segment.worst for segment in segments]).T.contiguous(),
        energy=_reals([segment.energy for segment in segments]),
        reach=float(index.direction.abs().max()),
    )


def make_query(
    hidden: Tensor, index: CodesIndex, plan: CodesPlan, failure_probability: float
) -> CodesQuery:
    """Prepare hidden states `[n, d]` (floating, finite) for an index, in eager torch: the
    specification.
    """
    states = hidden.float()
    coded = states @ index.transform.float().T
    along, shift = (states @ index.exact.T).unbind(1)
    z = z_score(failure_probability, plan.stages)
    steps, totals, integers, variances, spreads = [], [], [], [], []
    for g in range(len(plan.size)):
        part = coded[:, int(plan.bounds[g]) : int(plan.bounds[g + 1])]
        step = (part.abs().amax(1) / 127).clamp_min(1e-30)
        rounded = (part / step[:, None]).round()
        energy, size = part.square().sum(1, keepdim=True), plan.size[g]
        coding = energy / size * plan.error[:, g]
        variance = coding + (step.square() * plan.energy[g] / 12)[:, None]
        if failure_probability > 0:
            spread = z * z * variance
        else:
            bound = energy.sqrt() * plan.worst[:, g].sqrt()
            bound = bound + (step * (size * plan.energy[g]).sqrt() / 2)[:, None]
            spread = len(plan.size) * bound.square()
        steps.append(step)
        totals.append(step * rounded.sum(1))
        integers.append(rounded)
        variances.append(variance)
        spreads.append(spread)
    whole = torch.cat(integers, 1).to(torch.int8)
    padded = torch.nn.functional.pad(whole, (0, 1))  # -1 picks the zero
    size = shift.abs() + along.abs() * plan.reach
    return CodesQuery(
        integers=whole,
        gathered=padded[:, plan.gather].contiguous(),
        step=torch.stack(steps, 1),
        total=torch.stack(totals, 1),
        along=along.contiguous(),
        shift=shift.contiguous(),
        variance=torch.stack(variances, 2).contiguous(),
        spread=torch.stack(spreads, 2).contiguous(),
        floor=(ROUNDING * size).square() + 1e-12,
    )
