"""Scan of several queries in Triton: codes as int8 operands of the tensor cores.

The packed bytes get their place among the threads once and are unpacked there, in registers; the
operands of the queries are made before the loop over tiles and stay in shared memory. Pilots and
what is stored: `triton`.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flashhead.ops.noise.triton import gumbel_at, gumbel_pairs
from flashhead.ops.scan.triton_parts import (
    ALONG,
    FLOOR,
    MINUS_INFINITY,
    MULT,
    NUMBERS,
    PAD,
    QSUM,
    SHIFT,
    SPREAD,
    VARIANCE,
    ordered,
    packed,
    spread_of,
    unordered,
)

_TILE_BITS = tl.constexpr(0x3FF)
"""Low bits of a running maximum that say which tile it came from."""


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
    PADDED: tl.constexpr = (WORDS + PAD - 1) // PAD * PAD
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
    offset = tl.load(constant) * tl.load(own + QSUM + SLOT, here, 0)
    mult = tl.load(own + MULT + SLOT, here, 0)
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
    P4: tl.constexpr = (D4 // 16 + PAD - 1) // PAD * PAD * 4
    P2: tl.constexpr = (D2 // 16 + PAD - 1) // PAD * PAD * 4
    P1: tl.constexpr = (D1 // 16 + PAD - 1) // PAD * PAD * 4
    PB: tl.constexpr = (D1 // 32 + PAD - 1) // PAD * PAD * 8
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    own = numbers + n * NUMBERS
    q = query + n * ((P4 + P2 + P1 + PB) * 4)
    high_q = _operands(q, here, 0, D4 // 16, 2, BLOCK_W)
    low_q = _operands(q, here, D4 // 16, D4 // 16, 2, BLOCK_W)
    two_q = _operands(q + P4 * 4, here, D4 // 8, D2 // 16, 2, BLOCK_W)
    one_q = _operands(q + (P4 + P2 + P1) * 4, here, D4 // 8 + D2 // 16, D1 // 32, 1, BLOCK_W)
    along, shift = tl.load(own + ALONG, here, 0), tl.load(own + SHIFT, here, 0)
    floor = tl.load(own + FLOOR, here, 0)
    r = tl.arange(0, 64)
    top = tl.full([M, BLOCK_N], MINUS_INFINITY, tl.int32)
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
                squares += (rs4 * rs4)[:, None] * tl.load(own + SPREAD, here, 0)[None, :]
            if D2 > 0:
                squares += (rs2 * rs2)[:, None] * tl.load(own + SPREAD + 1, here, 0)[None, :]
            if D1 > 0:
                squares += (rs1 * rs1)[:, None] * tl.load(own + SPREAD + 2, here, 0)[None, :]
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
    error = tl.sqrt(spread_of(scale, own, row, here, V, VARIANCE, D4, D2, D1))
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
