"""Complete logits after the scan in Triton, three launches.

`_mass_kernel` counts rows by what leaving them at their estimate would cost (formulas: `api`),
`_refine_kernel` reads the planes of those that cost too much and counts again, `_exact_kernel`
reads the weights of those that still do (`triton_rows`).

Costs are counted in bins of 1 / PER_NAT nat of their logarithm and a row counts with the upper edge
of its bin, so what is left never costs more than the budget allows.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flashhead.ops.cascade.triton_rows import (
    ROW_BITS,
    ROW_MASK,
    append_rows,
    count_read,
    exact_rows,
    finish,
    own_rows,
    pilot_of,
    refined_parts,
)
from flashhead.ops.scan.triton_parts import (
    EMPTY,
    FLOOR,
    NUMBERS,
    SPREAD,
    SPREAD_FINE,
    VARIANCE,
    VARIANCE_FINE,
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
    bests,
    pilots,
    tops,
    sums,
    masses,
    cuts,
    done,
    bests_count,
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
        first, top = pilot_of(
            bests, bests_count, hidden, weight, bias, hidden, hidden, hidden, D_HIDDEN, BLOCK_K,
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
            q, row, inside = own_rows(first_query, start, B, V, SHARE, BLOCK_N, BLOCK_V)
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
            append_rows(list_ptr, length, q, row, alive)
    tl.debug_barrier()
    count = tl.load(length, cache_modifier=".cg")
    shard = BASE_SHARDS + pid % FINE_SHARDS
    for start in range(0, count, BLOCK_R):
        j = start + tl.arange(0, BLOCK_R)
        listed = j < count
        entry = tl.load(list_ptr + j, listed, 0)
        row, n = entry & ROW_MASK, entry >> ROW_BITS
        count_read(read, n, listed, count, start, BLOCK_B)
        own = numbers + n * NUMBERS
        place = logits + n.to(tl.int64) * V + row
        added, factor, _base, _fine = refined_parts(
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
            score = exact_rows(
                hidden, weight, bias, bias_stride, n, row, taken, D_HIDDEN, BLOCK_R, BLOCK_D,
                HAS_BIAS, MANY,
            )  # fmt: skip
            tl.store(place, score, taken)
            tl.atomic_max(winners + n, packed(score, row), taken, sem="relaxed")
    tl.debug_barrier()
    tl.store(lengths + pid, 0)
    finish(
        B, pilots, winners, done, read, answers, totals, V, fixed_bytes, plane_bytes, row_bytes,
        PLANES, BLOCK_B,
    )  # fmt: skip
