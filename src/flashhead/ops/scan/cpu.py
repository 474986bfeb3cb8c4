"""Scan on the CPU: 16 rows at a time, packed codes times int8 queries, no unpacking to memory.

With AVX-512 VNNI a block of 16 rows is one vector: a word of each row is loaded (64 bytes), and as
often as it has fields shifted, masked and multiplied by a broadcast of 4 query bytes in one
`vpdpbusd`; four queries share the unpacking. Elsewhere LLVM vectorises a plain loop over the same
layout. What selection needs of all rows is gathered while a block is in registers: the largest
estimate and the largest upper bound of each block, and the best row of each task.
"""

from typing import NamedTuple

import numba
import numpy as np
import torch

from flashhead.index.codes import BLOCK_ROWS, CodesIndex
from flashhead.ops import simd
from flashhead.ops.scan.query import CodesPlan, CodesQuery

BLOCKS_A_TASK = 64
TASK_ROWS = BLOCKS_A_TASK * BLOCK_ROWS
FINITE = simd.FASTMATH | {"nnan"}
"""No NaN (the caller checks the hidden state and the bias), so that LLVM vectorises maxima."""
_LOWEST = np.float32(-1e30)


class IndexArrays(NamedTuple):
    """The tensors of an index as arrays, bfloat16 as uint16 bits."""

    base: np.ndarray
    refine: np.ndarray
    scale: np.ndarray
    direction: np.ndarray
    exact: np.ndarray
    transform: np.ndarray


class PlanArrays(NamedTuple):
    """The tensors of a plan as arrays."""

    runs: np.ndarray
    run_segment: np.ndarray
    run_gain: np.ndarray
    bounds: np.ndarray
    refine_bounds: np.ndarray
    gather: np.ndarray
    step: np.ndarray
    centre: np.ndarray
    size: np.ndarray
    error: np.ndarray
    worst: np.ndarray
    energy: np.ndarray
    reach: float


class QueryArrays(NamedTuple):
    """The tensors of a query as arrays."""

    integers: np.ndarray
    gathered: np.ndarray
    step: np.ndarray
    total: np.ndarray
    along: np.ndarray
    shift: np.ndarray
    variance: np.ndarray
    spread: np.ndarray
    floor: np.ndarray


class Scanned(NamedTuple):
    """What a scan leaves: estimates, and maxima of blocks and tasks."""

    estimates: np.ndarray  # float32[n, V]
    highest: np.ndarray  # float32[n, blocks]: largest estimate
    upper: np.ndarray  # float32[n, blocks]: largest estimate + spread
    peak: np.ndarray  # float32[n, tasks]: largest estimate
    best: np.ndarray  # int64[n, tasks]: its row


def index_arrays(index: CodesIndex) -> IndexArrays:
    """Arrays that share memory with an index on the CPU."""
    return IndexArrays(
        index.base.numpy(),
        index.refine.numpy(),
        simd.bits16(index.scale),
        index.direction.numpy(),
        index.exact.numpy(),
        simd.bits16(index.transform),
    )


def plan_arrays(plan: CodesPlan) -> PlanArrays:
    """Arrays that share memory with a plan."""
    values = {name: getattr(plan, name) for name in PlanArrays._fields}
    return PlanArrays(**{k: v if k == "reach" else v.numpy() for k, v in values.items()})


def query_arrays(query: CodesQuery) -> QueryArrays:
    """Arrays that share memory with a query."""
    return QueryArrays(*(getattr(query, name).numpy() for name in QueryArrays._fields))


@numba.njit(inline="always")
def _portable_sums(base, block, integers, run, sums):  # type: ignore[no-untyped-def]
    """Integer products of one run of words of one block with one query: int32[16]."""
    first, count, width, start = run[0], run[1], run[2], run[3]
    fields, mask = 8 // width, np.int32((1 << width) - 1)
    sums[:] = 0
    for word in range(count):
        for row in range(BLOCK_ROWS):
            total = np.int32(0)
            for byte in range(4):
                packed = np.int32(base[block, first + word, row, byte])
                for field in range(fields):
                    code = (packed >> np.int32(width * field)) & mask
                    number = integers[start + (word * fields + field) * 4 + byte]
                    total += np.int32(code * np.int32(number))
            sums[row] += total


@numba.njit(inline="always")
def _block_dots(base, block, runs, owner, gain, integers, q, count, dots, vnni):  # type: ignore[no-untyped-def]
    """Add the products of one block with queries q .. q + count - 1 (1 or 4) to
    dots[count, segments, 16]; `gain[n, runs]`.
    """
    dots[:count] = 0
    words, segments = base.shape[1], dots.shape[1]
    if vnni:
        for r in range(runs.shape[0]):
            codes = base.ctypes.data + (block * words + runs[r, 0]) * 64
            query = integers.ctypes.data + q * integers.shape[1] + runs[r, 3]
            factor = gain.ctypes.data + (q * runs.shape[0] + r) * 4
            out = dots.ctypes.data + owner[r] * 64
            stride, factors, outs = integers.shape[1], runs.shape[0] * 4, segments * 64
            if runs[r, 2] == 1:
                if count == 4:
                    simd.dot16_1bit_4(codes, query, stride, runs[r, 1], factor, factors, out, outs)
                else:
                    simd.dot16_1bit_1(codes, query, stride, runs[r, 1], factor, factors, out, outs)
            elif count == 4:
                simd.dot16_2bit_4(codes, query, stride, runs[r, 1], factor, factors, out, outs)
            else:
                simd.dot16_2bit_1(codes, query, stride, runs[r, 1], factor, factors, out, outs)
    else:
        sums = np.empty(BLOCK_ROWS, np.int32)
        for i in range(count):
            for r in range(runs.shape[0]):
                _portable_sums(base, block, integers[q + i], runs[r], sums)
                for row in range(BLOCK_ROWS):
                    dots[i, owner[r], row] += gain[q + i, r] * np.float32(sums[row])


@numba.njit(inline="always")
def widths(scales, coefficients, floor, first, count, out):  # type: ignore[no-untyped-def]
    """out[i] = sum_g scale_g^2 coefficient_g + floor of row first + i; the loop over rows is the
    inner one, which LLVM vectorises.
    """
    for i in range(count):
        out[i] = floor
    for g in range(coefficients.shape[0]):
        factor = coefficients[g]
        for i in range(count):
            scale = simd.bf16(scales[g, first + i])
            out[i] += scale * scale * factor


@numba.njit(inline="always")
def _finish_block(  # type: ignore[no-untyped-def]
    dots, first, rows, scales, direction, offset, along, shift, spread, floor, bias, out, upper
):
    """Estimates and upper bounds of `rows` rows from `first` on for one query."""
    for row in range(rows):
        out[first + row] = direction[first + row] * along + shift
    for g in range(dots.shape[0]):
        lower = offset[g]
        for row in range(rows):
            out[first + row] += simd.bf16(scales[g, first + row]) * (dots[g, row] - lower)
    if bias.shape[0] > 0:
        for row in range(rows):
            out[first + row] += bias[first + row]
    widths(scales, spread, floor, first, rows, upper)
    for row in range(rows):
        upper[row] = out[first + row] + np.sqrt(upper[row])


@numba.njit(parallel=True, fastmath=FINITE, cache=True)
def scan_kernel(index, plan, query, bias, scanned, vnni):  # type: ignore[no-untyped-def]
    """Fill `scanned`; bias `float32[0 | 1 | n, V]`."""
    base, runs, owner = index.base, plan.runs, plan.run_segment
    blocks, rows, n = base.shape[0], index.direction.shape[0], query.integers.shape[0]
    segments = index.scale.shape[0]
    gain = np.empty((n, runs.shape[0]), np.float32)
    offset = np.empty((n, segments), np.float32)
    for q in range(n):
        for r in range(runs.shape[0]):
            gain[q, r] = query.step[q, owner[r]] * plan.run_gain[r]
        for g in range(segments):
            offset[q, g] = query.total[q, g] * plan.step[g] * plan.centre[g]
    # arrays, not the tuples: what a parallel loop writes through a tuple is lost
    integers, along, shift = query.integers, query.along, query.shift
    spread, floor = query.spread, query.floor
    scales, direction, estimates = index.scale, index.direction, scanned.estimates
    highest, uppers = scanned.highest, scanned.upper
    peaks, bests = scanned.peak, scanned.best
    empty = np.empty(0, np.float32)
    for task in numba.prange((blocks + BLOCKS_A_TASK - 1) // BLOCKS_A_TASK):
        dots = np.empty((4, segments, BLOCK_ROWS), np.float32)
        upper = np.empty(BLOCK_ROWS, np.float32)
        for block in range(task * BLOCKS_A_TASK, min(blocks, (task + 1) * BLOCKS_A_TASK)):
            first = block * BLOCK_ROWS
            present = min(BLOCK_ROWS, rows - first)
            q = 0
            while q < n:
                count = 4 if n - q >= 4 else 1
                _block_dots(base, block, runs, owner, gain, integers, q, count, dots, vnni)
                for i in range(count):
                    own = q + i
                    added = empty
                    if bias.shape[0] > 0:
                        added = bias[own if bias.shape[0] > 1 else 0]
                    if present == BLOCK_ROWS:
                        _finish_block(
                            dots[i], first, BLOCK_ROWS, scales, direction, offset[own], along[own],
                            shift[own], spread[own, 0], floor[own], added, estimates[own], upper,
                        )  # fmt: skip
                    else:
                        _finish_block(
                            dots[i], first, present, scales, direction, offset[own], along[own],
                            shift[own], spread[own, 0], floor[own], added, estimates[own], upper,
                        )  # fmt: skip
                    high, bound = _LOWEST, _LOWEST
                    for row in range(present):
                        high = max(high, estimates[own, first + row])
                        bound = max(bound, upper[row])
                    highest[own, block], uppers[own, block] = high, bound
                q += count
        for own in range(n):
            best, peak = _best_of_task(task, highest[own], estimates[own])
            peaks[own, task], bests[own, task] = peak, best


@numba.njit(inline="always")
def _best_of_task(task, highest, estimates):  # type: ignore[no-untyped-def]
    """Row of the largest estimate of one task, and the estimate."""
    first = task * BLOCKS_A_TASK
    block, peak = first, _LOWEST
    for b in range(first, min(highest.shape[0], first + BLOCKS_A_TASK)):
        if highest[b] > peak:
            block, peak = b, highest[b]
    best = block * BLOCK_ROWS
    for v in range(block * BLOCK_ROWS, min(estimates.shape[0], (block + 1) * BLOCK_ROWS)):
        if estimates[v] > estimates[best]:
            best = v
    return best, peak


@numba.njit(cache=True)
def new_scanned(n, rows):  # type: ignore[no-untyped-def]
    """Memory for a scan of n queries."""
    blocks = (rows + BLOCK_ROWS - 1) // BLOCK_ROWS
    tasks = (blocks + BLOCKS_A_TASK - 1) // BLOCKS_A_TASK
    return Scanned(
        np.empty((n, rows), np.float32),
        np.empty((n, blocks), np.float32),
        np.empty((n, blocks), np.float32),
        np.empty((n, tasks), np.float32),
        np.empty((n, tasks), np.int64),
    )


def scan(
    query: CodesQuery, index: CodesIndex, plan: CodesPlan, bias: torch.Tensor | None
) -> torch.Tensor:
    """Estimates of all logits: float32[n, V]."""
    scanned = new_scanned(len(query.integers), index.vocab_size)
    added = np.empty((0, 0), np.float32) if bias is None else bias.contiguous().numpy()
    arrays = index_arrays(index), plan_arrays(plan), query_arrays(query)
    scan_kernel(*arrays, added, scanned, simd.has_vnni())
    return torch.from_numpy(scanned.estimates)
