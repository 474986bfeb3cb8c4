"""Query preparation on the CPU: what `query.make_query` returns, compiled."""

import numba
import numpy as np

from flashhead.ops import simd
from flashhead.ops.scan.cpu import QueryArrays
from flashhead.ops.scan.query import ROUNDING


@numba.njit(parallel=True, fastmath=simd.FASTMATH, cache=True)
def _code_kernel(hidden, transform, coded):  # type: ignore[no-untyped-def]
    for i in numba.prange(transform.shape[0]):
        for n in range(hidden.shape[0]):
            total = np.float32(0)
            for j in range(hidden.shape[1]):
                total += simd.bf16(transform[i, j]) * hidden[n, j]
            coded[n, i] = total


@numba.njit(fastmath=simd.FASTMATH, cache=True)
def prepare(hidden, index, plan, z, deterministic):  # type: ignore[no-untyped-def]
    """What `query.make_query` returns."""
    n, dims = hidden.shape[0], index.transform.shape[0]
    segments, stages = plan.size.shape[0], plan.error.shape[0]
    coded = np.empty((n, dims), np.float32)
    _code_kernel(hidden, index.transform, coded)
    integers = np.empty((n, dims), np.int8)
    gathered = np.zeros((n, *plan.gather.shape), np.int8)
    step, total = np.empty((n, segments), np.float32), np.empty((n, segments), np.float32)
    along, shift = np.zeros(n, np.float32), np.zeros(n, np.float32)
    variance = np.empty((n, stages, segments), np.float32)
    spread = np.empty((n, stages, segments), np.float32)
    floor = np.empty(n, np.float32)
    order = plan.gather.reshape(-1)
    for q in range(n):
        for j in range(hidden.shape[1]):
            along[q] += hidden[q, j] * index.exact[0, j]
            shift[q] += hidden[q, j] * index.exact[1, j]
        size = np.float32(ROUNDING) * (abs(shift[q]) + abs(along[q]) * np.float32(plan.reach))
        floor[q] = size * size + np.float32(1e-12)
        for g in range(segments):
            largest, energy, number = np.float32(0), np.float32(0), np.float32(0)
            for i in range(plan.bounds[g], plan.bounds[g + 1]):
                largest = max(largest, abs(coded[q, i]))
                energy += coded[q, i] * coded[q, i]
            step[q, g] = max(largest / np.float32(127), np.float32(1e-30))
            for i in range(plan.bounds[g], plan.bounds[g + 1]):
                rounded = np.rint(coded[q, i] / step[q, g])
                integers[q, i] = np.int8(rounded)
                number += rounded
            total[q, g] = step[q, g] * number
            for stage in range(stages):
                coding = energy / plan.size[g] * plan.error[stage, g]
                rounding = step[q, g] * step[q, g] * plan.energy[g] / np.float32(12)
                variance[q, stage, g] = coding + rounding
                if deterministic:
                    bound = np.sqrt(energy) * np.sqrt(plan.worst[stage, g])
                    bound += step[q, g] * np.sqrt(plan.size[g] * plan.energy[g]) / np.float32(2)
                    spread[q, stage, g] = np.float32(segments) * bound * bound
                else:
                    spread[q, stage, g] = z * z * (coding + rounding)
        flat = gathered[q].reshape(-1)
        for i in range(order.shape[0]):
            if order[i] >= 0:
                flat[i] = integers[q, order[i]]
    return QueryArrays(integers, gathered, step, total, along, shift, variance, spread, floor)
