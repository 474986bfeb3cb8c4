"""Query and scan in Triton (layout and formulas: `layout`, `query`).

One query, `_scan_kernel`: dot products of bytes (`dp4a`). A field of a word is masked where it
lies, so a one-bit code counts 1 or 2: two sums instead of seven more shifts. Four rows of a word
are one 16-byte load. Several queries, `_scan_batch_kernel`: the same codes as int8 operands of the
tensor cores, unpacked in registers after they have got their place there (one convert of the packed
bytes), every code for all queries.

Both keep the best estimate of each program and score its row exactly if it may be the best of all
("pilot"): the selection then compares with an exact score. They store estimates, or upper bounds
s + spread where only the winner counts.

Where inline assembly does not exist (the interpreter, AMD) FAST is off and the same sums are taken
by shifts and masks.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flashhead.ops.noise.triton import gumbel_at, gumbel_pairs
from flashhead.ops.scan import layout

_PAD = tl.constexpr(layout.FIELD_WORDS)
_NUMBERS = tl.constexpr(layout.NUMBERS)
_MULT, _QSUM = tl.constexpr(layout.NUMBER_MULT), tl.constexpr(layout.NUMBER_QSUM)
_ALONG, _SHIFT = tl.constexpr(layout.NUMBER_ALONG), tl.constexpr(layout.NUMBER_SHIFT)
_FLOOR = tl.constexpr(layout.NUMBER_FLOOR)
_SPREAD, _SPREAD_FINE = tl.constexpr(layout.NUMBER_SPREAD), tl.constexpr(layout.NUMBER_SPREAD_FINE)
_VARIANCE = tl.constexpr(layout.NUMBER_VARIANCE)
_VARIANCE_FINE = tl.constexpr(layout.NUMBER_VARIANCE_FINE)
_MINUS_INFINITY = tl.constexpr(-0x7F800001)
"""`ordered(-inf)`."""
EMPTY = tl.constexpr(-0x7F800001 << 32)
"""A `packed` without a row: its score is -inf."""
_TILE_BITS = tl.constexpr(0x3FF)
"""Low bits of a running maximum that say which tile it came from."""


@triton.jit
def ordered(value):
    """Float32 as int32 in the same order."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def unordered(bits):
    """Inverse of `ordered`."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def packed(value, row):
    """A score and its row as int64: of equal scores the lowest row is the largest."""
    return (ordered(value).to(tl.int64) << 32) | (0x7FFFFFFF - row).to(tl.int64)


@triton.jit
def score_of(pack):
    """Score of a `packed`."""
    return unordered((pack >> 32).to(tl.int32))


@triton.jit
def row_of(pack):
    """Row of a `packed`."""
    return 0x7FFFFFFF - (pack & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _bytes_dot(x, q, acc):
    """The sum and the four products of signed bytes, in plain Triton."""
    for j in tl.static_range(4):
        acc += ((x << (24 - 8 * j)) >> 24) * ((q << (24 - 8 * j)) >> 24)
    return acc


@triton.jit
def dot_two_bits(x, q0, q1, q2, q3, low, high, FAST: tl.constexpr):
    """Sums of the 16 two-bit fields of a word with the query: low + high / 4."""
    if FAST:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, y;
            and.b32 a, $2, 0x03030303;
            dp4a.s32.s32 $0, a, $3, $7;
            and.b32 a, $2, 0x0c0c0c0c;
            dp4a.s32.s32 $1, a, $4, $8;
            shr.u32 y, $2, 4;
            and.b32 a, y, 0x03030303;
            dp4a.s32.s32 $0, a, $5, $0;
            and.b32 a, y, 0x0c0c0c0c;
            dp4a.s32.s32 $1, a, $6, $1;
            }""",
            "=&r,=&r,r,r,r,r,r,r,r",
            [x, q0, q1, q2, q3, low, high],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        low = _bytes_dot(x & 0x03030303, q0, low)
        high = _bytes_dot(x & 0x0C0C0C0C, q1, high)
        low = _bytes_dot((x >> 4) & 0x03030303, q2, low)
        high = _bytes_dot((x >> 4) & 0x0C0C0C0C, q3, high)
    return low, high


@triton.jit
def _dot_one_bit(x, q0, q1, q2, q3, q4, q5, q6, q7, low, high, FAST: tl.constexpr):
    """Sums of the 32 one-bit fields of a word with the query: low + high / 2."""
    if FAST:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, y;
            and.b32 a, $2, 0x01010101;
            dp4a.s32.s32 $0, a, $3, $11;
            and.b32 a, $2, 0x02020202;
            dp4a.s32.s32 $1, a, $4, $12;
            shr.u32 y, $2, 2;
            and.b32 a, y, 0x01010101;
            dp4a.s32.s32 $0, a, $5, $0;
            and.b32 a, y, 0x02020202;
            dp4a.s32.s32 $1, a, $6, $1;
            shr.u32 y, $2, 4;
            and.b32 a, y, 0x01010101;
            dp4a.s32.s32 $0, a, $7, $0;
            and.b32 a, y, 0x02020202;
            dp4a.s32.s32 $1, a, $8, $1;
            shr.u32 y, $2, 6;
            and.b32 a, y, 0x01010101;
            dp4a.s32.s32 $0, a, $9, $0;
            and.b32 a, y, 0x02020202;
            dp4a.s32.s32 $1, a, $10, $1;
            }""",
            "=&r,=&r,r,r,r,r,r,r,r,r,r,r,r",
            [x, q0, q1, q2, q3, q4, q5, q6, q7, low, high],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        low = _bytes_dot(x & 0x01010101, q0, low)
        high = _bytes_dot(x & 0x02020202, q1, high)
        low = _bytes_dot((x >> 2) & 0x01010101, q2, low)
        high = _bytes_dot((x >> 2) & 0x02020202, q3, high)
        low = _bytes_dot((x >> 4) & 0x01010101, q4, low)
        high = _bytes_dot((x >> 4) & 0x02020202, q5, high)
        low = _bytes_dot((x >> 6) & 0x01010101, q6, low)
        high = _bytes_dot((x >> 6) & 0x02020202, q7, high)
    return low, high


# ---------------------------------------------------------------- query


@triton.jit
def is_last(counters, pid, programs, SHARDS: tl.constexpr):
    """Whether all `programs` have come here; true for one of them, and the counters are zero again.

    Atomics on one address wait for each other, so many programs count on SHARDS addresses first.
    """
    tl.debug_barrier()
    if SHARDS == 1:
        last = tl.atomic_add(counters, 1, sem="acq_rel") == programs - 1
        if last:
            tl.store(counters, 0)
    else:
        shard = pid % SHARDS
        size = (programs - shard + SHARDS - 1) // SHARDS
        last = tl.atomic_add(counters + 1 + shard, 1, sem="acq_rel") == size - 1
        if last:
            tl.store(counters + 1 + shard, 0)
            last = tl.atomic_add(counters, 1, sem="acq_rel") == tl.minimum(programs, SHARDS) - 1
            if last:
                tl.store(counters, 0)
    return last


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
    tl.store(own + _MULT + SLOT, step * c[0], here)
    tl.store(own + _SPREAD + SLOT, spread, here)
    tl.store(own + _SPREAD_FINE + SLOT, spread_fine, here)
    tl.store(own + _VARIANCE + SLOT, variance, here)
    tl.store(own + _VARIANCE_FINE + SLOT, fine, here)
    return step


@triton.jit
def _quantise(
    coded, parts, n, here, c0, c1, c2, place, two_bits, query, numbers, z2, segments, D4, D2,
    DIMS: tl.constexpr, PACKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr, DETERMINISTIC: tl.constexpr,
):  # fmt: skip
    """Steps, numbers and packed bytes of BLOCK_N hidden states; `parts` are the largest value and
    the energy of each group of 16 coordinates. All loads are on their way at once.
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
    own = numbers + n * _NUMBERS
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
        query + n[:, None] * PACKED + at[None, :], total, here[:, None] & (at < PACKED)[None, :]
    )
    # the two-bit sections hold every coordinate once: their sums are the sums of q
    summed = tl.where((at < two_bits)[None, :], q0 + q1 + q2 + q3, 0)
    tl.store(own + _QSUM, tl.sum(tl.where(of0, summed, 0), 1).to(tl.float32), here)
    tl.store(own + _QSUM + 1, tl.sum(tl.where(of1 & (of0 == 0), summed, 0), 1).to(tl.float32), here)
    tl.store(own + _QSUM + 2, tl.sum(tl.where(of1, 0, summed), 1).to(tl.float32), here)


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
    two_bits = PACKED - tl.load(table + PACKED)
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
        tl.store(numbers + n * _NUMBERS + _ALONG, a, here)
        tl.store(numbers + n * _NUMBERS + _SHIFT, s, here)
        tl.store(numbers + n * _NUMBERS + _FLOOR, size * size + 1e-12, here)
        empty = tl.full([BLOCK_N], EMPTY, tl.int64)
        tl.store(pilots + n, empty, here)
        tl.store(winners + n, empty, here)
        tl.store(tops + n, tl.full([BLOCK_N], _MINUS_INFINITY, tl.int32), here)
        four = tl.arange(0, 4)
        tl.store(
            read + n[:, None] * 4 + four[None, :], tl.zeros([BLOCK_N, 4], tl.int32), here[:, None]
        )
        if SUMS > 0:
            all_sums = tl.arange(0, SUMS)
            nothing = tl.zeros([BLOCK_N, SUMS], tl.int64)
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
            coded, parts, n, here, c0, c1, c2, place, two_bits, query, numbers, z2, segments, D4,
            D2, DIMS, PACKED, BLOCK_N, BLOCK_G, BLOCK_P, DETERMINISTIC,
        )  # fmt: skip


# ---------------------------------------------------------------- one query


@triton.jit
def _load_word(x_ptr, keep, word):
    """One word of all rows of a tile."""
    return tl.load(x_ptr + word * 16, keep, 0, eviction_policy="evict_first")


@triton.jit
def _add_two_bits(x, at, low, high, WORDS: tl.constexpr, FAST: tl.constexpr):
    """Add a two-bit word of the rows to their sums; `at` is its first field in the query."""
    PADDED: tl.constexpr = (WORDS + _PAD - 1) // _PAD * _PAD
    return dot_two_bits(
        x, tl.load(at), tl.load(at + PADDED), tl.load(at + 2 * PADDED), tl.load(at + 3 * PADDED),
        low, high, FAST,
    )  # fmt: skip


@triton.jit
def _add_one_bit(x, at, low, high, WORDS: tl.constexpr, FAST: tl.constexpr):
    """Add a one-bit word of the rows to their sums."""
    PADDED: tl.constexpr = (WORDS + _PAD - 1) // _PAD * _PAD
    return _dot_one_bit(
        x, tl.load(at), tl.load(at + PADDED), tl.load(at + 2 * PADDED), tl.load(at + 3 * PADDED),
        tl.load(at + 4 * PADDED), tl.load(at + 5 * PADDED), tl.load(at + 6 * PADDED),
        tl.load(at + 7 * PADDED), low, high, FAST,
    )  # fmt: skip


@triton.jit
def exact_dot(hidden, weight, bias, row, D_HIDDEN: tl.constexpr, BLOCK_D: tl.constexpr,
              HAS_BIAS: tl.constexpr):  # fmt: skip
    """Score of one row by the whole program."""
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in tl.static_range(0, D_HIDDEN, BLOCK_D):
        i = start + tl.arange(0, BLOCK_D)
        h = tl.load(hidden + i, i < D_HIDDEN, 0).to(tl.float32)
        w = tl.load(weight + row.to(tl.int64) * D_HIDDEN + i, i < D_HIDDEN, 0)
        total += h * w.to(tl.float32)
    score = tl.sum(total, 0)
    if HAS_BIAS:
        score += tl.load(bias + row)
    return score


@triton.jit
def _scan_kernel(
    base,
    scale,
    direction,
    hidden,
    weight,
    bias,
    bias_stride,
    temperature,
    seeds,
    steps,
    query,
    numbers,
    constants,
    scores,
    pilots,
    tops,
    V,
    nblk,
    D_HIDDEN: tl.constexpr,
    D4: tl.constexpr,
    D2: tl.constexpr,
    D1: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
    READY: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BOUNDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    FAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """Scan of query program_id(1); a program has a tile of 16 BLOCKS rows.

    A thread has two or four rows of a block, all their words: nothing is exchanged between threads.
    READY words are always on their way, the first ones before the query is.
    """
    tile = tl.program_id(0)
    n = tl.program_id(1)
    WORDS: tl.constexpr = D4 // 8 + D2 // 16 + D1 // 32
    P4: tl.constexpr = (D4 // 16 + _PAD - 1) // _PAD * _PAD * 4
    P2: tl.constexpr = (D2 // 16 + _PAD - 1) // _PAD * _PAD * 4
    P1: tl.constexpr = (D1 // 16 + _PAD - 1) // _PAD * _PAD * 4
    PB: tl.constexpr = (D1 // 32 + _PAD - 1) // _PAD * _PAD * 8
    FOUR: tl.constexpr = D4 // 16
    TWO: tl.constexpr = D4 // 8 + D2 // 16
    ONE: tl.constexpr = D1 // 32
    AHEAD: tl.constexpr = min(READY, ONE) if ONE > 0 else min(READY, TWO)
    blk = tile * BLOCKS + tl.arange(0, BLOCKS)
    r = tl.arange(0, 16)
    rows = blk[:, None] * 16 + r[None, :]
    inside = rows < V
    x_ptr = base + blk.to(tl.int64)[:, None] * (WORDS * 16) + r[None, :]
    keep = (blk < nblk)[:, None] & (r < 16)[None, :]
    window = ()
    for w in tl.static_range(AHEAD):
        window = window + (_load_word(x_ptr, keep, w),)
    direct = tl.load(direction + rows, inside, 0)
    S2: tl.constexpr = 1 if D4 > 0 else 0
    S1: tl.constexpr = S2 + (1 if D2 > 0 else 0)
    scale4 = tl.load(scale + rows, inside, 0) if D4 > 0 else 0
    scale2 = tl.load(scale + S2 * V + rows, inside, 0) if D2 > 0 else 0
    scale1 = tl.load(scale + S1 * V + rows, inside, 0) if D1 > 0 else 0
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    own = numbers + n * _NUMBERS
    q = query + n * (P4 + P2 + P1 + PB)
    estimate = tl.load(own + _ALONG) * direct + tl.load(own + _SHIFT)
    squares = tl.zeros([BLOCKS, 16], tl.float32) + tl.load(own + _FLOOR)
    low = tl.zeros([BLOCKS, 16], tl.int32)
    high = tl.zeros([BLOCKS, 16], tl.int32)
    low2, high2 = low, high
    for w in tl.static_range(TWO):
        x = window[0]
        if w + AHEAD < WORDS:
            window = window[1:] + (_load_word(x_ptr, keep, w + AHEAD),)
        else:
            window = window[1:]
        if w < FOUR:
            low, high = _add_two_bits(x, q + w, low, high, FOUR, FAST)
        elif w < 2 * FOUR:
            if w == FOUR:
                low, high = 4 * low, 4 * high
            low, high = _add_two_bits(x, q + w - FOUR, low, high, FOUR, FAST)
        else:
            low2, high2 = _add_two_bits(x, q + P4 + w - 2 * FOUR, low2, high2, D2 // 16, FAST)
    if D4 > 0:
        dot = low.to(tl.float32) + high.to(tl.float32) * 0.25
        rs = scale4.to(tl.float32)
        dot -= tl.load(constants + 1) * tl.load(own + _QSUM)
        estimate += rs * (tl.load(own + _MULT) * dot)
        squares += rs * rs * tl.load(own + _SPREAD)
    if D2 > 0:
        dot = low2.to(tl.float32) + high2.to(tl.float32) * 0.25
        rs = scale2.to(tl.float32)
        dot -= tl.load(constants + 8 + 1) * tl.load(own + _QSUM + 1)
        estimate += rs * (tl.load(own + _MULT + 1) * dot)
        squares += rs * rs * tl.load(own + _SPREAD + 1)
    if D1 > 0:
        low = tl.zeros([BLOCKS, 16], tl.int32)
        high = tl.zeros([BLOCKS, 16], tl.int32)
        one_q = q + P4 + P2 + P1
        # a loop, as straight code would not fit the instruction cache
        for start in range(0, ONE // GROUP * GROUP, GROUP):
            for w in tl.static_range(GROUP):
                word = TWO + start + w + AHEAD
                x = window[0]
                window = window[1:] + (_load_word(x_ptr, keep & (word < WORDS), word),)
                low, high = _add_one_bit(x, one_q + start + w, low, high, ONE, FAST)
        for w in tl.static_range(ONE // GROUP * GROUP, ONE):
            low, high = _add_one_bit(
                window[w - ONE // GROUP * GROUP], one_q + w, low, high, ONE, FAST
            )
        dot = low.to(tl.float32) + high.to(tl.float32) * 0.5
        rs = scale1.to(tl.float32)
        dot -= tl.load(constants + 16 + 1) * tl.load(own + _QSUM + 2)
        estimate += rs * (tl.load(own + _MULT + 2) * dot)
        squares += rs * rs * tl.load(own + _SPREAD + 2)
    if HAS_BIAS:
        estimate += tl.load(bias + n.to(tl.int64) * bias_stride + rows, inside, 0)
    if HAS_NOISE:
        pair = blk[:, None] * 8 + tl.arange(0, 8)[None, :]
        even, odd = gumbel_pairs(tl.load(seeds + n), tl.load(steps + n), pair)
        noise = tl.reshape(tl.join(even, odd), [BLOCKS, 16])
        estimate += tl.load(temperature + n) * noise
    place = scores + n.to(tl.int64) * V + rows
    if BOUNDS:
        tl.store(place, estimate + tl.sqrt(squares), inside)
    else:
        tl.store(place, estimate, inside)
    key = ordered(tl.where(inside, estimate, float("-inf")))
    best = tl.max(tl.max(key, 1), 0)
    row = tl.max(tl.max(tl.where(key == best, rows, 0), 1), 0)
    row = tl.minimum(row, V - 1)
    old = unordered(tl.atomic_max(tops + n, best, sem="relaxed"))
    error = tl.sqrt(spread_of(scale, own, row, row >= 0, V, _VARIANCE, D4, D2, D1))
    if unordered(best) > old - error:
        score = exact_dot(
            hidden + n.to(tl.int64) * D_HIDDEN, weight, bias + n.to(tl.int64) * bias_stride, row,
            D_HIDDEN, BLOCK_D, HAS_BIAS,
        )  # fmt: skip
        if HAS_NOISE:
            drawn = gumbel_at(tl.load(seeds + n), tl.load(steps + n), row)
            score += tl.load(temperature + n) * drawn
        tl.atomic_max(pilots + n, packed(score, row), sem="relaxed")


@triton.jit
def spread_of(scale, own, rows, keep, V, FIRST: tl.constexpr, D4: tl.constexpr, D2: tl.constexpr,
              D1: tl.constexpr):  # fmt: skip
    """sum_g scale_gv^2 coefficient_g, coefficients from number FIRST on."""
    total = rows.to(tl.float32) * 0.0
    slot = 0
    if D4 > 0:
        rs = tl.load(scale + rows, keep, 0).to(tl.float32)
        total += rs * rs * tl.load(own + FIRST)
        slot += 1
    if D2 > 0:
        rs = tl.load(scale + slot * V + rows, keep, 0).to(tl.float32)
        total += rs * rs * tl.load(own + FIRST + 1)
        slot += 1
    if D1 > 0:
        rs = tl.load(scale + slot * V + rows, keep, 0).to(tl.float32)
        total += rs * rs * tl.load(own + FIRST + 2)
    return total


# ---------------------------------------------------------------- several queries


@triton.constexpr_function
def _field_assembly(width, field):
    """Fields of `width` bits of four bytes at once."""
    mask = {1: "0x01010101", 2: "0x03030303"}[width]
    if field == 0:
        return f"and.b32 $0, $1, {mask};"
    return f"{{ .reg .b32 t; shr.u32 t, $1, {field * width}; and.b32 $0, t, {mask}; }}"


@triton.jit
def _operands(q, here, FIRST: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr,
              BLOCK_W: tl.constexpr):  # fmt: skip
    """The query's operands of a run: int8 [4 BLOCK_W, N] by chunk and field, 0 outside the run.

    They are made before the loop over tiles and stay in shared memory.
    """
    PADDED: tl.constexpr = (WORDS + _PAD - 1) // _PAD * _PAD
    CHUNK: tl.constexpr = FIRST // BLOCK_W
    CHUNKS: tl.constexpr = (FIRST + WORDS + BLOCK_W - 1) // BLOCK_W - CHUNK if WORDS > 0 else 0
    operands = ()
    for c in tl.static_range(CHUNKS):
        k = (CHUNK + c) * BLOCK_W * 4 - FIRST * 4 + tl.arange(0, BLOCK_W * 4)
        inside = ((k >= 0) & (k < WORDS * 4))[:, None] & here[None, :]
        for field in tl.static_range(8 // WIDTH):
            part = tl.load(q[None, :] + field * (PADDED * 4) + k[:, None], inside, 0)
            operands = operands + (part,)
    return operands


@triton.jit
def _fields_dot(x, operands, acc, AT: tl.constexpr, WIDTH: tl.constexpr, FAST: tl.constexpr):
    """Add the products of all fields of a chunk [rows, bytes] with operands AT, AT + 1, ...."""
    MASK: tl.constexpr = 2**WIDTH - 1
    for field in tl.static_range(8 // WIDTH):
        if FAST:
            codes = tl.inline_asm_elementwise(
                _field_assembly(WIDTH, field), "=r,r", [x], dtype=tl.int8, is_pure=True, pack=4
            )
        else:
            codes = ((x >> (field * WIDTH)) & MASK).to(tl.int8)
        acc = tl.dot(codes, operands[AT + field], acc, out_dtype=tl.int32)
    return acc


@triton.jit
def _run_batch(x_ptr, keep, operands, acc, FIRST: tl.constexpr, WORDS: tl.constexpr,
               TOTAL: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr,
               BLOCK_W: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    """Add a run of words to int32 [rows, queries]. A chunk that two runs share is loaded once: the
    compiler sees that the loads are the same.
    """
    CHUNK: tl.constexpr = FIRST // BLOCK_W
    CHUNKS: tl.constexpr = (FIRST + WORDS + BLOCK_W - 1) // BLOCK_W - CHUNK
    for c in tl.static_range(CHUNKS):
        word = (CHUNK + c) * BLOCK_W + tl.arange(0, BLOCK_W)
        x = tl.load(
            x_ptr + word[None, :, None] * 64, keep & (word < TOTAL)[None, :, None], 0,
            eviction_policy="evict_first",
        )  # fmt: skip
        x = tl.permute(tl.reshape(x, [BLOCKS, BLOCK_W, 16, 4]), [0, 2, 1, 3])
        x = tl.reshape(x, [BLOCKS * 16, BLOCK_W * 4])
        acc = _fields_dot(x, operands, acc, c * (8 // WIDTH), WIDTH, FAST)
    return acc


@triton.jit
def _tile_numbers(direction, scale, rows, V, D4: tl.constexpr, D2: tl.constexpr,
                  D1: tl.constexpr):  # fmt: skip
    """Direction and scales of the rows of a tile."""
    S2: tl.constexpr = 1 if D4 > 0 else 0
    S1: tl.constexpr = S2 + (1 if D2 > 0 else 0)
    inside = rows < V
    direct = tl.load(direction + rows, inside, 0)
    nothing = direct.to(tl.bfloat16)
    scale4 = tl.load(scale + rows, inside, 0) if D4 > 0 else nothing
    scale2 = tl.load(scale + S2 * V + rows, inside, 0) if D2 > 0 else nothing
    scale1 = tl.load(scale + S1 * V + rows, inside, 0) if D1 > 0 else nothing
    return direct, scale4, scale2, scale1


@triton.jit
def _add_segment(estimate, acc, rs, constant, own, here, SLOT: tl.constexpr):
    """Add a segment's part of the estimates [rows, queries]."""
    offset = tl.load(constant) * tl.load(own + _QSUM + SLOT, here, 0)
    mult = tl.load(own + _MULT + SLOT, here, 0)
    return estimate + rs[:, None] * (mult[None, :] * (acc.to(tl.float32) - offset[None, :]))


@triton.jit
def _scan_batch_kernel(
    base,
    scale,
    direction,
    hidden,
    weight,
    bias,
    bias_stride,
    temperature,
    seeds,
    steps,
    query,
    numbers,
    constants,
    scores,
    pilots,
    tops,
    V,
    nblk,
    B,
    D_HIDDEN: tl.constexpr,
    D4: tl.constexpr,
    D2: tl.constexpr,
    D1: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    BOUNDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    FAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """Scan of BLOCK_N queries; tiles of 16 BLOCKS rows, dealt out in turn. `base` and `query` are
    int8 here.
    """
    pid = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    here = n < B
    live = here[None, :]
    M: tl.constexpr = BLOCKS * 16
    WORDS: tl.constexpr = D4 // 8 + D2 // 16 + D1 // 32
    P4: tl.constexpr = (D4 // 16 + _PAD - 1) // _PAD * _PAD * 4
    P2: tl.constexpr = (D2 // 16 + _PAD - 1) // _PAD * _PAD * 4
    P1: tl.constexpr = (D1 // 16 + _PAD - 1) // _PAD * _PAD * 4
    PB: tl.constexpr = (D1 // 32 + _PAD - 1) // _PAD * _PAD * 8
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    own = numbers + n * _NUMBERS
    q = query + n * ((P4 + P2 + P1 + PB) * 4)
    high_q = _operands(q, here, 0, D4 // 16, 2, BLOCK_W)
    low_q = _operands(q, here, D4 // 16, D4 // 16, 2, BLOCK_W)
    two_q = _operands(q + P4 * 4, here, D4 // 8, D2 // 16, 2, BLOCK_W)
    one_q = _operands(q + (P4 + P2 + P1) * 4, here, D4 // 8 + D2 // 16, D1 // 32, 1, BLOCK_W)
    along, shift = tl.load(own + _ALONG, here, 0), tl.load(own + _SHIFT, here, 0)
    floor = tl.load(own + _FLOOR, here, 0)
    r = tl.arange(0, 64)
    top = tl.full([M, BLOCK_N], _MINUS_INFINITY, tl.int32)
    tiles = (nblk + BLOCKS - 1) // BLOCKS
    lane = tl.arange(0, M)
    direct, scale4, scale2, scale1 = _tile_numbers(direction, scale, pid * M + lane, V, D4, D2, D1)
    for tile in tl.range(pid, tiles, tl.num_programs(0), num_stages=STAGES):
        number = (tile - pid) // tl.num_programs(0)
        blk = tile * BLOCKS + tl.arange(0, BLOCKS)
        rows = tile * M + lane
        inside = rows < V
        following = _tile_numbers(direction, scale, rows + tl.num_programs(0) * M, V, D4, D2, D1)
        x_ptr = base + blk.to(tl.int64)[:, None, None] * (WORDS * 64) + r[None, None, :]
        keep = (blk < nblk)[:, None, None]
        estimate = direct[:, None] * along[None, :] + shift[None, :]
        rs4, rs2 = scale4.to(tl.float32), scale2.to(tl.float32)
        rs1 = scale1.to(tl.float32)
        if D4 > 0:
            acc = tl.zeros([M, BLOCK_N], tl.int32)
            acc = _run_batch(x_ptr, keep, high_q, acc, 0, D4 // 16, WORDS, 2, BLOCKS, BLOCK_W, FAST)
            acc = _run_batch(
                x_ptr, keep, low_q, acc * 4, D4 // 16, D4 // 16, WORDS, 2, BLOCKS, BLOCK_W, FAST
            )
            estimate = _add_segment(estimate, acc, rs4, constants + 1, own, here, 0)
        if D2 > 0:
            acc = tl.zeros([M, BLOCK_N], tl.int32)
            acc = _run_batch(
                x_ptr, keep, two_q, acc, D4 // 8, D2 // 16, WORDS, 2, BLOCKS, BLOCK_W, FAST
            )
            estimate = _add_segment(estimate, acc, rs2, constants + 8 + 1, own, here, 1)
        if D1 > 0:
            acc = tl.zeros([M, BLOCK_N], tl.int32)
            acc = _run_batch(
                x_ptr, keep, one_q, acc, D4 // 8 + D2 // 16, D1 // 32, WORDS, 1, BLOCKS, BLOCK_W,
                FAST,
            )  # fmt: skip
            estimate = _add_segment(estimate, acc, rs1, constants + 16 + 1, own, here, 2)
        if HAS_BIAS:
            place = bias + n[None, :].to(tl.int64) * bias_stride + rows[:, None]
            estimate += tl.load(place, inside[:, None] & live, 0)
        if HAS_NOISE:
            pair = tile * (M // 2) + tl.arange(0, M // 2)
            even, odd = gumbel_pairs(
                tl.load(seeds + n, here, 0)[None, :], tl.load(steps + n, here, 0)[None, :],
                pair[:, None],
            )  # fmt: skip
            noise = tl.reshape(tl.permute(tl.join(even, odd), [0, 2, 1]), [M, BLOCK_N])
            estimate += tl.load(temperature + n, here, 0)[None, :] * noise
        place = scores + n[None, :].to(tl.int64) * V + rows[:, None]
        if BOUNDS:
            squares = tl.zeros([M, BLOCK_N], tl.float32) + floor[None, :]
            if D4 > 0:
                squares += (rs4 * rs4)[:, None] * tl.load(own + _SPREAD, here, 0)[None, :]
            if D2 > 0:
                squares += (rs2 * rs2)[:, None] * tl.load(own + _SPREAD + 1, here, 0)[None, :]
            if D1 > 0:
                squares += (rs1 * rs1)[:, None] * tl.load(own + _SPREAD + 2, here, 0)[None, :]
            tl.store(place, estimate + tl.sqrt(squares), inside[:, None] & live)
        else:
            tl.store(place, estimate, inside[:, None] & live)
        estimate = tl.where(inside[:, None], estimate, float("-inf"))
        top = tl.maximum(top, (ordered(estimate) | _TILE_BITS) ^ (number & _TILE_BITS))
        direct, scale4, scale2, scale1 = following
    best = tl.max(top, 0)
    where = tl.arange(0, M)
    place = tl.max(tl.where(top == best[None, :], where[:, None], -1), 0)
    row = (pid + ((best & _TILE_BITS) ^ _TILE_BITS) * tl.num_programs(0)) * M + place
    row = tl.minimum(row, V - 1)
    old = unordered(tl.atomic_max(tops + n, best, here, sem="relaxed"))
    error = tl.sqrt(spread_of(scale, own, row, here, V, _VARIANCE, D4, D2, D1))
    near = here & (unordered(best) > old - error)
    if tl.max(near.to(tl.int32), 0) > 0:
        total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for start in tl.static_range(0, D_HIDDEN, BLOCK_D):
            i = start + tl.arange(0, BLOCK_D)
            keep = near[:, None] & (i < D_HIDDEN)[None, :]
            h = tl.load(hidden + n[:, None].to(tl.int64) * D_HIDDEN + i[None, :], keep, 0)
            w = tl.load(weight + row[:, None].to(tl.int64) * D_HIDDEN + i[None, :], keep, 0)
            total += h.to(tl.float32) * w.to(tl.float32)
        score = tl.sum(total, 1)
        if HAS_BIAS:
            score += tl.load(bias + n.to(tl.int64) * bias_stride + row, near, 0)
        if HAS_NOISE:
            noise = gumbel_at(tl.load(seeds + n, here, 0), tl.load(steps + n, here, 0), row)
            score += tl.load(temperature + n, here, 0) * noise
        tl.atomic_max(pilots + n, packed(score, row), near, sem="relaxed")
