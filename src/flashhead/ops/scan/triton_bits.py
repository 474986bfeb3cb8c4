"""Scan of one query by the tensor cores' binary products, in Gluon: codes against bit planes.

An int8 query is eight planes of bits: q = sum_p 2^p q_p - 2 * 128 q_7. The product of a code bit
and a query is then a sum over planes of popcounts, and `mma.m16n8k256` of one-bit operands takes 16
rows, 256 bits of codes and all 8 planes at once. The codes go from memory to the tensor cores as
they are: no field is ever unpacked. Where a field has two bits, the planes of the query are moved
to the high or the low bits, one product each.

A warp has whole blocks of 16 rows; lane 4 g + t holds words t and t + 4 of each 8, of rows 2 g and
2 g + 1, and column g of the query. Layouts must be what the instruction wants, which is why this is
Gluon and not Triton. Programs stay: while one tile is multiplied the next one is on its way, the
first one before the query exists.

Ampere, Ada and Hopper have the instruction; later cards emulate it, others do not know it: there
the other scans run (`cascade.triton`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flashhead.ops.noise.triton import gumbel_pairs
from flashhead.ops.scan.triton_parts import (
    ALONG,
    EMPTY,
    FLOOR,
    MULT,
    NUMBERS,
    QSUM,
    SHIFT,
    SPREAD,
    packed,
)


@gluon.jit
def _load_words(base, blk, nblk, lane, t, WORDS: gl.constexpr):
    """Words t and t + 4 of each 8 of rows 2 g and 2 g + 1: two tuples of int64[BLOCKS, 8, 4]."""
    keep = (blk < nblk)[:, None, None]
    x_ptr = base + blk.to(gl.int64)[:, None, None] * (WORDS * 8) + lane[None, :, None] + t * 8
    low = ()
    high = ()
    for s in gl.static_range((WORDS + 7) // 8):
        if 8 * s + 8 <= WORDS:
            low = low + (gl.load(x_ptr + 64 * s, keep, 0),)
            high = high + (gl.load(x_ptr + 64 * s + 32, keep, 0),)
        else:
            low = low + (gl.load(x_ptr + 64 * s, keep & (8 * s + t < WORDS), 0),)
            high = high + (gl.load(x_ptr + 64 * s + 32, keep & (8 * s + 4 + t < WORDS), 0),)
    return low, high


@gluon.jit
def _load_numbers(
    direction, scale, blk, lane, V, D4: gl.constexpr, D2: gl.constexpr, D1: gl.constexpr
):
    """Direction and scales of the even and of the odd rows: a tuple of eight [BLOCKS, 8]."""
    S2: gl.constexpr = 1 if D4 > 0 else 0
    S1: gl.constexpr = S2 + (1 if D2 > 0 else 0)
    even = (blk[:, None] * 8 + lane[None, :]) * 2
    odd = even + 1
    in_even, in_odd = even < V, odd < V
    direct_e, direct_o = gl.load(direction + even, in_even, 0), gl.load(direction + odd, in_odd, 0)
    none = direct_e.to(gl.bfloat16)
    return (
        direct_e,
        direct_o,
        gl.load(scale + even, in_even, 0) if D4 > 0 else none,
        gl.load(scale + odd, in_odd, 0) if D4 > 0 else none,
        gl.load(scale + S2 * V + even, in_even, 0) if D2 > 0 else none,
        gl.load(scale + S2 * V + odd, in_odd, 0) if D2 > 0 else none,
        gl.load(scale + S1 * V + even, in_even, 0) if D1 > 0 else none,
        gl.load(scale + S1 * V + odd, in_odd, 0) if D1 > 0 else none,
    )


@gluon.jit
def _planes_of(at, word, FIRST: gl.constexpr, WORDS: gl.constexpr, HALVES: gl.constexpr):
    """Planes of the query that meet a word; a one-bit word's come in two halves."""
    keep = (word >= FIRST) & (word < FIRST + WORDS)
    place = at + (word - FIRST) * (8 * HALVES)
    bits = gl.load(place, keep, 0)
    if HALVES == 2:
        bits = bits | gl.load(place + 8, keep, 0)
    return bits


@gluon.jit
def _planes(at, t, FIRST: gl.constexpr, WORDS: gl.constexpr, HALVES: gl.constexpr):
    """Planes that meet a run of words, for words t and t + 4 of each 8: two tuples."""
    low = ()
    high = ()
    for s in gl.static_range(FIRST // 8, (FIRST + WORDS + 7) // 8):
        low = low + (_planes_of(at, 8 * s + t, FIRST, WORDS, HALVES),)
        high = high + (_planes_of(at, 8 * s + 4 + t, FIRST, WORDS, HALVES),)
    return low, high


@gluon.jit
def _product(a0, a1, a2, a3, b0, b1, c):
    """Add popcounts of codes & planes: rows 2 g (c0, c1) and 2 g + 1, planes 2 t and 2 t + 1."""
    return gl.inline_asm_elementwise(
        """mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc
        {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};""",
        "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r",
        [a0, a1, a2, a3, b0, b1, c[0], c[1], c[2], c[3]],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _add_run(words, planes, c, FIRST: gl.constexpr, WORDS: gl.constexpr, UP: gl.constexpr):
    """Add a run of words to the sums of two rows; UP: the high bits of their fields."""
    START: gl.constexpr = FIRST // 8
    for s in gl.static_range(START, (FIRST + WORDS + 7) // 8):
        low, high = words[0][s], words[1][s]
        c = _product(
            low.to(gl.int32), (low >> 32).to(gl.int32), high.to(gl.int32),
            (high >> 32).to(gl.int32), planes[0][s - START] << UP, planes[1][s - START] << UP, c,
        )  # fmt: skip
    return c


@gluon.jit
def _add_fields(words, planes, c, FIRST: gl.constexpr, WORDS: gl.constexpr):
    """2 c + high bits, then 2 c + low bits, of a run of two-bit words."""
    c = _add_run(words, planes, (2 * c[0], 2 * c[1], 2 * c[2], 2 * c[3]), FIRST, WORDS, 1)
    return _add_run(words, planes, (2 * c[0], 2 * c[1], 2 * c[2], 2 * c[3]), FIRST, WORDS, 0)


@gluon.jit
def _weighted(c, t, ROW: gl.constexpr):
    """Sum of a lane's two planes of a row: int32 as float32[BLOCKS, 8, 4]."""
    total = c[2 * ROW] * (1 << (2 * t))
    total += c[2 * ROW + 1] * gl.where(t == 3, -128, 2 << (2 * t))
    return total.to(gl.float32)


@gluon.jit
def _add_segment(sums, c, t, rs_e, rs_o, mult, offset, spread):
    """Add a segment to what the rows have so far, even and odd: the products of each lane, the rest
    of the estimates, the squared spreads.
    """
    part_e, part_o, estimate_e, estimate_o, squares_e, squares_o = sums
    rs_e, rs_o = rs_e.to(gl.float32), rs_o.to(gl.float32)
    part_e += (rs_e * mult)[:, :, None] * _weighted(c, t, 0)
    part_o += (rs_o * mult)[:, :, None] * _weighted(c, t, 1)
    estimate_e -= rs_e * offset
    estimate_o -= rs_o * offset
    squares_e += rs_e * rs_e * spread
    squares_o += rs_o * rs_o * spread
    return part_e, part_o, estimate_e, estimate_o, squares_e, squares_o


@gluon.jit
def _scan_bits_kernel(
    base,
    scale,
    direction,
    bias,
    bias_stride,
    temperature,
    seeds,
    steps,
    planes,
    numbers,
    constants,
    scores,
    bests,
    V,
    nblk,
    D4: gl.constexpr,
    D2: gl.constexpr,
    D1: gl.constexpr,
    PLANES: gl.constexpr,
    AT2: gl.constexpr,
    AT1: gl.constexpr,
    BLOCKS: gl.constexpr,
    WARPS: gl.constexpr,
    BOUNDS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_NOISE: gl.constexpr,
    PDL: gl.constexpr,
):
    """Scan of query program_id(1); tiles of 16 BLOCKS rows, dealt out in turn.

    `base` is int64[ceil(V/16), words, 8] here; `planes` int32[B, PLANES, 8] are the queries, those
    of the two-bit segment from AT2 on, of the one-bit segment from AT1 on. `bests` int64[B,
    programs] gets each program's best estimate with its row (`packed`).
    """
    L: gl.constexpr = gl.BlockedLayout([1, 1, 1], [1, 8, 4], [WARPS, 1, 1], [2, 1, 0])
    ROWS: gl.constexpr = gl.SliceLayout(2, L)
    WORDS: gl.constexpr = D4 // 8 + D2 // 16 + D1 // 32
    n = gl.program_id(1)
    start, programs = gl.program_id(0), gl.num_programs(0)
    block = gl.arange(0, BLOCKS, gl.SliceLayout(1, ROWS))
    lane = gl.arange(0, 8, gl.SliceLayout(0, ROWS))
    t = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
    tiles = (nblk + BLOCKS - 1) // BLOCKS
    words = _load_words(base, start * BLOCKS + block, nblk, lane, t, WORDS)
    own_rows = _load_numbers(direction, scale, start * BLOCKS + block, lane, V, D4, D2, D1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    own = numbers + n * NUMBERS
    at = planes + n * (PLANES * 8) + lane[None, :, None]
    along, shift, floor = gl.load(own + ALONG), gl.load(own + SHIFT), gl.load(own + FLOOR)
    mult4, mult2, mult1 = gl.load(own + MULT), gl.load(own + MULT + 1), gl.load(own + MULT + 2)
    spread4, spread2 = gl.load(own + SPREAD), gl.load(own + SPREAD + 1)
    spread1 = gl.load(own + SPREAD + 2)
    offset4 = mult4 * gl.load(constants + 1) * gl.load(own + QSUM)
    offset2 = mult2 * gl.load(constants + 8 + 1) * gl.load(own + QSUM + 1)
    offset1 = mult1 * gl.load(constants + 16 + 1) * gl.load(own + QSUM + 2)
    if D4 > 0:
        planes_h = _planes(at, t, 0, D4 // 16, 1)
        planes_l = _planes(at, t, D4 // 16, D4 // 16, 1)
    if D2 > 0:
        planes_2 = _planes(at + AT2 * 8, t, D4 // 8, D2 // 16, 1)
    if D1 > 0:
        planes_1 = _planes(at + AT1 * 8, t, D4 // 8 + D2 // 16, D1 // 32, 2)
    zero = gl.full([BLOCKS, 8, 4], 0, gl.int32, L)
    none = (zero, zero, zero, zero)
    best = gl.full([BLOCKS, 8], EMPTY, gl.int64, ROWS)
    for tile in range(start, tiles, programs):
        blk = tile * BLOCKS + block
        following = (tile + programs) * BLOCKS + block
        next_words = _load_words(base, following, nblk, lane, t, WORDS)
        next_rows = _load_numbers(direction, scale, following, lane, V, D4, D2, D1)
        pair = blk[:, None] * 8 + lane[None, :]
        even, odd = 2 * pair, 2 * pair + 1
        in_even, in_odd = even < V, odd < V
        part_e = gl.full([BLOCKS, 8, 4], 0.0, gl.float32, L)
        part_o = gl.full([BLOCKS, 8, 4], 0.0, gl.float32, L)
        estimate_e, estimate_o = along * own_rows[0] + shift, along * own_rows[1] + shift
        squares_e = gl.full([BLOCKS, 8], 0.0, gl.float32, ROWS) + floor
        sums = (part_e, part_o, estimate_e, estimate_o, squares_e, squares_e)
        if D4 > 0:
            c = _add_fields(words, planes_h, none, 0, D4 // 16)
            c = _add_fields(words, planes_l, c, D4 // 16, D4 // 16)
            sums = _add_segment(sums, c, t, own_rows[2], own_rows[3], mult4, offset4, spread4)
        if D2 > 0:
            c = _add_fields(words, planes_2, none, D4 // 8, D2 // 16)
            sums = _add_segment(sums, c, t, own_rows[4], own_rows[5], mult2, offset2, spread2)
        if D1 > 0:
            c = _add_run(words, planes_1, none, D4 // 8 + D2 // 16, D1 // 32, 0)
            sums = _add_segment(sums, c, t, own_rows[6], own_rows[7], mult1, offset1, spread1)
        part_e, part_o, estimate_e, estimate_o, squares_e, squares_o = sums
        estimate_e += gl.sum(part_e, 2)
        estimate_o += gl.sum(part_o, 2)
        if HAS_BIAS:
            own_bias = bias + n.to(gl.int64) * bias_stride
            estimate_e += gl.load(own_bias + even, in_even, 0)
            estimate_o += gl.load(own_bias + odd, in_odd, 0)
        if HAS_NOISE:
            drawn_e, drawn_o = gumbel_pairs(gl.load(seeds + n), gl.load(steps + n), pair)
            estimate_e += gl.load(temperature + n) * drawn_e
            estimate_o += gl.load(temperature + n) * drawn_o
        place = scores + n.to(gl.int64) * V
        if BOUNDS:
            gl.store(place + even, estimate_e + gl.sqrt(squares_e), in_even)
            gl.store(place + odd, estimate_o + gl.sqrt(squares_o), in_odd)
        else:
            gl.store(place + even, estimate_e, in_even)
            gl.store(place + odd, estimate_o, in_odd)
        best = gl.maximum(best, gl.where(in_even, packed(estimate_e, even), EMPTY))
        best = gl.maximum(best, gl.where(in_odd, packed(estimate_o, odd), EMPTY))
        words, own_rows = next_words, next_rows
    gl.store(bests + n * programs + start, gl.max(gl.max(best, 1), 0))
