"""Noise on the CPU: plain loops that LLVM turns into vectors of Philox counters and logarithms.

The words of a strip go through the cache: one loop makes them, one turns them into noise. No libm
call and no fused multiply-add, so that vector and scalar lanes have the bits of the reference.
"""

import math

import numba
import numpy as np
import torch
from torch import Tensor

from flashhead.ops.noise import reference

_STRIP = 2048
"""Rows whose words fit in the first-level cache (16 kB)."""
_STRIPS_A_TASK = 4
_DRAW_STRIP = 256
"""Rows that are passed over together when none can win."""
_U32, _U64, _F32 = np.uint32, np.uint64, np.float32
_M0, _M1 = (np.uint64(value) for value in reference.MULTIPLIERS)
_K0, _K1 = (np.uint64(value) for value in reference.KEY_STEPS)
_ROUNDS = reference.ROUNDS
_MASK, _SHIFT = np.uint64(reference.MASK), np.uint64(32)
_SQRT_HALF = np.int32(reference.SQRT_HALF_BITS)
_LN2_HIGH, _LN2_LOW = _F32(reference.LN2_HIGH), _F32(reference.LN2_LOW)
_P7, _P6, _P5, _P4, _P3, _P2, _P1, _P0 = (_F32(term) for term in reference.LOG_TERMS)
_NEAR = _F32(1 - 0.5**0.5)
_LOW, _MIDDLE, _HIGH = _F32(2.0**-65), _F32(2.0**-64), _F32(2.0**-32)


@numba.njit(inline="always")
def _philox(c0, c2, c3, key0, key1):  # type: ignore[no-untyped-def]
    """Four words of the counter (c0, 0, c2, c3): uint32.

    Words are the lower halves of uint64, whose upper halves hold rubbish: the masked product is one
    instruction (`vpmuludq`), and nothing is packed or unpacked between rounds.
    """
    c1 = _U64(0)
    for _ in range(_ROUNDS):
        product0, product1 = (c0 & _MASK) * _M0, (c2 & _MASK) * _M1
        c0, c1 = (product1 >> _SHIFT) ^ c1 ^ key0, product1
        c2, c3 = (product0 >> _SHIFT) ^ c3 ^ key1, product0
        key0, key1 = key0 + _K0, key1 + _K1
    return _U32(c0), _U32(c1), _U32(c2), _U32(c3)


@numba.njit(inline="always")
def _reduced(f, e):  # type: ignore[no-untyped-def]
    square = f * f
    p = _P7
    p = p * f + _P6
    p = p * f + _P5
    p = p * f + _P4
    p = p * f + _P3
    p = p * f + _P2
    p = p * f + _P1
    p = p * f + _P0
    tail = (f * square) * p + e * _LN2_LOW
    return e * _LN2_HIGH + (f + (tail - _F32(0.5) * square))


@numba.njit(inline="always")
def _to_gumbel(high, low):  # type: ignore[no-untyped-def]
    upper = high >= _U32(2**31)
    if upper:
        high, low = _U32(~high), _U32(~low)
    small = np.float32(_F32(high) * _HIGH + (_F32(low) * _MIDDLE + _LOW))
    bits = small.view(np.int32)
    exponent = np.int32(np.int32(bits - _SQRT_HALF) >> np.int32(23))
    mantissa = np.int32(bits - np.int32(exponent << np.int32(23))).view(np.float32) - _F32(1)
    near = small <= _NEAR
    f = -small if near else _F32(1) - _F32(2) * small
    e = _F32(0) if near else _F32(-1)
    f, e = (mantissa, _F32(exponent)) if upper else (f, e)
    exponential = np.float32(-_reduced(f, e))  # Numba views what a cast made
    bits = exponential.view(np.int32)
    exponent = np.int32(np.int32(bits - _SQRT_HALF) >> np.int32(23))
    mantissa = np.int32(bits - np.int32(exponent << np.int32(23))).view(np.float32) - _F32(1)
    return -_reduced(mantissa, _F32(exponent))


@numba.njit(inline="always")
def _perturb(words, pairs, temperature, out):  # type: ignore[no-untyped-def]
    for i in range(pairs):
        out[2 * i] += temperature * _to_gumbel(words[0, i], words[1, i])
        out[2 * i + 1] += temperature * _to_gumbel(words[2, i], words[3, i])
    if out.shape[0] > 2 * pairs:
        out[2 * pairs] += temperature * _to_gumbel(words[0, pairs], words[1, pairs])


@numba.njit(inline="always")
def _fill(words, pairs, out):  # type: ignore[no-untyped-def]
    for i in range(pairs):
        out[2 * i] = _to_gumbel(words[0, i], words[1, i])
        out[2 * i + 1] = _to_gumbel(words[2, i], words[3, i])
    if out.shape[0] > 2 * pairs:
        out[2 * pairs] = _to_gumbel(words[0, pairs], words[1, pairs])


@numba.njit(parallel=True, cache=True)
def _gumbel(key0, key1, steps, temperatures, out):  # type: ignore[no-untyped-def]
    """Add temperature times noise, or write the noise where no temperatures are given."""
    n, vocab_size = out.shape
    task_rows = _STRIP * _STRIPS_A_TASK
    tasks = (vocab_size + task_rows - 1) // task_rows
    for task in numba.prange(n * tasks):
        q = task // tasks
        low, high = _U64(steps[q]) & _MASK, _U64(steps[q]) >> _SHIFT
        words = np.empty((4, _STRIP // 2), np.uint32)
        first = (task % tasks) * task_rows
        for start in range(first, min(vocab_size, first + task_rows), _STRIP):
            count = min(vocab_size - start, _STRIP)
            base = start // 2
            for i in range((count + 1) // 2):
                w0, w1, w2, w3 = _philox(_U64(base + i), low, high, key0, key1)
                words[0, i], words[1, i], words[2, i], words[3, i] = w0, w1, w2, w3
            if temperatures.shape[0] > 0:
                _perturb(words, count // 2, temperatures[q], out[q, start : start + count])
            else:
                _fill(words, count // 2, out[q, start : start + count])


@numba.njit(parallel=True, cache=True)
def _gumbel_at(key0, key1, step, rows, out):  # type: ignore[no-untyped-def]
    low, high = _U64(step) & _MASK, _U64(step) >> _SHIFT
    for task in numba.prange((rows.shape[0] + _STRIP - 1) // _STRIP):
        for i in range(task * _STRIP, min(rows.shape[0], (task + 1) * _STRIP)):
            w0, w1, w2, w3 = _philox(_U64(rows[i] >> 1), low, high, key0, key1)
            odd = rows[i] & 1 == 1
            out[i] = _to_gumbel(w2 if odd else w0, w3 if odd else w1)


@numba.njit(inline="always")
def _out_of_reach(best, peak, temperature, words):  # type: ignore[no-untyped-def]
    """Whether no row of a strip, none with a logit above `peak`, can be perturbed to `best`.

    g < -ln(x) and x >= hi / 2^32, so a gap of T b nats needs hi < 2^32 exp(-b). The gap is first
    made smaller by more than all roundings.
    """
    lowest = _U32(reference.MASK)
    for i in range(words.shape[1]):
        lowest = min(lowest, min(words[0, i], words[2, i]))
    slack = 1e-5 * (abs(best) + abs(peak) + 50 * temperature)
    return lowest > 2.0**32 * math.exp(-(best - peak - slack) / temperature)


@numba.njit(inline="always")
def _best(logits, noise, count, best, winner, first):  # type: ignore[no-untyped-def]
    """Best of `best` and a strip of perturbed logits; among equals the lowest position."""
    for i in range(count):
        value = np.float32(logits[i] + noise[i])
        if value > best or (value == best and first + i < winner):
            best, winner = value, first + i
    return best, winner


@numba.njit(parallel=True, cache=True)
def _draw(key0, key1, steps, temperature, logits, order, peaks, winners, values):  # type: ignore[no-untyped-def]
    """Strips in descending order of their highest logit, most of them without a logarithm."""
    for n in numba.prange(steps.shape[0]):
        low, high = _U64(steps[n]) & _MASK, _U64(steps[n]) >> _SHIFT
        words = np.empty((4, _DRAW_STRIP // 2), np.uint32)
        noise = np.empty(_DRAW_STRIP, np.float32)
        best, winner = np.float32(-np.inf), np.int64(-1)
        for s in range(order.shape[0]):
            first = order[s] * _DRAW_STRIP
            count = min(logits.shape[0] - first, _DRAW_STRIP)
            for i in range(_DRAW_STRIP // 2):
                w0, w1, w2, w3 = _philox(_U64(first // 2 + i), low, high, key0, key1)
                words[0, i], words[1, i], words[2, i], words[3, i] = w0, w1, w2, w3
            if s > 0 and _out_of_reach(best, peaks[s], temperature, words):
                continue
            for i in range(_DRAW_STRIP // 2):
                noise[2 * i] = temperature * _to_gumbel(words[0, i], words[1, i])
                noise[2 * i + 1] = temperature * _to_gumbel(words[2, i], words[3, i])
            best, winner = _best(logits[first:], noise, count, best, winner, first)
        winners[n], values[n] = winner, best


@numba.njit(parallel=True, cache=True)
def _draw_at(key0, key1, steps, temperature, logits, rows, winners, values):  # type: ignore[no-untyped-def]
    for n in numba.prange(steps.shape[0]):
        low, high = _U64(steps[n]) & _MASK, _U64(steps[n]) >> _SHIFT
        words = np.empty((2, _DRAW_STRIP), np.uint32)
        noise = np.empty(_DRAW_STRIP, np.float32)
        best, winner = np.float32(-np.inf), np.int64(-1)
        for first in range(0, rows.shape[0], _DRAW_STRIP):
            count = min(rows.shape[0] - first, _DRAW_STRIP)
            for i in range(count):
                w0, w1, w2, w3 = _philox(_U64(rows[first + i] >> 1), low, high, key0, key1)
                odd = rows[first + i] & 1 == 1
                words[0, i], words[1, i] = w2 if odd else w0, w3 if odd else w1
            for i in range(count):
                noise[i] = temperature * _to_gumbel(words[0, i], words[1, i])
            best, winner = _best(logits[first:], noise, count, best, winner, first)
        winners[n], values[n] = winner, best


def _key(seed: int) -> tuple[np.uint64, np.uint64]:
    return np.uint64(seed & reference.MASK), np.uint64(seed >> 32)


def gumbel(seed: int, steps: Tensor, vocab_size: int) -> Tensor:
    """Noise of all rows at some steps: float32[n, V]."""
    out = torch.empty(steps.shape[0], vocab_size, dtype=torch.float32)
    _gumbel(*_key(seed), steps.numpy(), np.empty(0, np.float32), out.numpy())
    return out


def gumbel_at(seed: int, step: int, rows: Tensor) -> Tensor:
    """Noise of some rows at one step: float32[k]."""
    out = torch.empty(rows.shape[0], dtype=torch.float32)
    _gumbel_at(*_key(seed), step, rows.numpy(), out.numpy())
    return out


def add_gumbel(estimates: Tensor, seed: int, steps: Tensor, temperatures: Tensor) -> Tensor:
    """Perturb in place: float32[n, V]."""
    _gumbel(*_key(seed), steps.numpy(), temperatures.numpy(), estimates.numpy())
    return estimates


def draw(
    logits: Tensor, seed: int, steps: Tensor, temperature: float, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Winning positions int64[n] and their perturbed logits float32[n]."""
    winners = torch.empty(steps.shape[0], dtype=torch.int64)
    values = torch.empty(steps.shape[0], dtype=torch.float32)
    arguments = (*_key(seed), steps.numpy(), np.float32(temperature), logits.numpy())
    if rows is not None:
        _draw_at(*arguments, rows.numpy(), winners.numpy(), values.numpy())
        return winners, values
    padding = -logits.shape[0] % _DRAW_STRIP
    padded = torch.nn.functional.pad(logits, (0, padding), value=-math.inf)
    peaks, order = padded.view(-1, _DRAW_STRIP).amax(1).sort(descending=True)
    order = order[: int((peaks > -math.inf).sum())]
    _draw(*arguments, order.numpy(), peaks.numpy(), winners.numpy(), values.numpy())
    return winners, values
