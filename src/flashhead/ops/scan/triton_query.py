"""A hidden state in the form the GPU scans it with (`query`, `layout`): transform, then int8.

The coordinates of some hidden states are made by many programs, 16 each; the last of them to finish
quantises them, since the step of a segment needs its largest coordinate.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flashhead.ops.scan.triton_parts import (
    ALONG,
    EMPTY,
    FLOOR,
    MINUS_INFINITY,
    MULT,
    NUMBERS,
    QSUM,
    SHIFT,
    SPREAD,
    SPREAD_FINE,
    VARIANCE,
    VARIANCE_FINE,
    is_last,
)


@triton.jit
def _segment_numbers(
    largest, squares, inside, c, own, here, z2, segments, SLOT: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
):  # fmt: skip
    """Steps of a segment [states]; writes its numbers. `c` are the constants of the segment."""
    step = tl.maximum(tl.max(tl.where(inside, largest, 0.0), 1) / 127.0, 1e-30)
    energy = tl.sum(tl.where(inside, squares, 0.0), 1)
    code_energy, dims = c[2], tl.maximum(c[3], 1.0)
    rounding = step * step * code_energy / 12.0
    variance = energy / dims * c[4] + rounding
    fine = energy / dims * c[5] + rounding
    if DETERMINISTIC:
        slack = step * tl.sqrt(dims * code_energy) / 2.0
        bound = tl.sqrt(energy * c[6]) + slack
        bound_fine = tl.sqrt(energy * c[7]) + slack
        spread, spread_fine = segments * bound * bound, segments * bound_fine * bound_fine
    else:
        spread, spread_fine = z2 * variance, z2 * fine
    tl.store(own + MULT + SLOT, step * c[0], here)
    tl.store(own + SPREAD + SLOT, spread, here)
    tl.store(own + SPREAD_FINE + SLOT, spread_fine, here)
    tl.store(own + VARIANCE + SLOT, variance, here)
    tl.store(own + VARIANCE_FINE + SLOT, fine, here)
    return step


@triton.jit
def _quantise(
    coded, parts, n, here, c0, c1, c2, place, target, bit, two_bits, query, planes, numbers, z2,
    segments, D4, D2, DIMS: tl.constexpr, PACKED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, BITS: tl.constexpr, DETERMINISTIC: tl.constexpr,
):  # fmt: skip
    """Steps, numbers, packed bytes and, for BITS, bit planes of some hidden states; `parts` are the
    largest value and the energy of each group of 16 coordinates. All loads are on their way at
    once.
    """
    GROUPS: tl.constexpr = DIMS // 16
    g = tl.arange(0, BLOCK_G)
    own_parts = parts + n[:, None] * (2 * GROUPS) + g[None, :]
    real_part = here[:, None] & (g < GROUPS)[None, :]
    largest = tl.load(own_parts, real_part, 0, cache_modifier=".cg")
    squares = tl.load(own_parts + GROUPS, real_part, 0, cache_modifier=".cg")
    bytes_ptr = coded + n[:, None] * DIMS + place[None, :]
    real = here[:, None] & (place >= 0)[None, :]
    v0 = tl.load(bytes_ptr, real, 0, cache_modifier=".cg")
    v1 = tl.load(bytes_ptr + 1, real, 0, cache_modifier=".cg")
    v2 = tl.load(bytes_ptr + 2, real, 0, cache_modifier=".cg")
    v3 = tl.load(bytes_ptr + 3, real, 0, cache_modifier=".cg")
    own = numbers + n * NUMBERS
    in0 = (g < D4 // 16)[None, :]
    in1 = ((g >= D4 // 16) & (g < (D4 + D2) // 16))[None, :]
    in2 = (g >= (D4 + D2) // 16)[None, :]
    s0 = _segment_numbers(largest, squares, in0, c0, own, here, z2, segments, 0, DETERMINISTIC)
    s1 = _segment_numbers(largest, squares, in1, c1, own, here, z2, segments, 1, DETERMINISTIC)
    s2 = _segment_numbers(largest, squares, in2, c2, own, here, z2, segments, 2, DETERMINISTIC)
    of0, of1 = (place < D4)[None, :], (place < D4 + D2)[None, :]
    step = tl.where(of0, s0[:, None], tl.where(of1, s1[:, None], s2[:, None]))
    q0 = ((v0 / step + 12582912.0) - 12582912.0).to(tl.int32)
    q1 = ((v1 / step + 12582912.0) - 12582912.0).to(tl.int32)
    q2 = ((v2 / step + 12582912.0) - 12582912.0).to(tl.int32)
    q3 = ((v3 / step + 12582912.0) - 12582912.0).to(tl.int32)
    total = (q0 & 255) | ((q1 & 255) << 8) | ((q2 & 255) << 16) | (q3 << 24)
    at = tl.arange(0, BLOCK_P)
    tl.store(
        query + n[:, None] * PACKED + target[None, :],
        total,
        here[:, None] & (at < PACKED)[None, :],
    )
    if BITS:
        p = tl.arange(0, 8)[None, None, None, :]
        bits = tl.reshape(total, [BLOCK_N, BLOCK_P // 4, 4])[:, :, :, None] >> p
        bits = (bits & 0x01010101) << tl.reshape(bit, [1, BLOCK_P // 4, 4, 1])
        group = tl.arange(0, BLOCK_P // 4)[None, :, None]
        place = n[:, None, None] * (2 * PACKED) + group * 8 + tl.arange(0, 8)[None, None, :]
        tl.store(planes + place, tl.sum(bits, 2), here[:, None, None] & (group < PACKED // 4))
    # the two-bit sections hold every coordinate once: their sums are the sums of q
    summed = tl.where((at < two_bits)[None, :], q0 + q1 + q2 + q3, 0)
    tl.store(own + QSUM, tl.sum(tl.where(of0, summed, 0), 1).to(tl.float32), here)
    tl.store(own + QSUM + 1, tl.sum(tl.where(of1 & (of0 == 0), summed, 0), 1).to(tl.float32), here)
    tl.store(own + QSUM + 2, tl.sum(tl.where(of1, 0, summed), 1).to(tl.float32), here)


@triton.jit
def _constants(constants, SLOT: tl.constexpr):
    """The eight numbers of a segment."""
    values = ()
    for i in tl.static_range(8):
        values = values + (tl.load(constants + SLOT * 8 + i),)
    return values


@triton.jit
def _query_kernel(
    hidden,
    transform,
    exact,
    constants,
    table,
    coded,
    parts,
    query,
    planes,
    numbers,
    counters,
    pilots,
    winners,
    tops,
    read,
    sums,
    B,
    z2,
    segments,
    reach,
    D4,
    D2,
    D_HIDDEN: tl.constexpr,
    DIMS: tl.constexpr,
    PACKED: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    DOT: tl.constexpr,
    BITS: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
    PDL: tl.constexpr,
):
    """Coordinates by groups of 16, for BLOCK_N hidden states; the last program of these quantises
    them. Also makes the buffers of the search ready. What does not depend on the hidden states is
    loaded before they exist.
    """
    if PDL:
        gdc_launch_dependents()
    g = tl.program_id(0)
    GROUPS: tl.constexpr = DIMS // 16
    SHARDS: tl.constexpr = 1 if GROUPS < 64 else 16
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    here = n < B
    state = hidden + n[:, None].to(tl.int64) * D_HIDDEN
    c0, c1, c2 = _constants(constants, 0), _constants(constants, 1), _constants(constants, 2)
    all_words = tl.arange(0, BLOCK_P)
    place = tl.load(table + all_words, all_words < PACKED, -1)
    target = tl.load(table + PACKED + all_words, all_words < PACKED, 0)
    bit = tl.load(table + 2 * PACKED + all_words, all_words < PACKED, 0)
    two_bits = PACKED - tl.load(table + 3 * PACKED)
    rows = tl.minimum(g, GROUPS - 1) * 16 + tl.arange(0, 16)
    i = tl.arange(0, BLOCK_D)
    if not DOT:  # one step of BLOCK_D
        w = tl.load(transform + rows[:, None] * D_HIDDEN + i[None, :], (i < D_HIDDEN)[None, :], 0)
    if PDL:
        gdc_wait()
    if g == GROUPS:
        along = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        shift = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for start in range(0, D_HIDDEN, BLOCK_D):
            k = start + i
            h = tl.load(state + k[None, :], here[:, None] & (k < D_HIDDEN)[None, :], 0)
            along += h.to(tl.float32) * tl.load(exact + k, k < D_HIDDEN, 0)[None, :]
            shift += h.to(tl.float32) * tl.load(exact + D_HIDDEN + k, k < D_HIDDEN, 0)[None, :]
        a, s = tl.sum(along, 1), tl.sum(shift, 1)
        size = 4e-6 * (tl.abs(s) + tl.abs(a) * reach)
        tl.store(numbers + n * NUMBERS + ALONG, a, here)
        tl.store(numbers + n * NUMBERS + SHIFT, s, here)
        tl.store(numbers + n * NUMBERS + FLOOR, size * size + 1e-12, here)
        empty = tl.full([BLOCK_N], EMPTY, tl.int64)
        tl.store(pilots + n, empty, here)
        tl.store(winners + n, empty, here)
        tl.store(tops + n, tl.full([BLOCK_N], MINUS_INFINITY, tl.int32), here)
        four = tl.arange(0, 4)
        tl.store(
            read + n[:, None] * 4 + four[None, :], tl.zeros([BLOCK_N, 4], tl.int32), here[:, None]
        )
        if SUMS > 0:
            all_sums = tl.arange(0, SUMS)
            nothing = tl.zeros([BLOCK_N, SUMS], tl.int32)
            tl.store(sums + n[:, None] * SUMS + all_sums[None, :], nothing, here[:, None])
    else:
        own_part = parts + n * (2 * GROUPS) + g
        if DOT:  # products of 16-bit numbers are exact in float32
            value = tl.zeros([16, BLOCK_N], tl.float32)
            for start in range(0, D_HIDDEN, BLOCK_D):
                k = start + i
                t = tl.load(
                    transform + rows[:, None] * D_HIDDEN + k[None, :], (k < D_HIDDEN)[None, :], 0
                )
                x = tl.load(
                    hidden + n[None, :].to(tl.int64) * D_HIDDEN + k[:, None],
                    here[None, :] & (k < D_HIDDEN)[:, None],
                    0,
                )
                value = tl.dot(t, x, value)
            tl.store(coded + n[None, :] * DIMS + rows[:, None], value, here[None, :])
            tl.store(own_part, tl.max(tl.abs(value), 0), here)
            tl.store(own_part + GROUPS, tl.sum(value * value, 0), here)
        else:
            for m in range(BLOCK_N):
                number = tl.program_id(1) * BLOCK_N + m
                x = tl.load(
                    hidden + number.to(tl.int64) * D_HIDDEN + i, (i < D_HIDDEN) & (number < B), 0
                )
                summed = tl.sum(x.to(tl.float32)[None, :] * w.to(tl.float32), 1)
                tl.store(coded + number * DIMS + rows, summed, number < B)
                tl.store(parts + number * (2 * GROUPS) + g, tl.max(tl.abs(summed), 0), number < B)
                tl.store(
                    parts + number * (2 * GROUPS) + GROUPS + g,
                    tl.sum(summed * summed, 0),
                    number < B,
                )
    if is_last(counters + 17 * tl.program_id(1), g, GROUPS + 1, SHARDS):
        _quantise(
            coded, parts, n, here, c0, c1, c2, place, target, bit, two_bits, query, planes,
            numbers, z2, segments, D4, D2, DIMS, PACKED, BLOCK_N, BLOCK_G, BLOCK_P, BITS,
            DETERMINISTIC,
        )  # fmt: skip
