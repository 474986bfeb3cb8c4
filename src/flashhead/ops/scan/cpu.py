"""Scan on the CPU: 16 rows at a time, packed codes times int8 query, no unpacking to memory.

With AVX-512 VNNI a block of 16 rows is one vector: a word of each row is loaded (64 bytes), and
four times shifted, masked and multiplied by a broadcast of 4 query bytes in one `vpdpbusd`. 16
codes a row cost about 12 instructions and the loop runs at memory speed from one query. Elsewhere
LLVM vectorises a plain loop over the same layout.
"""

import numba
import numpy as np
import torch
from torch import Tensor

from flashhead.index.codes import BLOCK_ROWS, CodesIndex
from flashhead.ops import simd
from flashhead.ops.scan.query import CodesPlan, CodesQuery

_BLOCKS_A_TASK = 64


@numba.njit(inline="always")
def _run_sums(codes, query, first, last, sums):  # type: ignore[no-untyped-def]
    """Portable integer products of one run of words of one block: int32[16]."""
    sums[:] = 0
    for word in range(first, last):
        for row in range(BLOCK_ROWS):
            total = np.int32(0)
            for byte in range(4):
                packed = np.int32(codes[word, row, byte])
                for field in range(4):
                    code = (packed >> np.int32(2 * field)) & np.int32(3)
                    total += np.int32(code * np.int32(query[word, 4 * field + byte]))
            sums[row] += total


@numba.njit(parallel=True, fastmath=simd.FASTMATH, cache=True)
def _scan(codes, query, runs, run_scale, offset, scale, direction, along, shift, bias, out, vnni):  # type: ignore[no-untyped-def]
    blocks, words = codes.shape[0], codes.shape[1]
    rows = scale.shape[0]
    for task in numba.prange((blocks + _BLOCKS_A_TASK - 1) // _BLOCKS_A_TASK):
        dots = np.empty(BLOCK_ROWS, np.float32)
        sums = np.empty(BLOCK_ROWS, np.int32)
        for block in range(task * _BLOCKS_A_TASK, min(blocks, (task + 1) * _BLOCKS_A_TASK)):
            for q in range(query.shape[0]):
                dots[:] = 0
                for run in range(runs.shape[0]):
                    first, last = runs[run, 0], runs[run, 1]
                    if vnni:
                        simd.dot16_vnni(
                            codes.ctypes.data + (block * words + first) * 64,
                            query.ctypes.data + (q * words + first) * 16,
                            last - first,
                            run_scale[q, run],
                            dots.ctypes.data,
                        )
                    else:
                        _run_sums(codes[block], query[q], first, last, sums)
                        for row in range(BLOCK_ROWS):
                            dots[row] += run_scale[q, run] * np.float32(sums[row])
                start = block * BLOCK_ROWS
                for row in range(min(BLOCK_ROWS, rows - start)):
                    v = start + row
                    coded = simd.bf16(scale[v]) * (dots[row] - offset[q])
                    out[q, v] = coded + direction[v] * along[q] + shift[q]
                    if bias.shape[0] > 0:
                        out[q, v] += bias[v]


def scan(query: CodesQuery, index: CodesIndex, plan: CodesPlan, bias: Tensor | None) -> Tensor:
    """Estimates of all logits: float32[n, V]."""
    out = torch.empty(query.base.shape[0], index.vocab_size, dtype=torch.float32)
    _scan(
        index.base.numpy(),
        query.base.numpy(),
        plan.runs.numpy(),
        query.run_scale.numpy(),
        query.base_offset.numpy(),
        simd.bits16(index.scale),
        index.direction.numpy(),
        query.along.numpy(),
        query.shift.numpy(),
        simd.optional(bias),
        out.numpy(),
        simd.has_vnni(),
    )
    return out
