"""Select on the CPU: three passes over the estimates, no sort and no library top-k."""

import math

import numba
import numpy as np
import torch
from torch import Tensor

from flashhead.ops import simd
from flashhead.ops.select.reference import BINS, BINS_A_NAT

_CHUNK = 8192
_STRIP = 32
_BINS, _BINS_A_NAT = int(BINS), int(BINS_A_NAT)


_FINITE = simd.FASTMATH | {"nnan"}
"""Estimates are finite (the caller checks the hidden state), which lets LLVM vectorise the
maxima."""


@numba.njit(inline="always")
def _sigma2(error, scale, coding, rounding):  # type: ignore[no-untyped-def]
    e, s = simd.bf16(error), simd.bf16(scale)
    return coding * e * e + rounding * s * s


@numba.njit(parallel=True, fastmath=_FINITE, cache=True)
def _select(estimates, error, scale, coding, rounding, z, budget, buffer, threads):  # type: ignore[no-untyped-def]
    count = estimates.shape[0]
    chunks = (count + _CHUNK - 1) // _CHUNK
    spreads = np.empty(count, np.float32)
    peaks = np.empty(chunks, np.float32)
    lowers = np.empty(chunks, np.float32)
    for c in numba.prange(chunks):
        peak, lower = np.float32(-np.inf), np.float32(-np.inf)
        for i in range(c * _CHUNK, min(count, (c + 1) * _CHUNK)):
            spread = z * np.sqrt(_sigma2(error[i], scale[i], coding, rounding))
            spreads[i] = spread
            peak = max(peak, estimates[i])
            lower = max(lower, estimates[i] - spread)
        peaks[c], lowers[c] = peak, lower
    peak, lower = peaks.max(), lowers.max()
    tasks = min(chunks, threads)
    histogram = np.zeros((tasks, _BINS, 2), np.float64)
    half = np.float32(0.5) / (z * z)
    for t in numba.prange(tasks):
        bins = histogram[t]
        for i in range(count * t // tasks, count * (t + 1) // tasks):
            place = min(
                np.int32((peak - estimates[i]) * np.float32(_BINS_A_NAT)), np.int32(_BINS - 1)
            )
            bins[place, 0] += 1.0
            bins[place, 1] += half * spreads[i] * spreads[i]
    cut = _cut_bin(histogram, budget)
    floor = peak - np.float32(cut) / np.float32(_BINS_A_NAT) - np.float32(1e-3)
    counts = np.zeros(chunks, np.int64)
    uppers = np.empty(chunks, np.float32)
    for c in numba.prange(chunks):
        found, upper = np.int64(0), np.float32(-np.inf)
        for start in range(c * _CHUNK, min(count, (c + 1) * _CHUNK), _STRIP):
            stop = min(count, start + _STRIP)
            highest, bound = np.float32(-np.inf), np.float32(-np.inf)
            for i in range(start, stop):
                highest = max(highest, estimates[i])
                bound = max(bound, estimates[i] + spreads[i])
            if bound < lower and highest < floor:  # most strips: nothing to choose
                upper = max(upper, bound)
                continue
            for i in range(start, stop):
                place = np.int32((peak - estimates[i]) * np.float32(_BINS_A_NAT))
                if estimates[i] + spreads[i] >= lower or min(place, np.int32(_BINS - 1)) < cut:
                    buffer[c * _CHUNK + found] = i
                    found += 1
                else:
                    upper = max(upper, estimates[i] + spreads[i])
        counts[c], uppers[c] = found, upper
    total = np.int64(0)
    for c in range(chunks):
        for i in range(counts[c]):
            buffer[total + i] = buffer[c * _CHUNK + i]
        total += counts[c]
    return total, uppers.max()


@numba.njit(cache=True)
def _cut_bin(histogram, budget):  # type: ignore[no-untyped-def]
    """First bin whose rows may all stay at their estimate, as in the reference."""
    mass = 0.0
    for b in range(_BINS):
        for t in range(histogram.shape[0]):
            mass += histogram[t, b, 0] * math.exp(-(b + 0.5) / _BINS_A_NAT)
    left = budget * mass
    for b in range(_BINS - 1, -1, -1):
        for t in range(histogram.shape[0]):
            left -= histogram[t, b, 1] * math.exp(-(b + 0.5) / _BINS_A_NAT)
        if left < 0:
            return b + 1
    return 0


def select(
    estimates: Tensor, error: Tensor, scale: Tensor, factors: Tensor, z: float, budget: float
) -> tuple[Tensor, float]:
    """Positions to look at more closely (int64[k], ascending) and the upper bound of all others."""
    buffer = torch.empty(estimates.shape[0], dtype=torch.int64)
    coding, rounding = factors.tolist()
    total, upper = _select(
        estimates.numpy(),
        simd.bits16(error),
        simd.bits16(scale),
        np.float32(coding),
        np.float32(rounding),
        np.float32(z),
        float(budget),
        buffer.numpy(),
        numba.get_num_threads(),
    )
    return buffer[:total], float(upper)
