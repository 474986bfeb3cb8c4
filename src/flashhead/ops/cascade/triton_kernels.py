"""Selection after the scan in Triton: who may win, all planes of their codes, exact rows.

Greedy and sampling, `_select_kernel`, one launch: a program has every k-th block of 16 rows of all
queries, so that the rows of a query that is hard to decide are spread over all programs. Rows whose
bound reaches the best exact score of their query ("pilot") are compacted to one list, read all
planes at once (one round trip to memory instead of one a plane), and those that still reach it
their weights. No list can overflow: a program lists at most its own rows, so in the worst case
every row is read exactly, which is the dense completion.

Complete logits, three launches: `_mass_kernel` counts rows by what leaving them at their estimate
would cost (formulas: `api`), `_refine_kernel` reads the planes of those that cost too much and
counts again, `_exact_kernel` reads the weights of those that still do.

Costs are counted in bins of 1 / PER_NAT nat of their logarithm and a row counts with the upper edge
of its bin, so what is left never costs more than the budget allows.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flashhead.ops.noise.triton import gumbel_at
from flashhead.ops.scan.triton_parts import (
    EMPTY,
    FLOOR,
    MULT,
    NUMBERS,
    PAD,
    QSUM,
    SPREAD,
    SPREAD_FINE,
    VARIANCE,
    VARIANCE_FINE,
    dot_two_bits,
    exact_dot,
    is_last,
    ordered,
    packed,
    row_of,
    score_of,
    spread_of,
    unordered,
)

BINS = tl.constexpr(128)
"""Bins of costs; the last one is for rows that cost nothing."""
FREE = tl.constexpr(127)
PER_NAT = tl.constexpr(2.5)
HIGHEST = tl.constexpr(4.0)
"""Logarithm of the upper edge of bin 0: no row costs more (`_growth`)."""
BASE_SHARDS = tl.constexpr(16)
"""Atomics on one address wait for each other: programs count in one of so many copies."""
FINE_SHARDS = tl.constexpr(4)
SUMS = tl.constexpr(4096)
"""int32 of a query: counts at the base, counts of refined rows, then its mass as int64."""
MASS_AT = tl.constexpr((16 + 4) * 128 // 2)
"""Where the mass begins, as int64."""
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
def _own_rows(
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
def _append(list_ptr, length, q, row, alive):
    """Append the rows alive, few of many: a place each from the program's own counter."""
    place = tl.atomic_add(length + (q + row) * 0, 1, alive, sem="relaxed")
    tl.store(list_ptr + place, row | (q << ROW_BITS), alive)


@triton.jit
def _count_read(read, n, listed, count, start, BLOCK_B: tl.constexpr):
    """Count the listed rows of each query."""
    if BLOCK_B > 1:
        each = tl.histogram(tl.where(listed, n, BLOCK_B), 2 * BLOCK_B)
        queries = tl.arange(0, 2 * BLOCK_B)
        here = (each > 0) & (queries < BLOCK_B)
        tl.atomic_add(read + queries * 4, each, here, sem="relaxed")
    elif start == 0:
        tl.atomic_add(read, count, sem="relaxed")


@triton.jit
def _refined(
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
def _exact_rows(
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
def _pilot_of(
    keys, count, hidden, weight, bias, temperature, seeds, steps, D_HIDDEN: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_NOISE: tl.constexpr,
):  # fmt: skip
    """The best exact score, `packed`, of a few rows with high estimates of a single query, and the
    best estimate. Every program does the same, which is faster than waiting for one.
    """
    FEW: tl.constexpr = 4 if BLOCK_D <= 2048 else 2
    k = tl.arange(0, BLOCK_K)
    key = tl.max(tl.reshape(tl.load(keys + k, k < count, EMPTY), [BLOCK_K // FEW, FEW]), 0)
    listed = key != EMPTY
    row = tl.where(listed, row_of(key), 0)
    score = _exact_rows(
        hidden, weight, bias, 0, row * 0, row, listed, D_HIDDEN, FEW, BLOCK_D, HAS_BIAS, False
    )
    if HAS_NOISE:
        noise = gumbel_at(tl.load(seeds), tl.load(steps), row)
        score += tl.load(temperature) * noise
    return tl.max(tl.where(listed, packed(score, row), EMPTY), 0), score_of(tl.max(key, 0))


@triton.jit
def _finish(
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


@triton.jit(do_not_specialize=["B"])
def _select_kernel(
    bounds,
    hidden,
    weight,
    bias,
    bias_stride,
    temperature,
    seeds,
    steps,
    refine,
    scale,
    query,
    numbers,
    lists,
    lengths,
    keys,
    pilots,
    winners,
    done,
    read,
    answers,
    totals,
    keys_count,
    B,
    V,
    fixed_bytes,
    plane_bytes,
    row_bytes,
    D_HIDDEN: tl.constexpr,
    D4: tl.constexpr,
    D2: tl.constexpr,
    D1: tl.constexpr,
    PLANES: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
    FAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """All rows that may win, finer and exactly; then the winner of each query."""
    MANY: tl.constexpr = BLOCK_B > 1
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if BLOCK_K > 0:  # a single query, whose pilot is not known yet
        _, own_row, present = _own_rows(0, 0, B, V, SHARE, BLOCK_N, BLOCK_V)
        own_bounds = tl.load(bounds + own_row, present, float("-inf"))
        pilot, _ = _pilot_of(
            keys, keys_count, hidden, weight, bias, temperature, seeds, steps, D_HIDDEN, BLOCK_K,
            BLOCK_D, HAS_BIAS, HAS_NOISE,
        )  # fmt: skip
        tl.store(pilots, pilot)  # the same by every program
    list_ptr = lists + tl.program_id(0).to(tl.int64) * (B * SHARE)
    length = lengths + tl.program_id(0)
    for first_query in range(0, B, BLOCK_N):
        for start in range(0, SHARE, BLOCK_V):
            q, row, inside = _own_rows(first_query, start, B, V, SHARE, BLOCK_N, BLOCK_V)
            if BLOCK_K > 0:
                bound, first = own_bounds, pilot
            else:
                bound = tl.load(bounds + q.to(tl.int64) * V + row, inside, float("-inf"))
                first = tl.load(pilots + q, q < B, EMPTY)
            alive = inside & (bound >= score_of(first)) & (row != row_of(first))
            _append(list_ptr, length, q, row, alive)
    tl.debug_barrier()
    count = tl.load(length, cache_modifier=".cg")
    if count > 0:
        for start in range(0, count, BLOCK_R):
            j = start + tl.arange(0, BLOCK_R)
            listed = j < count
            entry = tl.load(list_ptr + j, listed, 0)
            row, n = entry & ROW_MASK, entry >> ROW_BITS
            _count_read(read, n, listed, count, start, BLOCK_B)
            value = tl.load(bounds + n.to(tl.int64) * V + row, listed, float("-inf"))
            target = score_of(pilot if BLOCK_K > 0 else tl.load(pilots + n))
            floor = tl.load(numbers + n * NUMBERS + FLOOR)
            added, factor, base, spread = _refined(
                list_ptr + start, count - start, refine, scale, numbers, query, V, D4, D2, D1,
                PLANES, BLOCK_R, MANY, FAST,
            )  # fmt: skip
            value -= tl.sqrt(base + floor)
            if not DETERMINISTIC:
                spread *= factor
            can_win = listed & (value + added + tl.sqrt(spread + floor) >= target)
            place = tl.cumsum(can_win.to(tl.int32), 0)
            left = tl.sum(can_win.to(tl.int32), 0)
            if left > 0:
                tl.atomic_add(read + n * 4 + 1, 1, can_win, sem="relaxed")
            for k in range(left):
                one = tl.sum(tl.where(can_win & (place == k + 1), entry, 0), 0)
                which, at = one >> ROW_BITS, one & ROW_MASK
                score = exact_dot(
                    hidden + which.to(tl.int64) * D_HIDDEN, weight,
                    bias + which.to(tl.int64) * bias_stride, at, D_HIDDEN, BLOCK_D, HAS_BIAS,
                )  # fmt: skip
                if HAS_NOISE:
                    noise = gumbel_at(tl.load(seeds + which), tl.load(steps + which), at)
                    score += tl.load(temperature + which) * noise
                tl.atomic_max(winners + which, packed(score, at), sem="relaxed")
        tl.debug_barrier()
        tl.store(length, 0)
    _finish(
        B, pilots, winners, done, read, answers, totals, V, fixed_bytes, plane_bytes, row_bytes,
        PLANES, BLOCK_B,
    )  # fmt: skip


# ---------------------------------------------------------------- complete logits


@triton.jit
def _growth(x):
    """exp(x) - 1 by its first four terms, x at most 4."""
    x = tl.minimum(x, 4.0)
    return x * (1.0 + x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0))))


@triton.jit
def _bin_of(gap, half, free):
    """Bin of the cost of leaving rows `gap` nats below the peak, half the variance known; free:
    those that cost nothing.
    """
    place = (HIGHEST + gap - tl.log(_growth(half))) * PER_NAT
    place = tl.minimum(tl.maximum(place, 0.0), 126.0).to(tl.int32)
    return tl.where(free, FREE, place)


@triton.jit
def _cut_of(counts, allowed):
    """First bin whose rows and all beyond may be left, and what these cost at most.

    Args:
        counts: int32[n, BINS].
        allowed: float32[n].
    """
    b = tl.arange(0, BINS)
    edge = tl.where(b < FREE, tl.exp(HIGHEST - b.to(tl.float32) / PER_NAT), 0.0)
    lost = tl.cumsum(counts.to(tl.float32) * edge[None, :], 1, reverse=True)
    first = tl.min(tl.where(lost <= allowed[:, None], b[None, :], BINS), 1)
    return first, tl.sum(tl.where(b[None, :] == first[:, None], lost, 0.0), 1)


@triton.jit
def _peak_of(first, tops, n):
    """What gaps are measured from: the best estimate, or the best exact score if that is higher."""
    return tl.maximum(unordered(tl.load(tops + n)), score_of(first))


@triton.jit(do_not_specialize=["SHARE_MASS"])
def _mass_kernel(
    logits,
    scale,
    hidden,
    weight,
    bias,
    numbers,
    keys,
    pilots,
    tops,
    sums,
    masses,
    cuts,
    done,
    keys_count,
    V,
    budget,
    SHARE_MASS,
    D_HIDDEN: tl.constexpr,
    D4: tl.constexpr,
    D2: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Counts by cost and mass of all rows at their base estimates; the cut of query program_id(1).

    `cuts` is float32[n, 4]: first bin that is left at the base, nats times mass that refined rows
    may cost, first bin that is left after refinement.
    """
    pid, n = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    own = numbers + n * NUMBERS
    if BLOCK_K > 0:  # a single query, whose pilot is not known yet
        first, top = _pilot_of(
            keys, keys_count, hidden, weight, bias, hidden, hidden, hidden, D_HIDDEN, BLOCK_K,
            BLOCK_D, HAS_BIAS, False,
        )  # fmt: skip
        if pid == 0:
            tl.store(pilots, first)
            tl.store(tops, ordered(top))
        peak = tl.maximum(top, score_of(first))
    else:
        first = tl.load(pilots + n)
        peak = _peak_of(first, tops, n)
    floor = tl.load(own + FLOOR)
    counts = tl.zeros([BINS], tl.int32)
    mass = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, SHARE_MASS, BLOCK_V):
        row = pid * SHARE_MASS + start + tl.arange(0, BLOCK_V)
        inside = row < V
        value = tl.load(logits + n.to(tl.int64) * V + row, inside, float("-inf"))
        half = 0.5 * (spread_of(scale, own, row, inside, V, VARIANCE, D4, D2, D1) + floor)
        gap = peak - value
        # the pilot is known exactly: it keeps its own mass and costs nothing
        known = row == row_of(first)
        mass += tl.where(known, tl.exp(score_of(first) - peak), tl.exp(-gap - half))
        counts += tl.histogram(_bin_of(gap, half, known | (value == float("-inf"))), BINS)
    shard = pid % BASE_SHARDS
    b = tl.arange(0, BINS)
    tl.atomic_add(sums + n * SUMS + shard * BINS + b, counts, counts > 0, sem="relaxed")
    # 32.32 bits: the sum is the same whatever the order
    fixed = (tl.sum(mass, 0) * 4294967296.0).to(tl.int64)
    own_masses = masses + n * (SUMS // 2) + MASS_AT
    tl.atomic_add(own_masses + shard, fixed, sem="relaxed")
    if is_last(done + 17 * n, pid, tl.num_programs(0), 16):
        s = tl.arange(0, BASE_SHARDS)
        all_sums = sums + n * SUMS + s[:, None] * BINS + b[None, :]
        total = tl.sum(tl.load(all_sums, cache_modifier=".cg"), 0)
        whole = tl.sum(tl.load(own_masses + s, cache_modifier=".cg"), 0)
        # as a tensor of one query
        allowed = budget * (whole.to(tl.float32) / 4294967296.0) + tl.zeros([1], tl.float32)
        cut, spent = _cut_of(total[None, :], 0.5 * allowed)
        place = cuts + n * 4 + tl.arange(0, 1)
        tl.store(place, cut.to(tl.float32))
        tl.store(place + 1, tl.maximum(allowed - spent, 0.0))


@triton.jit(do_not_specialize=["B"])
def _refine_kernel(
    logits,
    refine,
    scale,
    query,
    numbers,
    pilots,
    tops,
    sums,
    cuts,
    lists,
    lengths,
    done,
    read,
    B,
    V,
    D4: tl.constexpr,
    D2: tl.constexpr,
    D1: tl.constexpr,
    PLANES: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    FAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rows that cost too much or that can win, with all planes; their counts by cost, the cuts."""
    MANY: tl.constexpr = BLOCK_B > 1
    pid = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    list_ptr = lists + pid.to(tl.int64) * (B * SHARE)
    length = lengths + pid
    for first_query in range(0, B, BLOCK_N):
        for start in range(0, SHARE, BLOCK_V):
            q, row, inside = _own_rows(first_query, start, B, V, SHARE, BLOCK_N, BLOCK_V)
            n = tl.minimum(q, B - 1)
            own, first = numbers + n * NUMBERS, tl.load(pilots + n)
            floor = tl.load(own + FLOOR)
            value = tl.load(logits + q.to(tl.int64) * V + row, inside, float("-inf"))
            variance = spread_of(scale, own, row, row < V, V, VARIANCE, D4, D2, D1) + floor
            spread = spread_of(scale, own, row, row < V, V, SPREAD, D4, D2, D1) + floor
            cost = _bin_of(_peak_of(first, tops, n) - value, 0.5 * variance, value != value)
            needed = cost.to(tl.float32) < tl.load(cuts + n * 4)
            needed |= value + tl.sqrt(spread) >= score_of(first)
            alive = inside & needed & (row != row_of(first)) & (value > float("-inf"))
            _append(list_ptr, length, q, row, alive)
    tl.debug_barrier()
    count = tl.load(length, cache_modifier=".cg")
    shard = BASE_SHARDS + pid % FINE_SHARDS
    for start in range(0, count, BLOCK_R):
        j = start + tl.arange(0, BLOCK_R)
        listed = j < count
        entry = tl.load(list_ptr + j, listed, 0)
        row, n = entry & ROW_MASK, entry >> ROW_BITS
        _count_read(read, n, listed, count, start, BLOCK_B)
        own = numbers + n * NUMBERS
        place = logits + n.to(tl.int64) * V + row
        added, factor, _base, _fine = _refined(
            list_ptr + start, count - start, refine, scale, numbers, query, V, D4, D2, D1, PLANES,
            BLOCK_R, MANY, FAST,
        )  # fmt: skip
        fine = tl.load(place, listed, 0) + added
        tl.store(place, fine, listed)
        variance = spread_of(scale, own, row, listed, V, VARIANCE_FINE, D4, D2, D1) * factor
        gap = tl.maximum(_peak_of(tl.load(pilots + n), tops, n) - fine, 0.0)
        cost = _bin_of(gap, 0.5 * (variance + tl.load(own + FLOOR)), fine != fine)
        tl.atomic_add(sums + n * SUMS + shard * BINS + cost, 1, listed, sem="relaxed")
    if is_last(done, pid, tl.num_programs(0), 16):
        b = tl.arange(0, BINS)
        for start in range(0, B, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            here = n < B
            total = tl.zeros([BLOCK_N, BINS], tl.int32)
            for s in tl.static_range(FINE_SHARDS):
                at = sums + n[:, None] * SUMS + (BASE_SHARDS + s) * BINS + b[None, :]
                total += tl.load(at, here[:, None], 0, cache_modifier=".cg")
            cut, _ = _cut_of(total, tl.load(cuts + n * 4 + 1, here, 0.0))
            tl.store(cuts + n * 4 + 2, cut.to(tl.float32), here)


@triton.jit(do_not_specialize=["B"])
def _exact_kernel(
    logits,
    hidden,
    weight,
    bias,
    bias_stride,
    refine,
    scale,
    numbers,
    pilots,
    winners,
    tops,
    cuts,
    lists,
    lengths,
    done,
    read,
    answers,
    totals,
    B,
    V,
    fixed_bytes,
    plane_bytes,
    row_bytes,
    D_HIDDEN: tl.constexpr,
    D4: tl.constexpr,
    D2: tl.constexpr,
    D1: tl.constexpr,
    PLANES: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
    PDL: tl.constexpr,
):
    """Listed rows that still cost too much, or that can win, exactly; then the winners."""
    MANY: tl.constexpr = BLOCK_B > 1
    pid = tl.program_id(0)
    if PDL:
        gdc_wait()
    W: tl.constexpr = ((D4 + 63) // 64 + (D2 + 63) // 64 + (D1 + 63) // 64) * 4 + 1
    if pid == 0:
        n = tl.arange(0, BLOCK_B)
        first = tl.load(pilots + n, n < B, EMPTY)
        place = logits + n.to(tl.int64) * V + row_of(first)
        tl.store(place, score_of(first), first != EMPTY)
    count = tl.load(lengths + pid)
    list_ptr = lists + pid.to(tl.int64) * (B * SHARE)
    for start in range(0, count, BLOCK_R):
        j = start + tl.arange(0, BLOCK_R)
        listed = j < count
        entry = tl.load(list_ptr + j, listed, 0)
        row, n = entry & ROW_MASK, entry >> ROW_BITS
        own, first = numbers + n * NUMBERS, tl.load(pilots + n)
        floor = tl.load(own + FLOOR)
        place = logits + n.to(tl.int64) * V + row
        value = tl.load(place, listed, float("-inf"))
        factor = tl.load(
            refine + ((PLANES - 1) * V.to(tl.int64) + row) * W + W - 1, listed, 0
        ).to(tl.float32, bitcast=True)  # fmt: skip
        spread = spread_of(scale, own, row, listed, V, SPREAD_FINE, D4, D2, D1)
        if not DETERMINISTIC:
            spread *= factor
        variance = spread_of(scale, own, row, listed, V, VARIANCE_FINE, D4, D2, D1) * factor
        gap = tl.maximum(_peak_of(first, tops, n) - value, 0.0)
        cost = _bin_of(gap, 0.5 * (variance + floor), value != value)
        taken = cost.to(tl.float32) < tl.load(cuts + n * 4 + 2)
        taken = listed & (taken | (value + tl.sqrt(spread + floor) >= score_of(first)))
        if tl.sum(taken.to(tl.int32), 0) > 0:
            tl.atomic_add(read + n * 4 + 1, 1, taken, sem="relaxed")
            score = _exact_rows(
                hidden, weight, bias, bias_stride, n, row, taken, D_HIDDEN, BLOCK_R, BLOCK_D,
                HAS_BIAS, MANY,
            )  # fmt: skip
            tl.store(place, score, taken)
            tl.atomic_max(winners + n, packed(score, row), taken, sem="relaxed")
    tl.debug_barrier()
    tl.store(lengths + pid, 0)
    _finish(
        B, pilots, winners, done, read, answers, totals, V, fixed_bytes, plane_bytes, row_bytes,
        PLANES, BLOCK_B,
    )  # fmt: skip
