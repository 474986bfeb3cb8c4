"""What leaving rows at their estimate costs, by bins, on the CPU (formulas in `api`)."""

import numba
import numpy as np

from flashhead.index.codes import BLOCK_ROWS
from flashhead.ops import simd
from flashhead.ops.cascade.api import BINS, BINS_A_NAT, FAR_NATS, NEAR_NATS, SAMPLED_BLOCKS
from flashhead.ops.scan.cpu import FINITE, widths

_BINS, _BINS_A_NAT = BINS, np.float32(BINS_A_NAT)


@numba.njit(inline="always")
def width_of(scales, coefficients, floor, row):  # type: ignore[no-untyped-def]
    """sum_g scale_g^2 coefficient_g + floor of one row."""
    width = np.float32(0)
    for g in range(coefficients.shape[0]):
        scale = simd.bf16(scales[g, row])
        width += scale * scale * coefficients[g]
    return width + floor


@numba.njit(inline="always")
def refined_width(scales, factor, coefficients, floor, row):  # type: ignore[no-untyped-def]
    """`width_of` times a factor, before the floor; an empty factor is 1."""
    width = width_of(scales, coefficients, np.float32(0), row)
    if factor.shape[0] > 0:
        width *= factor[row]
    return width + floor


@numba.njit(inline="always")
def bin_of(gap):  # type: ignore[no-untyped-def]
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
def loss_of(score, half, peak):  # type: ignore[no-untyped-def]
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
        losses[i] = loss_of(scores[first + i], half, peak)
        places[i] = bin_of(peak - scores[first + i])


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
def cut_of(losses, allowed):  # type: ignore[no-untyped-def]
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
def list_losses(scales, factor, scores, coefficients, floor, peak, rows, count, tasks):  # type: ignore[no-untyped-def]
    """Losses by bin of the listed rows: float64[BINS]."""
    bins = np.zeros((tasks, _BINS), np.float64)
    for t in numba.prange(tasks):
        for i in range(count * t // tasks, count * (t + 1) // tasks):
            half = refined_width(scales, factor, coefficients, floor, rows[i]) / 2
            bins[t, bin_of(peak - scores[rows[i]])] += loss_of(scores[rows[i]], half, peak)
    return bins.sum(0)


@numba.njit(cache=True)
def base_cut(index, query, scanned, q, peak, pilots, exact, share, threads):  # type: ignore[no-untyped-def]
    """First bin whose rows the base estimate may leave, what they lose, and the mass of all rows.

    The pilots' mass is that of their exact scores; `share` of the mass may be lost.
    """
    scores, variance, floor = scanned.estimates[q], query.variance[q, 0], query.floor[q]
    moved = 0.0
    for i in range(pilots.shape[0]):
        half = width_of(index.scale, variance, floor, pilots[i]) / 2
        moved += np.exp(np.float64(exact[i] - peak))
        moved -= np.exp(np.float64(scores[pilots[i]] - half - peak))
    cut, left, mass = 0, 0.0, 0.0
    for far_nats in (FAR_NATS, 1e10):
        losses, mass = _base_losses(
            index.scale, scores, scanned.highest[q], variance, floor, peak,
            np.float32(far_nats), threads,
        )  # fmt: skip
        mass += moved
        cut, left = cut_of(losses, share * mass)
        if cut < FAR_NATS * BINS_A_NAT:
            break
    return cut, left, mass
