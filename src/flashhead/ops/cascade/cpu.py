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
from flashhead.ops.cascade.api import (
    BINS,
    BINS_A_NAT,
    DENSE_SHARE,
    FAR_NATS,
    NEAR_NATS,
    PILOTS,
    SAMPLED_BLOCKS,
    Cascade,
)
from flashhead.ops.refine.cpu import refine_kernel
from flashhead.ops.rescore.cpu import rescore_kernel, weight_array
from flashhead.ops.scan.cpu import (
    BLOCKS_A_TASK,
    FINITE,
    TASK_ROWS,
    QueryArrays,
    index_arrays,
    new_scanned,
    plan_arrays,
    scan_kernel,
    widths,
)
from flashhead.ops.scan.query import ROUNDING, CodesPlan

_NO_BIAS = np.empty((0, 0), np.float32)
_BINS, _BINS_A_NAT = BINS, np.float32(BINS_A_NAT)


@numba.njit(parallel=True, fastmath=simd.FASTMATH, cache=True)
def _code_kernel(hidden, transform, coded):  # type: ignore[no-untyped-def]
    for i in numba.prange(transform.shape[0]):
        for n in range(hidden.shape[0]):
            total = np.float32(0)
            for j in range(hidden.shape[1]):
                total += simd.bf16(transform[i, j]) * hidden[n, j]
            coded[n, i] = total


@numba.njit(fastmath=simd.FASTMATH, cache=True)
def _prepare(hidden, index, plan, z, deterministic):  # type: ignore[no-untyped-def]
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
def _width(scales, coefficients, floor, row):  # type: ignore[no-untyped-def]
    """sum_g scale_g^2 coefficient_g + floor of one row."""
    width = floor
    for g in range(coefficients.shape[0]):
        scale = simd.bf16(scales[g, row])
        width += scale * scale * coefficients[g]
    return width


@numba.njit(inline="always")
def _bin(gap):  # type: ignore[no-untyped-def]
    """Bin of a row `gap` nats below the best estimate."""
    place = min(max(gap, np.float32(0)) * _BINS_A_NAT, np.float32(_BINS - 1))
    return np.int32(place)


@numba.njit(inline="always")
def growth(x):  # type: ignore[no-untyped-def]
    """exp(x) - 1 by its first four terms, x at most 4."""
    x = min(x, np.float32(4))
    rest = x * (np.float32(1 / 6) + x * np.float32(1 / 24))
    return x * (np.float32(1) + x * (np.float32(0.5) + rest))


@numba.njit(inline="always")
def _loss(score, half, peak):  # type: ignore[no-untyped-def]
    """What leaving a row costs, relative to the peak."""
    return simd.fast_exp(min(score - peak, np.float32(80.0))) * growth(half)


@numba.njit(inline="always")
def _block_losses(  # type: ignore[no-untyped-def]
    scales, scores, coefficients, floor, peak, first, count, losses, masses, places
):
    widths(scales, coefficients, floor, first, count, losses)
    for i in range(count):
        half = losses[i] * np.float32(0.5)
        masses[i] += simd.fast_exp(min(scores[first + i] - peak - half, np.float32(80.0)))
        losses[i] = _loss(scores[first + i], half, peak)
        places[i] = _bin(peak - scores[first + i])


@numba.njit(inline="always")
def _block_reach(scales, scores, spread, floor, peak, first, count, reach, places):  # type: ignore[no-untyped-def]
    widths(scales, spread, floor, first, count, reach)
    for i in range(count):
        reach[i] = scores[first + i] + np.sqrt(reach[i])
        places[i] = _bin(peak - scores[first + i])


@numba.njit(parallel=True, fastmath=FINITE, cache=True)
def _base_losses(scales, scores, highest, coefficients, floor, peak, far_nats, tasks):  # type: ignore[no-untyped-def]
    """Losses by bin, float64[BINS], and mass of all rows, by the sample that `api` describes.

    Of blocks more than `far_nats` below the peak a bound of the loss, in the last bin.
    """
    blocks, rows = highest.shape[0], scores.shape[0]
    stride = min(8, max(1, blocks // SAMPLED_BLOCKS))
    bins, mass = np.zeros((tasks, _BINS), np.float64), np.zeros(tasks, np.float64)
    for t in numba.prange(tasks):
        places, losses = np.empty(BLOCK_ROWS, np.int32), np.empty(BLOCK_ROWS, np.float32)
        near, drawn = np.zeros(BLOCK_ROWS, np.float32), np.zeros(BLOCK_ROWS, np.float32)
        far = np.float32(0)
        for block in range(blocks * t // tasks, blocks * (t + 1) // tasks):
            gap = peak - highest[block]
            is_near = gap <= np.float32(NEAR_NATS)
            if not is_near and block % stride != 0:
                continue
            if gap > far_nats:
                far += simd.fast_exp(-gap)
                continue
            first, part = block * BLOCK_ROWS, near if is_near else drawn
            present = min(BLOCK_ROWS, rows - first)
            if present == BLOCK_ROWS:  # a constant trip count, so that it is vectorised
                _block_losses(
                    scales, scores, coefficients, floor, peak, first, BLOCK_ROWS, losses, part,
                    places,
                )  # fmt: skip
            else:
                _block_losses(
                    scales, scores, coefficients, floor, peak, first, present, losses, part, places
                )
            times = 1 if is_near else stride
            for i in range(present):
                bins[t, places[i]] += times * losses[i]
        mass[t] = near.sum() + stride * drawn.sum()
        bins[t, _BINS - 1] += np.float64(far) * stride * BLOCK_ROWS * growth(np.float32(4))
    return bins.sum(0), mass.sum()


@numba.njit(cache=True)
def _cut(losses, allowed):  # type: ignore[no-untyped-def]
    """First bin whose rows may all be left, and what they lose; summed from below, where the
    numbers are small.
    """
    left = 0.0
    for b in range(_BINS - 1, -1, -1):
        if left + losses[b] > allowed:
            return b + 1, left
        left += losses[b]
    return 0, left


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
                if _bin(peak - highest[block]) < cut:
                    for i in range(present):
                        if _bin(peak - scores[first + i]) < cut:
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
                        half = _width(scales, coefficients, floor, first + i) / 2
                        saved[task] += _loss(scores[first + i], half, peak)
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
def _list_losses(scales, scores, coefficients, floor, peak, rows, count, tasks):  # type: ignore[no-untyped-def]
    """Losses by bin of the listed rows: float64[BINS]."""
    bins = np.zeros((tasks, _BINS), np.float64)
    for t in numba.prange(tasks):
        for i in range(count * t // tasks, count * (t + 1) // tasks):
            half = _width(scales, coefficients, floor, rows[i]) / 2
            bins[t, _bin(peak - scores[rows[i]])] += _loss(scores[rows[i]], half, peak)
    return bins.sum(0)


@numba.njit(parallel=True, fastmath=FINITE, cache=True)
def _keep(  # type: ignore[no-untyped-def]
    scales, scores, coefficients, spread, floor, threshold, peak, cut, buffer, counts, total
):
    """As `_first_survivors`, of listed rows: task t keeps some of entries t * TASK_ROWS ..."""
    saved = np.zeros(counts.shape[0], np.float64)
    uppers = np.full(counts.shape[0], -np.inf, np.float32)
    for task in numba.prange(counts.shape[0]):
        found, bound = 0, np.float32(-np.inf)
        for i in range(task * TASK_ROWS, min(total, (task + 1) * TASK_ROWS)):
            row = buffer[i]
            needed = _bin(peak - scores[row]) < cut
            reach = scores[row] + np.sqrt(_width(scales, spread, floor, row))
            if needed or reach >= threshold:
                buffer[task * TASK_ROWS + found] = row
                found += 1
                if not needed and cut > 0:
                    half = _width(scales, coefficients, floor, row) / 2
                    saved[task] += _loss(scores[row], half, peak)
            else:
                bound = max(bound, reach)
        counts[task], uppers[task] = found, bound
    return saved.sum(), uppers.max() if counts.shape[0] > 0 else np.float32(-np.inf)


@numba.njit(cache=True)
def _base_cut(index, query, scanned, q, peak, pilots, exact, share, threads):  # type: ignore[no-untyped-def]
    """First bin whose rows the base estimate may leave, what they lose, and the mass of all rows.

    The pilots' mass is that of their exact scores; `share` of the mass may be lost.
    """
    scores, variance, floor = scanned.estimates[q], query.variance[q, 0], query.floor[q]
    moved = 0.0
    for i in range(pilots.shape[0]):
        half = _width(index.scale, variance, floor, pilots[i]) / 2
        moved += np.exp(np.float64(exact[i] - peak))
        moved -= np.exp(np.float64(scores[pilots[i]] - half - peak))
    cut, left, mass = 0, 0.0, 0.0
    for far_nats in (FAR_NATS, 1e10):
        losses, mass = _base_losses(
            index.scale, scores, scanned.highest[q], variance, floor, peak,
            np.float32(far_nats), threads,
        )  # fmt: skip
        mass += moved
        cut, left = _cut(losses, share * mass)
        if cut < FAR_NATS * BINS_A_NAT:
            break
    return cut, left, mass


@numba.njit(cache=True)
def _narrow(  # type: ignore[no-untyped-def]
    index,
    plan,
    query,
    scanned,
    q,
    pilots,
    exact,
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
        cut, left, mass = _base_cut(
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
        variance = query.variance[q, plane]
        if budget >= 0:
            losses = _list_losses(scales, scores, variance, floor, peak, buffer, count, threads)
            cut, left = _cut(losses, budget * shares[plane] * mass - spent)
        counts = np.empty((count + TASK_ROWS - 1) // TASK_ROWS, np.int64)
        saved, bound = _keep(
            scales, scores, variance, query.spread[q, plane], floor, threshold, peak, cut, buffer,
            counts, count,
        )  # fmt: skip
        count, upper = _compact(buffer, counts), max(upper, bound)
    return count, upper


@numba.njit(cache=True)
def search(  # type: ignore[no-untyped-def]
    hidden, index, plan, weight, bias, z, deterministic, margin, budget, shares, threads, vnni
):
    """All of `api`'s steps for n hidden states float32[n, d]."""
    n, rows, stages = hidden.shape[0], index.direction.shape[0], plan.error.shape[0]
    query = _prepare(hidden, index, plan, z, deterministic)
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
            index, plan, query, scanned, q, pilots[:head], exact, margin, budget, shares, buffer,
            read, threads, vnni,
        )  # fmt: skip
        if count > DENSE_SHARE * rows:
            dense[q], count, uppers[q] = True, rows, -np.inf
            for row in range(rows):
                buffer[row] = row
        rescore_kernel(hidden[q], weight, added, buffer, count, scores)
        scores[pilots[:head]] = exact
        count = _merge(buffer, count, pilots[:head], rows)
        read[q, stages - 1] = count
        winner = buffer[0]
        for i in range(count):
            if scores[buffer[i]] > scores[winner]:
                winner = buffer[i]
        tokens[q], best[q] = winner, scores[winner]
    return scanned.estimates, tokens, best, uppers, read, dense, buffers


@numba.njit(cache=True)
def _merge(buffer, count, pilots, rows):  # type: ignore[no-untyped-def]
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
