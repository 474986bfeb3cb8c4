"""Rescore on the CPU: gathered rows, float32 accumulation, nothing copied."""

from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from flashhead.ops import simd

_ROWS_A_TASK = 128
_AHEAD = 2


def weight_array(weight: Tensor) -> np.ndarray:
    """The weight as the kernels take it: float32, bfloat16 bits as uint16, float16 as int16."""
    if weight.dtype == torch.bfloat16:
        return simd.bits16(weight)
    return (weight.view(torch.int16) if weight.dtype == torch.float16 else weight).numpy()


def _widen(value: Any) -> Any:
    """The name that `_widen_overload` compiles for each dtype; Python itself never calls it."""
    raise NotImplementedError("compiled only")


@overload(_widen, inline="always")
def _widen_overload(value):  # type: ignore[no-untyped-def]
    """Float32 value of an element of `weight_array`."""
    if value == types.uint16:
        return lambda value: simd.bf16(value)
    if value == types.int16:
        return lambda value: _half(value)
    return lambda value: value


@numba.njit(inline="always")
def _half(bits):  # type: ignore[no-untyped-def]
    """Float32 value of float16 bits that are finite: the exponent moved by a multiplication."""
    number = np.uint32(np.uint16(bits))
    sign = number & np.uint32(0x8000)
    scaled = np.uint32((number & np.uint32(0x7FFF)) << np.uint32(13)).view(np.float32)
    scaled = np.float32(scaled * np.float32(2.0**112))
    return -scaled if sign != 0 else scaled


@numba.njit(inline="always")
def row_dot(weight, row, hidden):  # type: ignore[no-untyped-def]
    """One logit."""
    total = np.float32(0)
    for j in range(hidden.shape[0]):
        total += _widen(weight[row, j]) * hidden[j]
    return total


@numba.njit(parallel=True, fastmath=simd.FASTMATH, cache=True)
def rescore_kernel(hidden, weight, bias, rows, count, scores):  # type: ignore[no-untyped-def]
    """scores[row] = weight[row] . hidden + bias[row] for the first `count` rows; hidden and scores
    float32, bias float32[0 | V].
    """
    size = weight.shape[1] * weight.itemsize
    for task in numba.prange((count + _ROWS_A_TASK - 1) // _ROWS_A_TASK):
        for i in range(task * _ROWS_A_TASK, min(count, (task + 1) * _ROWS_A_TASK)):
            row = np.int64(rows[i])
            ahead = np.int64(rows[min(i + _AHEAD, count - 1)])
            simd.prefetch_row(weight.ctypes.data + ahead * size, size)
            total = row_dot(weight, row, hidden)
            if bias.shape[0] > 0:
                total += bias[row]
            scores[row] = total


def rescore(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    """Logits of `rows` with float32 products and sums: float32[k]."""
    scores = torch.empty(weight.shape[0], dtype=torch.float32)
    rescore_kernel(
        hidden.float().contiguous().numpy(),
        weight_array(weight),
        simd.optional(bias),
        rows.to(torch.int32).numpy(),
        len(rows),
        scores.numpy(),
    )
    return scores[rows]
