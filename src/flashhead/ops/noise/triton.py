"""Noise in Triton: `reference` bit by bit, also inside the kernels of a search.

Every operation is one correctly rounded float32 one, so kernels that call `gumbel_pairs` must be
launched with `enable_fp_fusion=False`: a fused multiply-add rounds once where `api` rounds twice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashhead.ops.noise.reference import (
    KEY_STEPS,
    LN2_HIGH,
    LN2_LOW,
    LOG_TERMS,
    MULTIPLIERS,
    ROUNDS,
    SQRT_HALF_BITS,
)
from flashhead.ops.noise.reference import MASK as WORD_MASK

_A, _B = (tl.constexpr(word) for word in MULTIPLIERS)
_KEY_A, _KEY_B = (tl.constexpr(word) for word in KEY_STEPS)
_ROUNDS = tl.constexpr(ROUNDS)
_SQRT_HALF = tl.constexpr(SQRT_HALF_BITS)
_HIGH, _LOW = tl.constexpr(LN2_HIGH), tl.constexpr(LN2_LOW)
_P0, _P1, _P2, _P3, _P4, _P5, _P6, _P7 = (tl.constexpr(term) for term in LOG_TERMS)
_NEAR = tl.constexpr(1 - 0.5**0.5)
BLOCK_PAIRS = 512


@triton.jit
def _philox(c0, c2, c3, k0, k1):
    """Philox 4x32-10 of the counter (c0, 0, c2, c3): four uint32."""
    c1 = c0 * 0
    c2 = c1 + c2
    c3 = c1 + c3
    for _ in tl.static_range(_ROUNDS):
        high_a, low_a = tl.umulhi(c0, c1 * 0 + _A), c0 * _A
        high_b, low_b = tl.umulhi(c2, c1 * 0 + _B), c2 * _B
        c0, c1 = high_b ^ c1 ^ k0, low_b
        c2, c3 = high_a ^ c3 ^ k1, low_a
        k0 += _KEY_A
        k1 += _KEY_B
    return c0, c1, c2, c3


@triton.jit
def _log(f, e):
    """ln((1 + f) 2^e), f in [sqrt(1/2) - 1, sqrt(2) - 1]."""
    square = f * f
    p = f * _P0 + _P1
    p = p * f + _P2
    p = p * f + _P3
    p = p * f + _P4
    p = p * f + _P5
    p = p * f + _P6
    p = p * f + _P7
    tail = (f * square) * p + e * _LOW
    return e * _HIGH + (f + (tail - 0.5 * square))


@triton.jit
def _split(value):
    bits = value.to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF) >> 23
    return (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0, exponent


@triton.jit
def _to_gumbel(high, low):
    upper = high >= 0x80000000
    high = tl.where(upper, high ^ 0xFFFFFFFF, high)
    low = tl.where(upper, low ^ 0xFFFFFFFF, low)
    small = high.to(tl.float32) * 2.0**-32 + (low.to(tl.float32) * 2.0**-64 + 2.0**-65)
    mantissa, exponent = _split(small)
    near = small <= _NEAR
    f = tl.where(upper, mantissa, tl.where(near, -small, 1.0 - 2.0 * small))
    e = tl.where(upper, exponent, tl.where(near, 0, -1))
    own, power = _split(-_log(f, e.to(tl.float32)))
    return -_log(own, power.to(tl.float32))


@triton.jit
def gumbel_pairs(seed, step, pair):
    """Noise of rows 2 pair and 2 pair + 1; seed and step int64, `pair` int32: two float32."""
    c2, c3 = step.to(tl.uint32), (step >> 32).to(tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    w0, w1, w2, w3 = _philox(pair.to(tl.uint32), c2, c3, k0, k1)
    return _to_gumbel(w0, w1), _to_gumbel(w2, w3)


@triton.jit
def gumbel_at(seed, step, row):
    """Noise of rows: float32 of the shape of `row`."""
    c2, c3 = step.to(tl.uint32), (step >> 32).to(tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    w0, w1, w2, w3 = _philox((row >> 1).to(tl.uint32), c2, c3, k0, k1)
    odd = (row & 1) == 1
    return _to_gumbel(tl.where(odd, w2, w0), tl.where(odd, w3, w1))


@triton.jit
def _gumbel_kernel(out, seed, steps, V, BLOCK_PAIRS: tl.constexpr):
    n = tl.program_id(1)
    pair = tl.program_id(0) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
    even, odd = gumbel_pairs(tl.load(seed), tl.load(steps + n), pair)
    rows = out + n.to(tl.int64) * V + 2 * pair
    tl.store(rows, even, mask=2 * pair < V)
    tl.store(rows + 1, odd, mask=2 * pair + 1 < V)


def gumbel(seed: int, steps: Tensor, vocab_size: int) -> Tensor:
    """Noise of all rows at some steps, on the device of `steps`: float32[n, V]."""
    out = torch.empty(len(steps), vocab_size, device=steps.device)
    key = signed(seed)
    grid = (triton.cdiv(vocab_size, 2 * BLOCK_PAIRS), len(steps))
    if out.numel():
        _gumbel_kernel[grid](
            out,
            torch.tensor([key], device=steps.device),
            steps,
            vocab_size,
            BLOCK_PAIRS=BLOCK_PAIRS,
            enable_fp_fusion=False,
        )
    return out


def signed(seed: int) -> int:
    """A seed of 64 bits as the int64 of the same bits."""
    return seed - 2**64 if seed >> 63 else seed


assert WORD_MASK == 0xFFFFFFFF
