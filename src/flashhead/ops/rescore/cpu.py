"""Rescore on the CPU: gathered rows, float32 accumulation, nothing copied."""

import numba
import numpy as np
import torch
from torch import Tensor

from flashhead.ops import simd

_ROWS_A_TASK = 128
_AHEAD = 2


@numba.njit(parallel=True, fastmath=simd.FASTMATH, cache=True)
def _rescore_bf16(hidden, weight, bias, rows, out):  # type: ignore[no-untyped-def]
    for task in numba.prange((rows.shape[0] + _ROWS_A_TASK - 1) // _ROWS_A_TASK):
        for i in range(task * _ROWS_A_TASK, min(rows.shape[0], (task + 1) * _ROWS_A_TASK)):
            row = weight[rows[i]]
            ahead = rows[min(i + _AHEAD, rows.shape[0] - 1)]
            simd.prefetch_row(weight.ctypes.data + ahead * weight.strides[0], weight.strides[0])
            total = np.float32(0)
            for j in range(hidden.shape[0]):
                total += simd.bf16(row[j]) * hidden[j]
            if bias.shape[0] > 0:
                total += bias[rows[i]]
            out[i] = total


@numba.njit(parallel=True, fastmath=simd.FASTMATH, cache=True)
def _rescore_f32(hidden, weight, bias, rows, out):  # type: ignore[no-untyped-def]
    for task in numba.prange((rows.shape[0] + _ROWS_A_TASK - 1) // _ROWS_A_TASK):
        for i in range(task * _ROWS_A_TASK, min(rows.shape[0], (task + 1) * _ROWS_A_TASK)):
            row = weight[rows[i]]
            ahead = rows[min(i + _AHEAD, rows.shape[0] - 1)]
            simd.prefetch_row(weight.ctypes.data + ahead * weight.strides[0], weight.strides[0])
            total = np.float32(0)
            for j in range(hidden.shape[0]):
                total += row[j] * hidden[j]
            if bias.shape[0] > 0:
                total += bias[rows[i]]
            out[i] = total


def rescore(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    """Logits of `rows` with float32 products and sums: float32[k]."""
    out = torch.empty(rows.shape[0], dtype=torch.float32)
    state = hidden.float().numpy()
    arguments = (simd.optional(bias), rows.numpy(), out.numpy())
    if weight.dtype == torch.bfloat16:
        _rescore_bf16(state, simd.bits16(weight), *arguments)
    elif weight.dtype == torch.float32:
        _rescore_f32(state, weight.numpy(), *arguments)
    else:  # float16: no Numba type; torch gathers and converts
        from flashhead.ops.rescore import reference

        return reference.rescore(hidden, weight, bias, rows)
    return out
