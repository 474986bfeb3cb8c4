"""Selection after the scan in Triton, greedy and sampling, one launch.

Rows whose bound reaches the best exact score of their query ("pilot") read all planes, and those
that still reach it their weights (`triton_rows`).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flashhead.ops.cascade.triton_rows import (
    ROW_BITS,
    ROW_MASK,
    append_rows,
    count_read,
    finish,
    own_rows,
    pilot_of,
    refined_parts,
)
from flashhead.ops.noise.triton import gumbel_at
from flashhead.ops.scan.triton_parts import (
    EMPTY,
    FLOOR,
    NUMBERS,
    exact_dot,
    packed,
    row_of,
    score_of,
)


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
    bests,
    pilots,
    winners,
    done,
    read,
    answers,
    totals,
    bests_count,
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
        _, own_row, present = own_rows(0, 0, B, V, SHARE, BLOCK_N, BLOCK_V)
        own_bounds = tl.load(bounds + own_row, present, float("-inf"))
        pilot, _ = pilot_of(
            bests, bests_count, hidden, weight, bias, temperature, seeds, steps, D_HIDDEN, BLOCK_K,
            BLOCK_D, HAS_BIAS, HAS_NOISE,
        )  # fmt: skip
        tl.store(pilots, pilot)  # the same by every program
    list_ptr = lists + tl.program_id(0).to(tl.int64) * (B * SHARE)
    length = lengths + tl.program_id(0)
    for first_query in range(0, B, BLOCK_N):
        for start in range(0, SHARE, BLOCK_V):
            q, row, inside = own_rows(first_query, start, B, V, SHARE, BLOCK_N, BLOCK_V)
            if BLOCK_K > 0:
                bound, first = own_bounds, pilot
            else:
                bound = tl.load(bounds + q.to(tl.int64) * V + row, inside, float("-inf"))
                first = tl.load(pilots + q, q < B, EMPTY)
            alive = inside & (bound >= score_of(first)) & (row != row_of(first))
            append_rows(list_ptr, length, q, row, alive)
    tl.debug_barrier()
    count = tl.load(length, cache_modifier=".cg")
    if count > 0:
        for start in range(0, count, BLOCK_R):
            j = start + tl.arange(0, BLOCK_R)
            listed = j < count
            entry = tl.load(list_ptr + j, listed, 0)
            row, n = entry & ROW_MASK, entry >> ROW_BITS
            count_read(read, n, listed, count, start, BLOCK_B)
            value = tl.load(bounds + n.to(tl.int64) * V + row, listed, float("-inf"))
            target = score_of(pilot if BLOCK_K > 0 else tl.load(pilots + n))
            floor = tl.load(numbers + n * NUMBERS + FLOOR)
            added, factor, base, spread = refined_parts(
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
    finish(
        B, pilots, winners, done, read, answers, totals, V, fixed_bytes, plane_bytes, row_bytes,
        PLANES, BLOCK_B,
    )  # fmt: skip
