"""Cascade on the CPU: one compiled call for the whole search, no operator of torch in between.

Each small operator of torch costs 50-70 us after the body's weights have gone through the caches; a
search has two dozen. Lists of rows are kept in int32 buffers; a stage reads the list of the one
before it.
"""

import numba
import numpy as np
import torch
from torch import Tensor

from flashhead.index.bound import SHARES, z_score
from flashhead.index.codes import BLOCK_ROWS, CodesIndex
from flashhead.ops import simd
from flashhead.ops.cascade.api import DENSE_SHARE, PILOTS, Cascade
from flashhead.ops.cascade.losses import (
    base_cut,
    bin_of,
    cut_of,
    list_losses,
    loss_of,
    refined_width,
    width_of,
)
from flashhead.ops.refine.cpu import refine_kernel
from flashhead.ops.rescore.cpu import rescore_kernel, weight_array
from flashhead.ops.scan.cpu import (
    BLOCKS_A_TASK,
    FINITE,
    TASK_ROWS,
    index_arrays,
    new_scanned,
    plan_arrays,
    scan_kernel,
    widths,
)
from flashhead.ops.scan.prepare import prepare
from flashhead.ops.scan.query import CodesPlan

_NO_BIAS = np.empty((0, 0), np.float32)


@numba.njit(cache=True)
def _pilots(peaks, best, rows):  # type: ignore[no-untyped-def]
    """Fill `rows` with the best rows of the best tasks, best first; returns how many."""
    left = peaks.copy()
    count = min(PILOTS, left.shape[0])
    for i in range(count):
        task = np.argmax(left)
        rows[i] = best[task]
        left[task] = -np.inf
    return count


@numba.njit(inline="always")
def _block_reach(scales, scores, spread, floor, peak, first, count, reach, places):  # type: ignore[no-untyped-def]
    widths(scales, spread, floor, first, count, reach)
    for i in range(count):
        reach[i] = scores[first + i] + np.sqrt(reach[i])
        places[i] = bin_of(peak - scores[first + i])


@numba.njit(parallel=True, fastmath=FINITE, cache=True)
def _first_survivors(  # type: ignore[no-untyped-def]
    scales,
    scores,
    highest,
    upper,
    coefficients,
    spread,
    floor,
    threshold,
    peak,
    cut,
    buffer,
    counts,
):
    """Rows that pass the base, by task in `buffer[task * TASK_ROWS :]`; fills `counts`.

    Returns the loss of those that can win although they might be left, and the bound of the rest.
    """
    rows, blocks = scores.shape[0], highest.shape[0]
    saved = np.zeros(counts.shape[0], np.float64)
    uppers = np.empty(counts.shape[0], np.float32)
    for task in numba.prange(counts.shape[0]):
        reach, places = np.empty(BLOCK_ROWS, np.float32), np.empty(BLOCK_ROWS, np.int32)
        found, bound = 0, np.float32(-np.inf)
        for block in range(task * BLOCKS_A_TASK, min(blocks, (task + 1) * BLOCKS_A_TASK)):
            first = block * BLOCK_ROWS
            present = min(BLOCK_ROWS, rows - first)
            if upper[block] < threshold:  # none of these can win
                bound = max(bound, upper[block])
                if bin_of(peak - highest[block]) < cut:
                    for i in range(present):
                        if bin_of(peak - scores[first + i]) < cut:
                            buffer[task * TASK_ROWS + found] = first + i
                            found += 1
                continue
            if present == BLOCK_ROWS:
                _block_reach(scales, scores, spread, floor, peak, first, BLOCK_ROWS, reach, places)
            else:
                _block_reach(scales, scores, spread, floor, peak, first, present, reach, places)
            for i in range(present):
                if reach[i] >= threshold or places[i] < cut:
                    buffer[task * TASK_ROWS + found] = first + i
                    found += 1
                    if places[i] >= cut and cut > 0:
                        half = width_of(scales, coefficients, floor, first + i) / 2
                        saved[task] += loss_of(scores[first + i], half, peak)
                else:
                    bound = max(bound, reach[i])
        counts[task], uppers[task] = found, bound
    return saved.sum(), uppers.max()


@numba.njit(cache=True)
def _compact(buffer, counts):  # type: ignore[no-untyped-def]
    total = 0
    for task in range(counts.shape[0]):
        for i in range(counts[task]):
            buffer[total + i] = buffer[task * TASK_ROWS + i]
        total += counts[task]
    return total


@numba.njit(parallel=True, fastmath=FINITE, cache=True)
def _keep(  # type: ignore[no-untyped-def]
    scales, factor, fixed, scores, coefficients, spread, floor, threshold, peak, cut, buffer,
    counts, total,
):  # fmt: skip
    """As `_first_survivors`, of listed rows: task t keeps some of entries t * TASK_ROWS ...

    `factor` is that of the variance, `fixed` that of the spread: none for the deterministic bound.
    """
    saved = np.zeros(counts.shape[0], np.float64)
    uppers = np.full(counts.shape[0], -np.inf, np.float32)
    for task in numba.prange(counts.shape[0]):
        found, bound = 0, np.float32(-np.inf)
        for i in range(task * TASK_ROWS, min(total, (task + 1) * TASK_ROWS)):
            row = buffer[i]
            needed = bin_of(peak - scores[row]) < cut
            reach = scores[row] + np.sqrt(refined_width(scales, fixed, spread, floor, row))
            if needed or reach >= threshold:
                buffer[task * TASK_ROWS + found] = row
                found += 1
                if not needed and cut > 0:
                    half = refined_width(scales, factor, coefficients, floor, row) / 2
                    saved[task] += loss_of(scores[row], half, peak)
            else:
                bound = max(bound, reach)
        counts[task], uppers[task] = found, bound
    return saved.sum(), uppers.max() if counts.shape[0] > 0 else np.float32(-np.inf)


@numba.njit(cache=True)
def _narrow(  # type: ignore[no-untyped-def]
    index,
    plan,
    query,
    scanned,
    q,
    pilots,
    exact,
    deterministic,
    margin,
    budget,
    shares,
    buffer,
    read,
    threads,
    vnni,
):
    """Rows to read exactly, in `buffer`; returns how many, and the bound of all others.

    budget < 0: the winner alone counts.
    """
    scores, floor, scales = scanned.estimates[q], query.floor[q], index.scale
    peak, threshold, cut, spent = scanned.peak[q].max(), exact.max() - margin, 0, 0.0
    mass, left = 0.0, 0.0
    if budget >= 0:
        cut, left, mass = base_cut(
            index, query, scanned, q, peak, pilots, exact, budget * shares[0], threads
        )
    counts = np.empty(scanned.peak.shape[1], np.int64)
    saved, upper = _first_survivors(
        scales, scores, scanned.highest[q], scanned.upper[q], query.variance[q, 0],
        query.spread[q, 0], floor, threshold, peak, cut, buffer, counts,
    )  # fmt: skip
    count = _compact(buffer, counts)
    for plane in range(1, plan.error.shape[0]):
        read[q, plane - 1] = count
        spent += max(0.0, left - saved)
        refine_kernel(index, plan, query, q, plane, buffer, count, scores, vnni)
        variance, factor = query.variance[q, plane], index.factor[plane - 1]
        fixed = factor[:0] if deterministic else factor
        if budget >= 0:
            losses = list_losses(
                scales, factor, scores, variance, floor, peak, buffer, count, threads
            )
            cut, left = cut_of(losses, budget * shares[plane] * mass - spent)
        counts = np.empty((count + TASK_ROWS - 1) // TASK_ROWS, np.int64)
        saved, bound = _keep(
            scales, factor, fixed, scores, variance, query.spread[q, plane], floor, threshold, peak,
            cut, buffer, counts, count,
        )  # fmt: skip
        count, upper = _compact(buffer, counts), max(upper, bound)
    return count, upper


@numba.njit(cache=True)
def search(  # type: ignore[no-untyped-def]
    hidden, index, plan, weight, bias, z, deterministic, margin, budget, shares, threads, vnni
):
    """All of `api`'s steps for n hidden states float32[n, d]."""
    n, rows, stages = hidden.shape[0], index.direction.shape[0], plan.error.shape[0]
    query = prepare(hidden, index, plan, z, deterministic)
    scanned = new_scanned(n, rows)
    scan_kernel(index, plan, query, bias, scanned, vnni)
    buffers = np.empty((n, scanned.peak.shape[1] * TASK_ROWS), np.int32)
    tokens, best = np.empty(n, np.int64), np.empty(n, np.float32)
    uppers = np.empty(n, np.float32)
    read, dense = np.zeros((n, stages), np.int64), np.zeros(n, np.bool_)
    pilots = np.empty(PILOTS, np.int32)
    empty = np.empty(0, np.float32)
    for q in range(n):
        added = empty
        if bias.shape[0] > 0:
            added = bias[q if bias.shape[0] > 1 else 0]
        buffer, scores = buffers[q], scanned.estimates[q]
        head = _pilots(scanned.peak[q], scanned.best[q], pilots)
        kept = scores[pilots[:head]].copy()
        rescore_kernel(hidden[q], weight, added, pilots, head, scores)
        exact = scores[pilots[:head]].copy()
        scores[pilots[:head]] = kept
        count, uppers[q] = _narrow(
            index, plan, query, scanned, q, pilots[:head], exact, deterministic, margin, budget,
            shares, buffer, read, threads, vnni,
        )  # fmt: skip
        if count > DENSE_SHARE * rows:
            dense[q], count, uppers[q] = True, rows, -np.inf
            for row in range(rows):
                buffer[row] = row
        rescore_kernel(hidden[q], weight, added, buffer, count, scores)
        scores[pilots[:head]] = exact
        count = _merge(buffer, count, pilots[:head])
        read[q, stages - 1] = count
        winner = buffer[0]
        for i in range(count):
            if scores[buffer[i]] > scores[winner]:
                winner = buffer[i]
        tokens[q], best[q] = winner, scores[winner]
    return scanned.estimates, tokens, best, uppers, read, dense, buffers


@numba.njit(cache=True)
def _merge(buffer, count, pilots):  # type: ignore[no-untyped-def]
    """Add the pilots that are not listed to an ascending list; returns the new length."""
    extra = np.sort(pilots)
    missing = 0
    for pilot in extra:
        place = np.searchsorted(buffer[:count], pilot)
        if place == count or buffer[place] != pilot:
            extra[missing] = pilot
            missing += 1
    total = count + missing
    i, j = count - 1, missing - 1
    for place in range(total - 1, -1, -1):
        if j < 0 or (i >= 0 and buffer[i] > extra[j]):
            buffer[place] = buffer[i]
            i -= 1
        else:
            buffer[place] = extra[j]
            j -= 1
    return total


def cascade(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: CodesIndex,
    plan: CodesPlan,
    failure_probability: float,
    kl_budget: float | None,
    margin: float,
) -> Cascade:
    """Search the codes of a head; see `api.cascade`."""
    if "cpu" not in plan.memo:
        plan.memo["cpu"] = index_arrays(index), plan_arrays(plan), simd.has_vnni()
    arrays, planned, vnni = plan.memo["cpu"]
    scores, tokens, best, uppers, read, dense, buffers = search(
        hidden.float().contiguous().numpy(),
        arrays,
        planned,
        weight_array(weight),
        _NO_BIAS if bias is None else bias.contiguous().numpy(),
        np.float32(z_score(failure_probability, plan.stages)),
        failure_probability == 0,
        np.float32(margin),
        -1.0 if kl_budget is None else kl_budget,
        SHARES[plan.stages - 1],
        numba.get_num_threads(),
        vnni,
    )
    return Cascade(
        torch.from_numpy(scores),
        torch.from_numpy(tokens),
        torch.from_numpy(best),
        torch.from_numpy(uppers),
        torch.from_numpy(read),
        torch.from_numpy(dense),
        [torch.from_numpy(buffers[n, : read[n, -1]]) for n in range(len(tokens))],
    )
