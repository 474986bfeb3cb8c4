"""Scan of one query in Triton: integer dot products on packed bytes (`dp4a`).

The best row of each program is scored exactly if it may be the best of all ("pilot"), so that the
selection compares with an exact score. What is stored are estimates, or upper bounds s + spread
where only the winner counts.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flashhead.ops.noise.triton import gumbel_at, gumbel_pairs
from flashhead.ops.scan.triton_parts import (
    ALONG,
    FLOOR,
    MULT,
    NUMBERS,
    PAD,
    QSUM,
    SHIFT,
    SPREAD,
    VARIANCE,
    dot_one_bit,
    dot_two_bits,
    exact_dot,
    ordered,
    packed,
    spread_of,
    unordered,
)


@triton.jit
def _load_word(x_ptr, keep, word):
    """One word of all rows of a tile."""
    return tl.load(x_ptr + word * 16, keep, 0, eviction_policy="evict_first")


@triton.jit
def _add_two_bits(x, at, low, high, WORDS: tl.constexpr, FAST: tl.constexpr):
    """Add a two-bit word of the rows to their sums; `at` is its first field in the query."""
    PADDED: tl.constexpr = (WORDS + PAD - 1) // PAD * PAD
    return dot_two_bits(
        x, tl.load(at), tl.load(at + PADDED), tl.load(at + 2 * PADDED), tl.load(at + 3 * PADDED),
        low, high, FAST,
    )  # fmt: skip


@triton.jit
def _add_one_bit(x, at, low, high, WORDS: tl.constexpr, FAST: tl.constexpr):
    """Add a one-bit word of the rows to their sums."""
    PADDED: tl.constexpr = (WORDS + PAD - 1) // PAD * PAD
    return dot_one_bit(
        x, tl.load(at), tl.load(at + PADDED), tl.load(at + 2 * PADDED), tl.load(at + 3 * PADDED),
        tl.load(at + 4 * PADDED), tl.load(at + 5 * PADDED), tl.load(at + 6 * PADDED),
        tl.load(at + 7 * PADDED), low, high, FAST,
    )  # fmt: skip


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
    P4: tl.constexpr = (D4 // 16 + PAD - 1) // PAD * PAD * 4
    P2: tl.constexpr = (D2 // 16 + PAD - 1) // PAD * PAD * 4
    P1: tl.constexpr = (D1 // 16 + PAD - 1) // PAD * PAD * 4
    PB: tl.constexpr = (D1 // 32 + PAD - 1) // PAD * PAD * 8
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
    own = numbers + n * NUMBERS
    q = query + n * (P4 + P2 + P1 + PB)
    estimate = tl.load(own + ALONG) * direct + tl.load(own + SHIFT)
    squares = tl.zeros([BLOCKS, 16], tl.float32) + tl.load(own + FLOOR)
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
        dot -= tl.load(constants + 1) * tl.load(own + QSUM)
        estimate += rs * (tl.load(own + MULT) * dot)
        squares += rs * rs * tl.load(own + SPREAD)
    if D2 > 0:
        dot = low2.to(tl.float32) + high2.to(tl.float32) * 0.25
        rs = scale2.to(tl.float32)
        dot -= tl.load(constants + 8 + 1) * tl.load(own + QSUM + 1)
        estimate += rs * (tl.load(own + MULT + 1) * dot)
        squares += rs * rs * tl.load(own + SPREAD + 1)
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
        dot -= tl.load(constants + 16 + 1) * tl.load(own + QSUM + 2)
        estimate += rs * (tl.load(own + MULT + 2) * dot)
        squares += rs * rs * tl.load(own + SPREAD + 2)
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
    error = tl.sqrt(spread_of(scale, own, row, row >= 0, V, VARIANCE, D4, D2, D1))
    if unordered(best) > old - error:
        score = exact_dot(
            hidden + n.to(tl.int64) * D_HIDDEN, weight, bias + n.to(tl.int64) * bias_stride, row,
            D_HIDDEN, BLOCK_D, HAS_BIAS,
        )  # fmt: skip
        if HAS_NOISE:
            drawn = gumbel_at(tl.load(seeds + n), tl.load(steps + n), row)
            score += tl.load(temperature + n) * drawn
        tl.atomic_max(pilots + n, packed(score, row), sem="relaxed")
