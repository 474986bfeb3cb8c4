"""Refine on the CPU: one gathered row of packed codes times the int8 query."""

import numba
import numpy as np
import torch
from torch import Tensor

from flashhead.index.codes import CodesIndex
from flashhead.ops import simd
from flashhead.ops.scan.query import CodesQuery

_ROWS_A_TASK = 256
_AHEAD = 8


@numba.njit(inline="always")
def _row_dot(codes, query):  # type: ignore[no-untyped-def]
    total = np.int32(0)
    for word in range(codes.shape[0]):
        for byte in range(4):
            packed = np.int32(codes[word, byte])
            for field in range(4):
                code = (packed >> np.int32(2 * field)) & np.int32(3)
                total += np.int32(code * np.int32(query[word // 4, field, word % 4, byte]))
    return total


@numba.njit(parallel=True, fastmath=simd.FASTMATH, cache=True)
def _refine(codes, query, factor, offset, scale, rows, estimates, out, vnni):  # type: ignore[no-untyped-def]
    words = codes.shape[1]
    for task in numba.prange((rows.shape[0] + _ROWS_A_TASK - 1) // _ROWS_A_TASK):
        for i in range(task * _ROWS_A_TASK, min(rows.shape[0], (task + 1) * _ROWS_A_TASK)):
            row = rows[i]
            ahead = rows[min(i + _AHEAD, rows.shape[0] - 1)]
            simd.prefetch_row(codes.ctypes.data + ahead * words * 4, words * 4)
            if vnni:
                place = codes.ctypes.data + row * words * 4
                total = simd.dot_row_vnni(place, query.ctypes.data, words // 4)
            else:
                total = _row_dot(codes[row], query)
            out[i] = estimates[i] + simd.bf16(scale[row]) * (factor * np.float32(total) - offset)


def refine(
    query: CodesQuery, number: int, index: CodesIndex, rows: Tensor, estimates: Tensor
) -> Tensor:
    """Estimates of `rows` with the refinement bits added: float32[k]."""
    out = torch.empty_like(estimates)
    _refine(
        index.refine.numpy(),
        query.refine[number].numpy(),
        np.float32(query.refine_scale[number].item()),
        np.float32(query.refine_offset[number].item()),
        simd.bits16(index.scale),
        rows.numpy(),
        estimates.numpy(),
        out.numpy(),
        simd.has_vnni(),
    )
    return out
