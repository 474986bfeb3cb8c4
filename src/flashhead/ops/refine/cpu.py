"""Refine on the CPU: gathered rows of packed codes times the int8 query, prefetched."""

import numba
import numpy as np
import torch
from torch import Tensor

from flashhead.index.codes import CodesIndex
from flashhead.ops import simd
from flashhead.ops.scan.cpu import FINITE, index_arrays, plan_arrays, query_arrays
from flashhead.ops.scan.query import CodesPlan, CodesQuery

_ROWS_A_TASK = 256
_AHEAD = 16


@numba.njit(inline="always")
def _portable_dot(codes, gathered):  # type: ignore[no-untyped-def]
    total = np.int32(0)
    for word in range(codes.shape[0]):
        for byte in range(4):
            packed = np.int32(codes[word, byte])
            for field in range(4):
                code = (packed >> np.int32(2 * field)) & np.int32(3)
                total += np.int32(code * np.int32(gathered[word // 4, field, word % 4, byte]))
    return total


@numba.njit(parallel=True, fastmath=FINITE, cache=True)
def refine_kernel(index, plan, query, n, plane, rows, count, scores, vnni):  # type: ignore[no-untyped-def]
    """Replace scores[row] of the first `count` rows by what one more plane says."""
    codes, gathered = index.refine[plane - 1], query.gathered[n]
    bounds, scales = plan.refine_bounds, index.scale
    segments = scales.shape[0]
    words = codes.shape[1]
    gain, offset = np.empty(segments, np.float32), np.empty(segments, np.float32)
    for g in range(segments):
        finer = plan.step[g] / np.float32(4.0**plane)
        gain[g] = query.step[n, g] * finer
        offset[g] = np.float32(1.5) * query.total[n, g] * finer
    for task in numba.prange((count + _ROWS_A_TASK - 1) // _ROWS_A_TASK):
        for i in range(task * _ROWS_A_TASK, min(count, (task + 1) * _ROWS_A_TASK)):
            row = np.int64(rows[i])
            ahead = np.int64(rows[min(i + _AHEAD, count - 1)])
            simd.prefetch_row(codes.ctypes.data + ahead * words * 4, words * 4)
            value = scores[row]
            for g in range(segments):
                first, last = bounds[g], bounds[g + 1]
                if vnni:
                    dot = simd.dot_row_vnni(
                        codes.ctypes.data + (row * words + first) * 4,
                        gathered.ctypes.data + first * 16,
                        (last - first) // 4,
                    )
                else:
                    dot = _portable_dot(codes[row, first:last], gathered[first // 4 : last // 4])
                scale = simd.bf16(scales[g, row])
                value += scale * (gain[g] * np.float32(dot) - offset[g])
            scores[row] = value


def refine(
    query: CodesQuery,
    number: int,
    index: CodesIndex,
    plan: CodesPlan,
    plane: int,
    rows: Tensor,
    estimates: Tensor,
) -> Tensor:
    """Estimates of `rows` with the bits of one plane (1 or 2) added: float32[k]."""
    scores = torch.zeros(index.vocab_size, dtype=torch.float32)
    scores[rows] = estimates
    refine_kernel(
        index_arrays(index),
        plan_arrays(plan),
        query_arrays(query),
        number,
        plane,
        rows.to(torch.int32).numpy(),
        len(rows),
        scores.numpy(),
        simd.has_vnni(),
    )
    return scores[rows]
