"""Selection after the scan in Triton: who may win, all planes of their codes, exact rows.

Greedy and sampling, `_select_kernel`, one launch: a program has every k-th block of 16 rows of one
query. Rows whose bound reaches the best exact score ("pilot") are compacted, read all planes at
once (one round trip to memory instead of one a plane), and those that still reach it their weights.
No list can overflow: a program lists at most its own rows, so in the worst case every row is read
exactly, which is the dense completion.

Complete logits, three launches: `_mass_kernel` sums by bins what leaving rows at their estimate
would cost (formulas: `api`), `_refine_kernel` reads the planes of the rows above the cut and sums
again, `_exact_kernel` reads the weights of those above the second cut.
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
    packed,
    row_of,
    score_of,
    spread_of,
    unordered,
)

SUM_SHARDS = tl.constexpr(16)
"""Atomics on one address wait for each other: programs add to one of so many copies."""


@triton.jit
def _plane_words(words, keep, FIRST: tl.constexpr, DIMS: tl.constexpr):
    """The words of a segment in one plane of some rows: int32 [rows, words]."""
    WORDS: tl.constexpr = (DIMS + 63) // 64 * 4
    word = tl.arange(0, triton.next_power_of_2(WORDS))
    inside = keep[:, None] & (word < WORDS)[None, :]
    return tl.load(words[:, None] + FIRST + word[None, :], inside, 0)


@triton.jit
def _query_words(q, DIMS: tl.constexpr):
    """The same words of the query, field by field."""
    WORDS: tl.constexpr = (DIMS + 63) // 64 * 4
    PADDED: tl.constexpr = (DIMS // 16 + PAD - 1) // PAD * PAD
    word = tl.arange(0, triton.next_power_of_2(WORDS))
    inside = word < WORDS
    return (
        tl.load(q + word, inside, 0),
        tl.load(q + PADDED + word, inside, 0),
        tl.load(q + 2 * PADDED + word, inside, 0),
        tl.load(q + 3 * PADDED + word, inside, 0),
    )


@triton.jit
def _plane_part(x, q, rs, own, SLOT: tl.constexpr, FAST: tl.constexpr):
    """What a segment of a plane adds to estimates, but for the plane's factor 1 / 4^j."""
    low, high = dot_two_bits(
        x, q[0][None, :], q[1][None, :], q[2][None, :], q[3][None, :], x * 0, x * 0, FAST
    )
    dot = tl.sum(low.to(tl.float32) + high.to(tl.float32) * 0.25, 1)
    mult, qsum = tl.load(own + MULT + SLOT), tl.load(own + QSUM + SLOT)
    return rs.to(tl.float32) * (mult * (dot - 1.5 * qsum))


@triton.jit
def _refined(
    listed, count, refine, scale, own, query, V, D4: tl.constexpr, D2: tl.constexpr,
    D1: tl.constexpr, PLANES: tl.constexpr, BLOCK_R: tl.constexpr, FAST: tl.constexpr,
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
    rows = tl.load(listed + at, keep, 0)
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
        added += _plane_part(x4, _query_words(query, D4), rs4, own, 0, FAST)
    if D2 > 0:
        square = rs2.to(tl.float32) * rs2.to(tl.float32)
        spread += square * tl.load(own + SPREAD + 1)
        fine += square * tl.load(own + SPREAD_FINE + 1)
        added += _plane_part(x2, _query_words(query + P4, D2), rs2, own, 1, FAST)
    if D1 > 0:
        square = rs1.to(tl.float32) * rs1.to(tl.float32)
        spread += square * tl.load(own + SPREAD + 2)
        fine += square * tl.load(own + SPREAD_FINE + 2)
        added += _plane_part(x1, _query_words(query + P4 + P2, D1), rs1, own, 2, FAST)
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
    hidden, weight, bias, rows, keep, D_HIDDEN: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Exact scores of the rows kept: float32[BLOCK_R]."""
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(0, D_HIDDEN, BLOCK_D):
        i = start + tl.arange(0, BLOCK_D)
        h = tl.load(hidden + i, i < D_HIDDEN, 0).to(tl.float32)
        w = tl.load(
            weight + rows.to(tl.int64)[:, None] * D_HIDDEN + i[None, :],
            keep[:, None] & (i < D_HIDDEN)[None, :],
            0,
        )
        total += w.to(tl.float32) * h[None, :]
    score = tl.sum(total, 1)
    if HAS_BIAS:
        score += tl.load(bias + rows, keep, 0)
    return score


@triton.jit
def _finish(
    n, first, winners, done, read, answers, totals, V, fixed_bytes, plane_bytes, row_bytes,
    PLANES: tl.constexpr,
):  # fmt: skip
    """The last program of a query writes its column of `answers` int64[8, n] (rows: `triton`)."""
    if is_last(done + 17 * n, tl.program_id(0), tl.num_programs(0), 16):
        states = tl.num_programs(1)
        final = tl.maximum(tl.load(winners + n, cache_modifier=".cg"), first)
        found = final != EMPTY
        score = score_of(final)
        certified = (found & (tl.abs(score) < 3.0e38)).to(tl.int64)
        planes = tl.load(read + n * 4, cache_modifier=".cg").to(tl.int64)
        exact = tl.load(read + n * 4 + 1, cache_modifier=".cg").to(tl.int64) + found.to(tl.int64)
        size = fixed_bytes + PLANES * planes * plane_bytes + exact * row_bytes
        fallback = (exact * 2 > V).to(tl.int64)
        out = answers + n
        tl.store(out, tl.where(found, row_of(final), 0).to(tl.int64))
        tl.store(out + states, certified)
        tl.store(out + 2 * states, fallback)
        tl.store(out + 3 * states, exact)
        tl.store(out + 4 * states, size)
        tl.store(out + 5 * states, score.to(tl.int32, bitcast=True).to(tl.int64))
        tl.store(out + 6 * states, planes)
        tl.store(out + 7 * states, first)
        tl.atomic_add(totals, 1, sem="relaxed")
        tl.atomic_add(totals + 1, certified, sem="relaxed")
        tl.atomic_add(totals + 2, fallback, sem="relaxed")
        tl.atomic_add(totals + 3, exact, sem="relaxed")
        tl.atomic_add(totals + 4, size, sem="relaxed")


@triton.jit
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
    pilots,
    winners,
    done,
    read,
    answers,
    totals,
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
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
    FAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """All rows of query program_id(1) that may win, finer and exactly; then the winner."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    n = tl.program_id(1)
    STRIDE: tl.constexpr = (
        ((D4 // 16 + PAD - 1) // PAD + (D2 // 16 + PAD - 1) // PAD) * PAD * 4
        + (D1 // 16 + PAD - 1) // PAD * PAD * 4
        + (D1 // 32 + PAD - 1) // PAD * PAD * 8
    )
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    own = numbers + n * NUMBERS
    first = tl.load(pilots + n)
    target = score_of(first)
    list_ptr = lists + (n.to(tl.int64) * programs + pid) * SHARE
    count = 0
    for start in range(0, SHARE, BLOCK_V):
        i = start + tl.arange(0, BLOCK_V)
        mine = ((i // 16) * programs + pid) * 16 + i % 16
        bound = tl.load(bounds + n.to(tl.int64) * V + mine, mine < V, float("-inf"))
        alive = (bound >= target) & (mine < V) & (mine != row_of(first))
        alive_count = alive.to(tl.int32)
        tl.store(list_ptr + count + tl.cumsum(alive_count, 0) - 1, mine, alive)
        count += tl.sum(alive_count, 0)
    if count > 0:
        tl.atomic_add(read + n * 4, count, sem="relaxed")
        tl.debug_barrier()
        floor = tl.load(own + FLOOR)
        best = first * 0 + EMPTY
        scored = 0
        for start in range(0, count, BLOCK_R):
            j = start + tl.arange(0, BLOCK_R)
            listed = j < count
            row = tl.load(list_ptr + j, listed, 0)
            value = tl.load(bounds + n.to(tl.int64) * V + row, listed, float("-inf"))
            added, factor, base, spread = _refined(
                list_ptr + start, count - start, refine, scale, own, query + n * STRIDE, V, D4,
                D2, D1, PLANES, BLOCK_R, FAST,
            )  # fmt: skip
            value -= tl.sqrt(base + floor)
            if not DETERMINISTIC:
                spread *= factor
            can_win = listed & (value + added + tl.sqrt(spread + floor) >= target)
            place = tl.cumsum(can_win.to(tl.int32), 0)
            left = tl.sum(can_win.to(tl.int32), 0)
            for k in range(left):
                one = tl.sum(tl.where(can_win & (place == k + 1), row, 0), 0)
                score = exact_dot(
                    hidden + n.to(tl.int64) * D_HIDDEN, weight,
                    bias + n.to(tl.int64) * bias_stride, one, D_HIDDEN, BLOCK_D, HAS_BIAS,
                )  # fmt: skip
                if HAS_NOISE:
                    noise = gumbel_at(tl.load(seeds + n), tl.load(steps + n), one)
                    score += tl.load(temperature + n) * noise
                best = tl.maximum(best, packed(score, one))
            scored += left
        if scored > 0:
            tl.atomic_add(read + n * 4 + 1, scored, sem="relaxed")
            tl.atomic_max(winners + n, best, sem="relaxed")
    _finish(
        n, first, winners, done, read, answers, totals, V, fixed_bytes, plane_bytes, row_bytes,
        PLANES,
    )  # fmt: skip


# ---------------------------------------------------------------- complete logits


@triton.jit
def _growth(x):
    """exp(x) - 1 by its first four terms, x at most 4."""
    x = tl.minimum(x, 4.0)
    return x * (1.0 + x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0))))


@triton.jit
def _beyond(gap, loss, CUTS: tl.constexpr, PER_NAT: tl.constexpr):
    """Loss of each row at the cuts that it lies beyond: [rows, CUTS]; cut c is c / PER_NAT nats
    below the peak.
    """
    c = tl.arange(0, CUTS).to(tl.float32) * (1.0 / PER_NAT)
    return tl.where(gap[:, None] >= c[None, :], loss[:, None], 0.0)


@triton.jit
def _add_fixed(place, value):
    """Add to sums of 32.32 bits: the same whatever the order."""
    tl.atomic_add(place, (value * 4294967296.0).to(tl.int64), sem="relaxed")


@triton.jit
def _fixed(sums, SECTION: tl.constexpr, CUTS: tl.constexpr):
    """A section of the sums of a query, over all shards: float32[CUTS]."""
    c = tl.arange(0, CUTS)
    shard = tl.arange(0, SUM_SHARDS)
    place = sums + shard[:, None] * (4 * CUTS) + SECTION * CUTS + c[None, :]
    total = tl.sum(tl.load(place, cache_modifier=".cg"), 0)
    return total.to(tl.float32) * (1.0 / 4294967296.0)


@triton.jit
def _mass_of(sums, CUTS: tl.constexpr):
    """The mass of a query."""
    shard = tl.arange(0, SUM_SHARDS)
    place = sums + shard * (4 * CUTS) + 2 * CUTS
    total = tl.sum(tl.load(place, cache_modifier=".cg"), 0)
    return total.to(tl.float32) * (1.0 / 4294967296.0)


@triton.jit
def _cut_of(lost, allowed, CUTS: tl.constexpr, PER_NAT: tl.constexpr):
    """Gap in nats from which on rows may be left, and what these lose."""
    c = tl.arange(0, CUTS)
    first = tl.min(tl.where(lost <= allowed, c, CUTS), 0)
    left = tl.sum(tl.where(c == first, lost, 0.0), 0)
    # no cut will do: all rows are needed
    return tl.where(first == CUTS, 1.0e30, first.to(tl.float32) * (1.0 / PER_NAT)), left


@triton.jit
def _peak_of(first, tops, n):
    """What gaps are measured from: the best estimate, or the best exact score if that is higher."""
    return tl.maximum(unordered(tl.load(tops + n)), score_of(first))


@triton.jit
def _mass_kernel(
    logits,
    scale,
    numbers,
    pilots,
    tops,
    sums,
    V,
    D4: tl.constexpr,
    D2: tl.constexpr,
    D1: tl.constexpr,
    SHARE_MASS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CUTS: tl.constexpr,
    PER_NAT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Losses by cut and mass of all rows at their base estimates.

    `sums` is int64[SUM_SHARDS, 4 CUTS] a query: losses at the base, of refined rows, the mass.
    """
    pid, n = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    own = numbers + n * NUMBERS
    first = tl.load(pilots + n)
    peak, pilot = _peak_of(first, tops, n), tl.exp(score_of(first) - _peak_of(first, tops, n))
    floor = tl.load(own + FLOOR)
    lost = tl.zeros([BLOCK_V, CUTS], tl.float32)
    mass = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, SHARE_MASS, BLOCK_V):
        row = pid * SHARE_MASS + start + tl.arange(0, BLOCK_V)
        inside = row < V
        value = tl.load(logits + n.to(tl.int64) * V + row, inside, float("-inf"))
        half = 0.5 * (spread_of(scale, own, row, inside, V, VARIANCE, D4, D2, D1) + floor)
        gap = peak - value
        # the pilot is known exactly: it keeps its own mass and costs nothing
        known = row == row_of(first)
        mass += tl.where(known, pilot, tl.exp(-gap - half))
        loss = tl.where(inside & (row != row_of(first)), tl.exp(-gap) * _growth(half), 0.0)
        lost += _beyond(gap, loss, CUTS, PER_NAT)
    own_sums = sums + (n * SUM_SHARDS + pid % SUM_SHARDS) * (4 * CUTS)
    _add_fixed(own_sums + tl.arange(0, CUTS), tl.sum(lost, 0))
    _add_fixed(own_sums + 2 * CUTS, tl.sum(mass, 0))


@triton.jit
def _refine_kernel(
    logits,
    refine,
    scale,
    query,
    numbers,
    pilots,
    tops,
    sums,
    lists,
    counts,
    read,
    V,
    budget,
    D4: tl.constexpr,
    D2: tl.constexpr,
    D1: tl.constexpr,
    PLANES: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CUTS: tl.constexpr,
    PER_NAT: tl.constexpr,
    FAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rows above the cut, or that can win, with all planes; their losses by cut."""
    pid, programs, n = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    STRIDE: tl.constexpr = (
        ((D4 // 16 + PAD - 1) // PAD + (D2 // 16 + PAD - 1) // PAD) * PAD * 4
        + (D1 // 16 + PAD - 1) // PAD * PAD * 4
        + (D1 // 32 + PAD - 1) // PAD * PAD * 8
    )
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    own = numbers + n * NUMBERS
    first = tl.load(pilots + n)
    target, known = score_of(first), row_of(first)
    peak, floor = _peak_of(first, tops, n), tl.load(own + FLOOR)
    own_sums = sums + n * (SUM_SHARDS * 4 * CUTS)
    lost_base = _fixed(own_sums, 0, CUTS)
    cut, _ = _cut_of(lost_base, 0.5 * budget * _mass_of(own_sums, CUTS), CUTS, PER_NAT)
    list_ptr = lists + (n.to(tl.int64) * programs + pid) * SHARE
    count = 0
    for start in range(0, SHARE, BLOCK_V):
        i = start + tl.arange(0, BLOCK_V)
        mine = ((i // 16) * programs + pid) * 16 + i % 16
        inside = mine < V
        value = tl.load(logits + n.to(tl.int64) * V + mine, inside, float("-inf"))
        spread = spread_of(scale, own, mine, inside, V, SPREAD, D4, D2, D1) + floor
        needed = (peak - value < cut) | (value + tl.sqrt(spread) >= target)
        alive = inside & needed & (mine != known) & (value > float("-inf"))
        alive_count = alive.to(tl.int32)
        tl.store(list_ptr + count + tl.cumsum(alive_count, 0) - 1, mine, alive)
        count += tl.sum(alive_count, 0)
    tl.store(counts + n * programs + pid, count)
    tl.debug_barrier()
    lost = tl.zeros([BLOCK_R, CUTS], tl.float32)
    for start in range(0, count, BLOCK_R):
        j = start + tl.arange(0, BLOCK_R)
        listed = j < count
        row = tl.load(list_ptr + j, listed, 0)
        place = logits + n.to(tl.int64) * V + row
        added, factor, _base, _fine = _refined(
            list_ptr + start, count - start, refine, scale, own, query + n * STRIDE, V, D4, D2, D1,
            PLANES, BLOCK_R, FAST,
        )  # fmt: skip
        fine = tl.load(place, listed, 0) + added
        tl.store(place, fine, listed)
        variance = spread_of(scale, own, row, listed, V, VARIANCE_FINE, D4, D2, D1) * factor
        gap = tl.maximum(peak - fine, 0.0)
        loss = tl.exp(-gap) * _growth(0.5 * (variance + floor))
        lost += _beyond(gap, tl.where(listed, loss, 0.0), CUTS, PER_NAT)
    if count > 0:
        shard = own_sums + (pid % SUM_SHARDS) * (4 * CUTS)
        _add_fixed(shard + CUTS + tl.arange(0, CUTS), tl.sum(lost, 0))
        tl.atomic_add(read + n * 4, count, sem="relaxed")


@triton.jit
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
    sums,
    lists,
    counts,
    done,
    read,
    answers,
    totals,
    V,
    fixed_bytes,
    plane_bytes,
    row_bytes,
    budget,
    D_HIDDEN: tl.constexpr,
    D4: tl.constexpr,
    D2: tl.constexpr,
    D1: tl.constexpr,
    PLANES: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CUTS: tl.constexpr,
    PER_NAT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
    PDL: tl.constexpr,
):
    """Listed rows above the second cut, or that can win, exactly; then the winner."""
    pid, programs, n = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    if PDL:
        gdc_wait()
    W: tl.constexpr = ((D4 + 63) // 64 + (D2 + 63) // 64 + (D1 + 63) // 64) * 4 + 1
    own = numbers + n * NUMBERS
    first = tl.load(pilots + n)
    target = score_of(first)
    peak, floor = _peak_of(first, tops, n), tl.load(own + FLOOR)
    own_sums = sums + n * (SUM_SHARDS * 4 * CUTS)
    mass = _mass_of(own_sums, CUTS)
    _, spent = _cut_of(_fixed(own_sums, 0, CUTS), 0.5 * budget * mass, CUTS, PER_NAT)
    allowed = tl.maximum(budget * mass - spent, 0.0)
    cut, _ = _cut_of(_fixed(own_sums, 1, CUTS), allowed, CUTS, PER_NAT)
    if pid == 0:
        if first != EMPTY:
            tl.store(logits + n.to(tl.int64) * V + row_of(first), target)
    count = tl.load(counts + n * programs + pid)
    list_ptr = lists + (n.to(tl.int64) * programs + pid) * SHARE
    state = hidden + n.to(tl.int64) * D_HIDDEN
    own_bias = bias + n.to(tl.int64) * bias_stride
    for start in range(0, count, BLOCK_R):
        j = start + tl.arange(0, BLOCK_R)
        listed = j < count
        row = tl.load(list_ptr + j, listed, 0)
        place = logits + n.to(tl.int64) * V + row
        value = tl.load(place, listed, float("-inf"))
        spread = spread_of(scale, own, row, listed, V, SPREAD_FINE, D4, D2, D1)
        if not DETERMINISTIC:
            at = refine + ((PLANES - 1) * V.to(tl.int64) + row) * W + W - 1
            spread *= tl.load(at, listed, 0).to(tl.float32, bitcast=True)
        taken = listed & ((peak - value < cut) | (value + tl.sqrt(spread + floor) >= target))
        left = tl.sum(taken.to(tl.int32), 0)
        if left > 0:
            tl.atomic_add(read + n * 4 + 1, left, sem="relaxed")
            score = _exact_rows(
                state, weight, own_bias, row, taken, D_HIDDEN, BLOCK_R, BLOCK_D, HAS_BIAS
            )
            tl.store(place, score, taken)
            pack = tl.max(tl.where(taken, packed(score, row), EMPTY), 0)
            tl.atomic_max(winners + n, pack, sem="relaxed")
    _finish(
        n, first, winners, done, read, answers, totals, V, fixed_bytes, plane_bytes, row_bytes,
        PLANES,
    )  # fmt: skip
