"""A hidden state in the form the codes are multiplied with: int8 coordinates, one scale a segment.

All implementations multiply the same integers. For segment g of n_g coordinates h_g, base code
value 4 step_g (k - c_g) with c_g = (2^b_g - 1)/2, and q = round(h_g / s_g), s_g = max|h_g| / 127:

    estimate_v = scale_v (sum_g 4 step_g s_g (q.k_g - c_g sum(q))) + direction_v (h.r) + h.m

Its variance has two parts that differ by row only through two stored numbers:

    sigma_v^2 = coding error_v^2 + rounding scale_v^2
    coding    = sum_g share_g ||h_g||^2 / n_g        (random rotation; share_g: mean error share)
    rounding  = sum_g n_g variance_g s_g^2 / 12      (uniform rounding of the query)
"""

import dataclasses
import functools

import torch
from torch import Tensor

from flashhead.index.codes import GROUP, REFINE_BITS, CodesIndex

FIELD_VARIANCE = (4**REFINE_BITS - 1) / 12
"""Of a uniform 2-bit field."""


@dataclasses.dataclass(frozen=True)
class CodesQuery:
    """n hidden states, prepared once, used by scan, select and refine.

    Args:
        base: `int8[n, words, 16]`, coordinates in the order of the base words.
        run_scale: `float32[n, runs]`, factor of the integer sum of each run of words.
        base_offset: `float32[n]`, to subtract from the scaled sum.
        along: `float32[n]`, h.r, multiplies `direction`.
        shift: `float32[n]`, h.m, added to every logit.
        base_variance: `float32[n, 2]`, coding and rounding factors of the base estimate.
        refine: `int8[n, refine_words / 4, 4, 4, 4]`, coordinates by chunk of 4 words, field, word,
            byte.
        refine_scale: `float32[n]`, factor of the integer sum.
        refine_offset: `float32[n]`, to subtract from the scaled sum.
        refined_variance: `float32[n, 2]`, as base_variance after the refinement.
    """

    base: Tensor
    run_scale: Tensor
    base_offset: Tensor
    along: Tensor
    shift: Tensor
    base_variance: Tensor
    refine: Tensor
    refine_scale: Tensor
    refine_offset: Tensor
    refined_variance: Tensor


@dataclasses.dataclass(frozen=True)
class CodesPlan:
    """What every query of one index shares: where words and segments lie."""

    runs: Tensor  # int64[runs, 2]: first word, one past the last, of equal segment and level
    run_segment: Tensor  # int64[runs]
    run_gain: Tensor  # float32[runs]
    word_group: Tensor  # int64[words]: the group of 16 coordinates a base word belongs to
    segment_of: Tensor  # int64[D]
    sizes: Tensor  # float32[segments]
    step_of: Tensor  # float32[D]
    offset_gain: Tensor  # float32[segments]
    shares: Tensor  # float32[2, segments]: of the base and the refined error
    rounding: Tensor  # float32[segments]: n_g variance_g / 12
    refine_words: int


def make_plan(index: CodesIndex) -> CodesPlan:
    """Lay out the runs of words of an index, in the order `build_codes` wrote them."""
    runs: list[tuple[int, int]] = []
    run_segment: list[int] = []
    run_gain: list[float] = []
    word_group: list[int] = []
    segment_of: list[int] = []
    word = group = 0
    for number, segment in enumerate(index.segments):
        for level in range(segment.base_bits // 2 - 1, -1, -1):
            runs.append((word, word + segment.groups))
            run_segment.append(number)
            run_gain.append(4 * segment.step * 4.0**level)
            word_group.extend(range(group, group + segment.groups))
            word += segment.groups
        segment_of.extend([number] * (segment.groups * GROUP))
        group += segment.groups
    segments = index.segments
    floats = functools.partial(torch.tensor, dtype=torch.float32)
    sizes = floats([segment.groups * GROUP for segment in segments])
    steps = floats([segment.step for segment in segments])
    owner = torch.tensor(segment_of)
    return CodesPlan(
        runs=torch.tensor(runs, dtype=torch.int64).view(-1, 2),
        run_segment=torch.tensor(run_segment, dtype=torch.int64),
        run_gain=floats(run_gain),
        word_group=torch.tensor(word_group, dtype=torch.int64),
        segment_of=owner,
        sizes=sizes,
        step_of=steps[owner],
        offset_gain=floats([4 * s.step * (2**s.base_bits - 1) / 2 for s in segments]),
        shares=floats([[s.base_share for s in segments], [s.refined_share for s in segments]]),
        rounding=sizes * floats([segment.variance for segment in segments]) / 12,
        refine_words=int(index.refine.shape[1]),
    )


def make_query(hidden: Tensor, index: CodesIndex, plan: CodesPlan, *, impl: str) -> CodesQuery:
    """Prepare hidden states `[n, d]` (floating) for an index;
    impl "cpu" or "reference", the same integers.
    """
    coded = torch.nn.functional.linear(hidden.to(torch.bfloat16), index.transform).float()
    if impl == "cpu":
        from flashhead.ops.scan import prepare

        return prepare.prepare(hidden.float(), coded, index.exact, plan)
    return _prepare(hidden.float(), coded, index.exact, plan)


def _prepare(hidden: Tensor, coded: Tensor, exact: Tensor, plan: CodesPlan) -> CodesQuery:
    """In eager torch, the specification: hidden `float32[n, d]`, coded `float32[n, D]`."""
    along, shift = (hidden @ exact.T).unbind(1)
    n, segments = coded.shape[0], plan.sizes.shape[0]
    owner = plan.segment_of.expand(n, -1)
    peak = coded.new_zeros(n, segments).scatter_reduce_(1, owner, coded.abs(), "amax")
    step = (peak / 127).clamp_min_(1e-30)
    integers = (coded / step.gather(1, owner)).round_()
    sums = coded.new_zeros(n, segments).scatter_add_(1, owner, integers)
    energy = coded.new_zeros(n, segments).scatter_add_(1, owner, coded.square()) / plan.sizes
    rounding = step.square() @ plan.rounding
    stepped = coded * plan.step_of
    refine_scale = (stepped.abs().amax(1) / 127).clamp_min_(1e-30)
    refined = (stepped / refine_scale[:, None]).round_()
    refine_rounding = refine_scale.square() * (FIELD_VARIANCE * coded.shape[1] / 12)
    return CodesQuery(
        base=integers.to(torch.int8).view(n, -1, GROUP)[:, plan.word_group].contiguous(),
        run_scale=(step[:, plan.run_segment] * plan.run_gain).contiguous(),
        base_offset=(step * sums) @ plan.offset_gain,
        along=along.contiguous(),
        shift=shift.contiguous(),
        base_variance=torch.stack([energy @ plan.shares[0], rounding], 1),
        refine=_by_chunk(refined.to(torch.int8), plan.refine_words),
        refine_scale=refine_scale,
        refine_offset=refine_scale * refined.sum(1) * ((2**REFINE_BITS - 1) / 2),
        refined_variance=torch.stack([energy @ plan.shares[1], rounding + refine_rounding], 1),
    )


def _by_chunk(integers: Tensor, words: int) -> Tensor:
    """int8[n, D] to int8[n, words / 4, 4 fields, 4 words, 4 bytes]."""
    n, dims = integers.shape
    padded = torch.nn.functional.pad(integers, (0, words * GROUP - dims))
    return padded.view(n, words // 4, 4, 4, 4).transpose(2, 3).contiguous()
