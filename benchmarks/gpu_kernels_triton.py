"""The certified greedy head for one query in Triton: query, scan, select.

int8 query with one scale for 32 words; dp4a on packed bytes through inline assembly. The last
program of the query kernel to finish quantises the query for all.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _dot(x, q0, q1, q2, q3, acc, FAST: tl.constexpr):
    """acc + x . q over the 16 two-bit fields of a word."""
    if FAST:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c, e;
            and.b32 a, $1, 0x03030303;
            shr.u32 b, $1, 2;
            and.b32 b, b, 0x03030303;
            shr.u32 c, $1, 4;
            and.b32 c, c, 0x03030303;
            shr.u32 e, $1, 6;
            and.b32 e, e, 0x03030303;
            dp4a.s32.s32 a, a, $2, $6;
            dp4a.s32.s32 b, b, $3, a;
            dp4a.s32.s32 c, c, $4, b;
            dp4a.s32.s32 $0, e, $5, c;
            }""",
            "=r,r,r,r,r,r,r",
            [x, q0, q1, q2, q3, acc],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    for f in tl.static_range(4):
        q = q0 if f == 0 else (q1 if f == 1 else (q2 if f == 2 else q3))
        for j in tl.static_range(4):
            code = (x >> (8 * j + 2 * f)) & 3
            byte = (q << (24 - 8 * j)) >> 24
            acc += code * byte
    return acc


@triton.jit
def _ordered(value):
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _unordered(bits):
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def query_kernel(
    transform,
    transform_scale,
    exact,
    hidden,
    word_group,
    word_gain,
    share,
    coded,
    energy,
    best,
    top_of_all,
    count,
    planes,
    steps,
    numbers,
    z2,
    d: tl.constexpr,
    GROUPS: tl.constexpr,
    GP: tl.constexpr,
    WORDS: tl.constexpr,
    UP: tl.constexpr,
    BD: tl.constexpr,
    PDL: tl.constexpr,
    T8: tl.constexpr,
    DIRECT: tl.constexpr,
):
    """coded = transform h by groups of 16 rows, their energies, h along the exact directions; then
    the int8 query.

    planes: int32[4 fields, UP * 32 words]; steps: float32[UP]; numbers: offset, along, shift, va,
    vb.
    """
    if PDL:
        gdc_launch_dependents()
    g = tl.program_id(0)
    if g == GROUPS:
        if DIRECT:
            tl.store(best, -0x7FFFFFFFFFFFFFFF)
            tl.store(top_of_all, -0x7FFFFFFF)
        along = tl.zeros([BD], tl.float32)
        shift = tl.zeros([BD], tl.float32)
        for start in tl.static_range(0, d, BD):
            i = start + tl.arange(0, BD)
            h = tl.load(hidden + i, mask=i < d, other=0).to(tl.float32)
            along += h * tl.load(exact + i, mask=i < d, other=0)
            shift += h * tl.load(exact + d + i, mask=i < d, other=0)
        tl.store(numbers + 1, tl.sum(along, 0))
        tl.store(numbers + 2, tl.sum(shift, 0))
    else:
        rows = g * 16 + tl.arange(0, 16)
        acc = tl.zeros([16, BD], tl.float32)
        for start in tl.static_range(0, d, BD):
            i = start + tl.arange(0, BD)
            h = tl.load(hidden + i, mask=i < d, other=0).to(tl.float32)
            w = tl.load(transform + rows[:, None] * d + i[None, :], mask=(i < d)[None, :], other=0)
            acc += w.to(tl.float32) * h[None, :]
        value = tl.sum(acc, 1)
        if T8:
            value *= tl.load(transform_scale + rows)
        tl.store(coded + rows, value)
        tl.store(energy + g, tl.sum(value * value, 0))
    u = tl.arange(0, UP)
    w = tl.arange(0, 32)
    f = tl.arange(0, 4)
    words = u[:, None, None, None] * 32 + w[None, :, None, None]
    group = tl.load(word_group + words, mask=words < WORDS, other=-1)
    gain = tl.load(word_gain + words, mask=words < WORDS, other=0)
    gi = tl.arange(0, GP)
    part = tl.load(share + gi, mask=gi < GROUPS, other=0)
    tl.debug_barrier()
    if tl.atomic_add(count, 1, sem="acq_rel") == GROUPS:
        tl.store(count, 0)
        at = group * 16 + f[None, None, :, None] * 4 + f[None, None, None, :]
        v = (
            tl.load(coded + at, mask=group >= 0, other=0, cache_modifier=".cg") * gain
        )  # [UP, 32, 4 fields, 4 bytes]
        peak = tl.max(tl.max(tl.max(tl.abs(v), 3), 2), 1)
        step = tl.maximum(peak / 127.0, 1e-30)
        scaled = v * (127.0 / tl.maximum(peak, 1e-28))[:, None, None, None]
        q = ((scaled + 12582912.0) - 12582912.0).to(tl.int32)
        sums = tl.sum(tl.sum(tl.sum(q, 3), 2), 1).to(tl.float32)
        packed = tl.sum((q & 255) << (8 * f)[None, None, None, :], 3)  # [UP, 32, 4]
        tl.store(
            planes + f[None, None, :] * (UP * 32) + u[:, None, None] * 32 + w[None, :, None], packed
        )
        tl.store(steps + u, step)
        real = tl.minimum(32, tl.maximum(WORDS - u * 32, 0)).to(tl.float32)
        tl.store(numbers, tl.sum(1.5 * step * sums, 0))
        tl.store(
            numbers + 3,
            z2
            * tl.sum(
                part * tl.load(energy + gi, mask=gi < GROUPS, other=0, cache_modifier=".cg"), 0
            ),
        )
        tl.store(numbers + 4, z2 * tl.sum(step * step * real, 0) * (16.0 * 1.25 / 12.0))


@triton.jit
def scan_kernel(
    base,
    scale,
    error,
    direction,
    hidden,
    weight,
    planes,
    steps,
    numbers,
    upper,
    best,
    top_of_all,
    V,
    nblk,
    mean_error,
    d: tl.constexpr,
    WORDS: tl.constexpr,
    UP: tl.constexpr,
    NB: tl.constexpr,
    WC: tl.constexpr,
    BD: tl.constexpr,
    FAST: tl.constexpr,
    PDL: tl.constexpr,
    LOGITS: tl.constexpr,
):
    """Upper bounds of all rows; the best row of a program exactly, if near the best of all."""
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    offset = tl.load(numbers)
    along = tl.load(numbers + 1)
    shift = tl.load(numbers + 2)
    va = tl.load(numbers + 3)
    vb = tl.load(numbers + 4)
    r = tl.arange(0, 16)
    w = tl.arange(0, WC)
    top = tl.full([NB, 16], -3.0e38, tl.float32)
    top_row = tl.zeros([NB, 16], tl.int32)
    for tile in range(pid, (nblk + NB - 1) // NB, programs):
        blk = tile * NB + tl.arange(0, NB)
        rows = blk[:, None] * 16 + r[None, :]
        inside = rows < V
        rs = tl.load(scale + rows, mask=inside, other=0).to(tl.float32)
        re = tl.load(error + rows, mask=inside, other=0).to(tl.float32)
        rd = tl.load(direction + rows, mask=inside, other=0)
        acc = tl.zeros([NB, WC, 16], tl.float32)
        first = base + blk.to(tl.int64)[:, None, None] * (WORDS * 16) + r[None, None, :]
        for unit in tl.static_range((WORDS + 31) // 32):
            dot = tl.zeros([NB, WC, 16], tl.int32)
            for chunk in tl.static_range(unit * 32, min(unit * 32 + 32, WORDS), WC):
                word = chunk + w
                keep = (blk < nblk)[:, None, None] & (word < WORDS)[None, :, None]
                x = tl.load(
                    first + word[None, :, None] * 16,
                    mask=keep,
                    other=0,
                    eviction_policy="evict_first",
                )
                q0 = tl.load(planes + word)[None, :, None]
                q1 = tl.load(planes + UP * 32 + word)[None, :, None]
                q2 = tl.load(planes + UP * 64 + word)[None, :, None]
                q3 = tl.load(planes + UP * 96 + word)[None, :, None]
                dot = _dot(x, q0, q1, q2, q3, dot, FAST)
            acc += tl.load(steps + unit) * dot.to(tl.float32)
        estimate = rs * (tl.sum(acc, 1) - offset) + (along * rd + shift)
        estimate = tl.where(inside, estimate, -3.0e38)
        bound = estimate + tl.sqrt(va * re * re + vb * rs * rs)
        if LOGITS:
            tl.store(upper + rows, estimate, mask=inside)
        else:
            tl.store(upper + rows, bound, mask=inside)
        better = estimate > top
        top = tl.where(better, estimate, top)
        top_row = tl.where(better, rows, top_row)
    winner = tl.max(tl.max(top, 1), 0)
    row = tl.max(tl.max(tl.where(top == winner, top_row, -1), 1), 0).to(tl.int64)
    old = tl.atomic_max(top_of_all, _ordered(winner), sem="relaxed")
    if winner > _unordered(old) - 0.5 * mean_error * tl.sqrt(va):
        dots = tl.zeros([BD], tl.float32)
        for start in tl.static_range(0, d, BD):
            i = start + tl.arange(0, BD)
            h = tl.load(hidden + i, mask=i < d, other=0).to(tl.float32)
            dots += h * tl.load(weight + row * d + i, mask=i < d, other=0).to(tl.float32)
        logit = tl.sum(dots, 0)
        tl.atomic_max(
            best, (_ordered(logit).to(tl.int64) << 32) | (0x7FFFFFFF - row), sem="relaxed"
        )


@triton.jit
def select_kernel(
    upper,
    hidden,
    weight,
    lists,
    best,
    top_of_all,
    done,
    token,
    out,
    stats,
    V,
    d: tl.constexpr,
    SHARE: tl.constexpr,
    ROWS: tl.constexpr,
    BD: tl.constexpr,
    PDL: tl.constexpr,
    STATS: tl.constexpr,
    DIRECT: tl.constexpr,
):
    """Every row whose bound reaches the best exact logit, exactly.

    The last program writes the token; with DIRECT the caller reads it from `best`.
    """
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    if PDL:
        gdc_wait()
    # blocks of 16 rows, dealt out in turn
    i = tl.arange(0, SHARE)
    rows = ((i // 16) * programs + pid) * 16 + i % 16
    bound = tl.load(upper + rows, mask=rows < V, other=-3.0e38, cache_modifier=".cg")
    start = tl.load(best, cache_modifier=".cg")
    logit = _unordered((start >> 32).to(tl.int32))
    known = 0x7FFFFFFF - (start & 0xFFFFFFFF).to(tl.int32)
    alive = (bound >= logit) & (rows < V) & (rows != known)
    count = tl.sum(alive.to(tl.int32), 0)
    if STATS:
        tl.atomic_add(stats, count)
    if count > 0:
        place = tl.cumsum(alive.to(tl.int32), 0) - 1
        own = lists + pid * SHARE
        tl.store(own + place, rows, mask=alive)
        tl.debug_barrier()
        for first in range(0, count, ROWS):
            j = first + tl.arange(0, ROWS)
            row = tl.load(own + j, mask=j < count, other=0)
            dots = tl.zeros([ROWS, BD], tl.float32)
            for k0 in tl.static_range(0, d, BD):
                k = k0 + tl.arange(0, BD)
                h = tl.load(hidden + k, mask=k < d, other=0).to(tl.float32)
                x = tl.load(
                    weight + row.to(tl.int64)[:, None] * d + k[None, :],
                    mask=(j < count)[:, None] & (k < d)[None, :],
                    other=0,
                )
                dots += x.to(tl.float32) * h[None, :]
            exact = tl.sum(dots, 1)
            pack = (_ordered(exact).to(tl.int64) << 32) | (0x7FFFFFFF - row).to(tl.int64)
            pack = tl.max(tl.where(j < count, pack, -0x7FFFFFFFFFFFFFFF), 0)
            tl.atomic_max(best, pack, sem="relaxed")
    if not DIRECT:
        tl.debug_barrier()
        arrived = tl.atomic_add(done, 1, sem="acq_rel")
        if arrived == programs - 1:
            final = tl.load(best, cache_modifier=".cg")
            tl.store(token, 0x7FFFFFFF - (final & 0xFFFFFFFF))
            tl.store(out, _unordered((final >> 32).to(tl.int32)))
            tl.store(best, -0x7FFFFFFFFFFFFFFF)
            tl.store(done, 0)
            tl.store(top_of_all, -0x7FFFFFFF)
