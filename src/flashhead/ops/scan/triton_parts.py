"""What the GPU kernels of a search share: numbers of a query, order of scores, dot products.

A field of a word is masked where it lies, so a one-bit code counts 1 or 2, a two-bit code 1 or 4
times itself: two sums instead of seven or two more shifts. Where inline assembly does not exist
(the interpreter, AMD) FAST is off and the same sums are taken by shifts and masks.
"""

import triton
import triton.language as tl

from flashhead.ops.scan import layout

PAD = tl.constexpr(layout.FIELD_WORDS)
NUMBERS = tl.constexpr(layout.NUMBERS)
MULT, QSUM = tl.constexpr(layout.NUMBER_MULT), tl.constexpr(layout.NUMBER_QSUM)
ALONG, SHIFT = tl.constexpr(layout.NUMBER_ALONG), tl.constexpr(layout.NUMBER_SHIFT)
FLOOR = tl.constexpr(layout.NUMBER_FLOOR)
SPREAD, SPREAD_FINE = tl.constexpr(layout.NUMBER_SPREAD), tl.constexpr(layout.NUMBER_SPREAD_FINE)
VARIANCE = tl.constexpr(layout.NUMBER_VARIANCE)
VARIANCE_FINE = tl.constexpr(layout.NUMBER_VARIANCE_FINE)
MINUS_INFINITY = tl.constexpr(-0x7F800001)
"""`ordered(-inf)`."""
EMPTY = tl.constexpr(-0x7F800001 << 32)
"""A `packed` without a row: its score is -inf."""


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
def dot_one_bit(x, q0, q1, q2, q3, q4, q5, q6, q7, low, high, FAST: tl.constexpr):
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
