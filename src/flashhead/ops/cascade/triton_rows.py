"""What the selection and complete logits share in Triton: lists of rows, their planes and weights.

A program has every k-th block of 16 rows of all queries, so that the rows of a query that is hard
to decide are spread over all programs. Those that go on are compacted to one list; all planes of a
listed row are read at once, one round trip to memory instead of one a plane. No list can overflow:
a program lists at most its own rows, so in the worst case every row is read exactly, which is the
dense completion.
"""

import triton
import triton.language as tl

from flashhead.ops.noise.triton import gumbel_at
from flashhead.ops.scan.triton_parts import (
    EMPTY,
    MULT,
    NUMBERS,
    PAD,
    QSUM,
    SPREAD,
    SPREAD_FINE,
    dot_two_bits,
    is_last,
    packed,
    row_of,
    score_of,
)

ROW_BITS = tl.constexpr(23)
"""A listed row is its number, with the query in the bits above."""
ROW_MASK = tl.constexpr((1 << 23) - 1)


@triton.jit
def _plane_words(words, keep, FIRST: tl.constexpr, DIMS: tl.constexpr):
    """The words of a segment in one plane of some rows: int32 [rows, words]."""
    WORDS: tl.constexpr = (DIMS + 63) // 64 * 4
    word = tl.arange(0, triton.next_power_of_2(WORDS))
    inside = keep[:, None] & (word < WORDS)[None, :]
    return tl.load(words[:, None] + FIRST + word[None, :], inside, 0)


@triton.jit
def _query_words(q, DIMS: tl.constexpr, MANY: tl.constexpr):
    """The same words of the query, field by field; MANY: of each row's own query."""
    WORDS: tl.constexpr = (DIMS + 63) // 64 * 4
    PADDED: tl.constexpr = (DIMS // 16 + PAD - 1) // PAD * PAD
    word = tl.arange(0, triton.next_power_of_2(WORDS))[None, :]
    at = (q[:, None] if MANY else q) + word
    inside = word < WORDS
    return (
        tl.load(at, inside, 0),
        tl.load(at + PADDED, inside, 0),
        tl.load(at + 2 * PADDED, inside, 0),
        tl.load(at + 3 * PADDED, inside, 0),
    )


@triton.jit
def _plane_part(x, q, rs, own, SLOT: tl.constexpr, FAST: tl.constexpr):
    """What a segment of a plane adds to estimates, but for the plane's factor 1 / 4^j."""
    low, high = dot_two_bits(x, q[0], q[1], q[2], q[3], x * 0, x * 0, FAST)
    dot = tl.sum(low.to(tl.float32) + high.to(tl.float32) * 0.25, 1)
    mult, qsum = tl.load(own + MULT + SLOT), tl.load(own + QSUM + SLOT)
    return rs.to(tl.float32) * (mult * (dot - 1.5 * qsum))


@triton.jit
def _packed_words(D4: tl.constexpr, D2: tl.constexpr, D1: tl.constexpr):
    """Words of a packed query."""
    two_bits = (
        (D4 // 16 + PAD - 1) // PAD + (D2 // 16 + PAD - 1) // PAD + (D1 // 16 + PAD - 1) // PAD
    )
    return two_bits * PAD * 4 + (D1 // 32 + PAD - 1) // PAD * PAD * 8


@triton.jit
def _query_of(entry, MANY: tl.constexpr):
    """Number of the hidden state of a listed row."""
    return entry >> ROW_BITS if MANY else 0


@triton.jit
def own_rows(
    first_query, start, B, V, SHARE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr
):
    """Queries [BLOCK_N, 1] and rows [1, BLOCK_V] of a program's next tile, and which of them there
    are: every k-th block of 16 rows for k programs.
    """
    q = (first_query + tl.arange(0, BLOCK_N))[:, None]
    at = (start + tl.arange(0, BLOCK_V))[None, :]
    row = ((at // 16) * tl.num_programs(0) + tl.program_id(0)) * 16 + at % 16
    return q, row, (q < B) & (at < SHARE) & (row < V)


@triton.jit
def append_rows(list_ptr, length, q, row, alive):
    """Append the rows alive, few of many: a place each from the program's own counter."""
    place = tl.atomic_add(length + (q + row) * 0, 1, alive, sem="relaxed")
    tl.store(list_ptr + place, row | (q << ROW_BITS), alive)


@triton.jit
def count_read(read, n, listed, count, start, BLOCK_B: tl.constexpr):
    """Count the listed rows of each query."""
    if BLOCK_B > 1:
        each = tl.histogram(tl.where(listed, n, BLOCK_B), 2 * BLOCK_B)
        queries = tl.arange(0, 2 * BLOCK_B)
        here = (each > 0) & (queries < BLOCK_B)
        tl.atomic_add(read + queries * 4, each, here, sem="relaxed")
    elif start == 0:
        tl.atomic_add(read, count, sem="relaxed")


@triton.jit
def refined_parts(
    listed, count, refine, scale, numbers, query, V, D4: tl.constexpr, D2: tl.constexpr,
    D1: tl.constexpr, PLANES: tl.constexpr, BLOCK_R: tl.constexpr, MANY: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """What all planes add to the estimates of the rows listed; the last plane's error factors; the
    squared spreads (but for the floor) at the base and with all planes (but for the factor).

    All planes of all rows travel together, as PLANES * BLOCK_R rows, before anything is computed.
    """
    W4: tl.constexpr = (D4 + 63) // 64 * 4
    W2: tl.constexpr = (D2 + 63) // 64 * 4
    W1: tl.constexpr = (D1 + 63) // 64 * 4
    ROW: tl.constexpr = W4 + W2 + W1 + 1
    P4: tl.constexpr = (D4 // 16 + PAD - 1) // PAD * PAD * 4
    P2: tl.constexpr = (D2 // 16 + PAD - 1) // PAD * PAD * 4
    S2: tl.constexpr = 1 if D4 > 0 else 0
    S1: tl.constexpr = S2 + (1 if D2 > 0 else 0)
    j = tl.arange(0, PLANES * BLOCK_R)
    plane, at = j // BLOCK_R, j % BLOCK_R
    keep = at < count
    entry = tl.load(listed + at, keep, 0)
    rows, n = entry & ROW_MASK, _query_of(entry, MANY)
    own, q = numbers + n * NUMBERS, query + n * _packed_words(D4, D2, D1)
    words = refine + (plane.to(tl.int64) * V + rows) * ROW
    if D4 > 0:
        x4, rs4 = _plane_words(words, keep, 0, D4), tl.load(scale + rows, keep, 0)
    if D2 > 0:
        x2, rs2 = _plane_words(words, keep, W4, D2), tl.load(scale + S2 * V + rows, keep, 0)
    if D1 > 0:
        x1, rs1 = _plane_words(words, keep, W4 + W2, D1), tl.load(scale + S1 * V + rows, keep, 0)
    factor = tl.load(words + ROW - 1, keep, 0).to(tl.float32, bitcast=True)
    added = tl.zeros([PLANES * BLOCK_R], tl.float32)
    spread = tl.zeros([PLANES * BLOCK_R], tl.float32)
    fine = tl.zeros([PLANES * BLOCK_R], tl.float32)
    if D4 > 0:
        square = rs4.to(tl.float32) * rs4.to(tl.float32)
        spread += square * tl.load(own + SPREAD)
        fine += square * tl.load(own + SPREAD_FINE)
        added += _plane_part(x4, _query_words(q, D4, MANY), rs4, own, 0, FAST)
    if D2 > 0:
        square = rs2.to(tl.float32) * rs2.to(tl.float32)
        spread += square * tl.load(own + SPREAD + 1)
        fine += square * tl.load(own + SPREAD_FINE + 1)
        added += _plane_part(x2, _query_words(q + P4, D2, MANY), rs2, own, 1, FAST)
    if D1 > 0:
        square = rs1.to(tl.float32) * rs1.to(tl.float32)
        spread += square * tl.load(own + SPREAD + 2)
        fine += square * tl.load(own + SPREAD_FINE + 2)
        added += _plane_part(x1, _query_words(q + P4 + P2, D1, MANY), rs1, own, 2, FAST)
    last = plane == PLANES - 1
    shape: tl.constexpr = [PLANES, BLOCK_R]
    return (
        tl.sum(tl.reshape(added * tl.where(plane == 0, 0.25, 0.0625), shape), 0),
        tl.sum(tl.reshape(tl.where(last, factor, 0.0), shape), 0),
        tl.sum(tl.reshape(tl.where(last, spread, 0.0), shape), 0),
        tl.sum(tl.reshape(tl.where(last, fine, 0.0), shape), 0),
    )


@triton.jit
def exact_rows(
    hidden, weight, bias, bias_stride, n, rows, keep, D_HIDDEN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """Exact scores of the rows kept, each with its own hidden state n: float32[BLOCK_R]."""
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(0, D_HIDDEN, BLOCK_D):
        i = (start + tl.arange(0, BLOCK_D))[None, :]
        if MANY:
            state = hidden + n.to(tl.int64)[:, None] * D_HIDDEN + i
            h = tl.load(state, keep[:, None] & (i < D_HIDDEN), 0).to(tl.float32)
        else:
            h = tl.load(hidden + i, i < D_HIDDEN, 0).to(tl.float32)
        w = tl.load(
            weight + rows.to(tl.int64)[:, None] * D_HIDDEN + i,
            keep[:, None] & (i < D_HIDDEN),
            0,
        )
        total += w.to(tl.float32) * h
    score = tl.sum(total, 1)
    if HAS_BIAS:
        own = bias + n.to(tl.int64) * bias_stride if MANY else bias
        score += tl.load(own + rows, keep, 0)
    return score


@triton.jit
def pilot_of(
    bests, count, hidden, weight, bias, temperature, seeds, steps, D_HIDDEN: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_NOISE: tl.constexpr,
):  # fmt: skip
    """The best exact score, `packed`, of a few rows with high estimates of a single query, and the
    best estimate. Every program does the same, which is faster than waiting for one.
    """
    FEW: tl.constexpr = 4 if BLOCK_D <= 2048 else 2
    k = tl.arange(0, BLOCK_K)
    key = tl.max(tl.reshape(tl.load(bests + k, k < count, EMPTY), [BLOCK_K // FEW, FEW]), 0)
    listed = key != EMPTY
    row = tl.where(listed, row_of(key), 0)
    score = exact_rows(
        hidden, weight, bias, 0, row * 0, row, listed, D_HIDDEN, FEW, BLOCK_D, HAS_BIAS, False
    )
    if HAS_NOISE:
        noise = gumbel_at(tl.load(seeds), tl.load(steps), row)
        score += tl.load(temperature) * noise
    return tl.max(tl.where(listed, packed(score, row), EMPTY), 0), score_of(tl.max(key, 0))


@triton.jit
def finish(
    B, pilots, winners, done, read, answers, totals, V, fixed_bytes, plane_bytes, row_bytes,
    PLANES: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """The last program writes the answers int64[8, B] (rows: `triton`)."""
    if is_last(done, tl.program_id(0), tl.num_programs(0), 16):
        n = tl.arange(0, BLOCK_B)
        here = n < B
        first = tl.load(pilots + n, here, EMPTY)
        final = tl.maximum(tl.load(winners + n, here, EMPTY, cache_modifier=".cg"), first)
        found = final != EMPTY
        score = score_of(final)
        certified = (found & (tl.abs(score) < 3.0e38)).to(tl.int64)
        planes = tl.load(read + n * 4, here, 0, cache_modifier=".cg").to(tl.int64)
        exact = tl.load(read + n * 4 + 1, here, 0, cache_modifier=".cg") + found.to(tl.int32)
        exact = exact.to(tl.int64)
        size = tl.where(here, fixed_bytes + PLANES * planes * plane_bytes + exact * row_bytes, 0)
        fallback = (exact * 2 > V).to(tl.int64)
        out = answers + n
        tl.store(out, tl.where(found, row_of(final), 0).to(tl.int64), here)
        tl.store(out + B, certified, here)
        tl.store(out + 2 * B, fallback, here)
        tl.store(out + 3 * B, exact, here)
        tl.store(out + 4 * B, size, here)
        tl.store(out + 5 * B, score.to(tl.int32, bitcast=True).to(tl.int64), here)
        tl.store(out + 6 * B, planes, here)
        tl.store(out + 7 * B, first, here)
        tl.atomic_add(totals, B.to(tl.int64), sem="relaxed")
        tl.atomic_add(totals + 1, tl.sum(certified, 0), sem="relaxed")
        tl.atomic_add(totals + 2, tl.sum(fallback, 0), sem="relaxed")
        tl.atomic_add(totals + 3, tl.sum(exact, 0), sem="relaxed")
        tl.atomic_add(totals + 4, tl.sum(size, 0), sem="relaxed")
