"""Query preparation on the CPU:
the two dozen small operators of `query._prepare` in one compiled pass.

Each operator call costs 50-70 us after the body's weights have gone through the caches, together a
tenth of the head.
"""

import numba
import numpy as np
import torch
from torch import Tensor

from flashhead.index.codes import GROUP, REFINE_BITS
from flashhead.ops import simd
from flashhead.ops.scan.query import FIELD_VARIANCE, CodesPlan, CodesQuery

_FIELD_MEAN = (2**REFINE_BITS - 1) / 2
_TINY = 1e-30


@numba.njit(fastmath=simd.FASTMATH, cache=True)
def _quantize(coded, owner, step_of, step, energy, integers, refined):  # type: ignore[no-untyped-def]
    """One query: fill step, energy (both float32[segments], zero) and the integers;
    returns the refine step.
    """
    largest = np.float32(0)
    for i in range(coded.shape[0]):
        value, segment = coded[i], owner[i]
        step[segment] = max(step[segment], abs(value))
        energy[segment] += value * value
        largest = max(largest, abs(value * step_of[i]))
    for segment in range(step.shape[0]):
        step[segment] = max(step[segment] / np.float32(127), np.float32(_TINY))
    refine_step = max(largest / np.float32(127), np.float32(_TINY))
    for i in range(coded.shape[0]):
        integers[i] = np.int8(np.rint(coded[i] / step[owner[i]]))
        refined[i] = np.int8(np.rint(coded[i] * step_of[i] / refine_step))
    return refine_step


@numba.njit(fastmath=simd.FASTMATH, cache=True)
def _prepare(  # type: ignore[no-untyped-def]
    hidden,
    coded,
    exact,
    owner,
    step_of,
    sizes,
    offset_gain,
    shares,
    rounding_gain,
    word_group,
    run_segment,
    run_gain,
    base,
    run_scale,
    refine,
    numbers,
):
    """Fill base, run_scale, refine (zero) and numbers:
    offset, along, shift, 2 + 2 variances, refine scale, offset.
    """
    segments, dims = sizes.shape[0], coded.shape[1]
    integers, refined = np.empty(dims, np.int8), np.empty(dims, np.int8)
    for n in range(coded.shape[0]):
        step, energy = np.zeros(segments, np.float32), np.zeros(segments, np.float32)
        refine_step = _quantize(coded[n], owner, step_of, step, energy, integers, refined)
        offset, rounding = np.float32(0), np.float32(0)
        coding, refined_coding = np.float32(0), np.float32(0)
        for g in range(segments):
            rounding += step[g] * step[g] * rounding_gain[g]
            coding += energy[g] / sizes[g] * shares[0, g]
            refined_coding += energy[g] / sizes[g] * shares[1, g]
        total = np.float32(0)
        for i in range(dims):
            offset += np.float32(integers[i]) * step[owner[i]] * offset_gain[owner[i]]
            total += np.float32(refined[i])
            word, field, byte = i // GROUP, i % GROUP // 4, i % 4
            refine[n, word // 4, field, word % 4, byte] = refined[i]
        along, shift = np.float32(0), np.float32(0)
        for j in range(hidden.shape[1]):
            along += hidden[n, j] * exact[0, j]
            shift += hidden[n, j] * exact[1, j]
        for word in range(word_group.shape[0]):
            for i in range(GROUP):
                base[n, word, i] = integers[word_group[word] * GROUP + i]
        for run in range(run_segment.shape[0]):
            run_scale[n, run] = step[run_segment[run]] * run_gain[run]
        fine = refine_step * refine_step * np.float32(FIELD_VARIANCE * dims / 12)
        numbers[0, n], numbers[1, n], numbers[2, n] = offset, along, shift
        numbers[3, n], numbers[4, n] = coding, rounding
        numbers[5, n], numbers[6, n] = refined_coding, rounding + fine
        numbers[7, n], numbers[8, n] = refine_step, refine_step * total * np.float32(_FIELD_MEAN)


def prepare(hidden: Tensor, coded: Tensor, exact: Tensor, plan: CodesPlan) -> CodesQuery:
    """What `query.make_query` returns, of hidden `float32[n, d]` and coded `float32[n, D]`."""
    n = coded.shape[0]
    base = torch.empty(n, plan.word_group.shape[0], GROUP, dtype=torch.int8)
    run_scale = torch.empty(n, plan.run_gain.shape[0])
    refine = torch.zeros(n, plan.refine_words // 4, 4, 4, 4, dtype=torch.int8)
    numbers = torch.empty(9, n)
    given = (
        hidden,
        coded,
        exact,
        plan.segment_of,
        plan.step_of,
        plan.sizes,
        plan.offset_gain,
        plan.shares,
        plan.rounding,
        plan.word_group,
        plan.run_segment,
        plan.run_gain,
    )
    _prepare(*(tensor.numpy() for tensor in (*given, base, run_scale, refine, numbers)))
    return CodesQuery(
        base=base,
        run_scale=run_scale,
        base_offset=numbers[0],
        along=numbers[1],
        shift=numbers[2],
        base_variance=numbers[3:5].T,
        refine=refine,
        refine_scale=numbers[7],
        refine_offset=numbers[8],
        refined_variance=numbers[5:7].T,
    )
