"""Noise in eager torch: the specification. 32-bit words live in int64 tensors."""

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
DRAWN = 2**22
"""Perturbed logits held at a time by `draw`."""
MASK = 0xFFFFFFFF

SQRT_HALF_BITS = 0x3F3504F3
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
"""ln 2 in two float32: 9 bits, so that times an exponent it is exact, and the rest."""
LOG_TERMS = (
    -0.07634496688842773,
    0.1276157647371292,
    -0.13160182535648346,
    0.14201757311820984,
    -0.16623356938362122,
    0.20001226663589478,
    -0.2500081956386566,
    0.3333333134651184,
)
"""P(f) = (log1p(f) - f + f^2/2) / f^3 for f in [sqrt(1/2) - 1, sqrt(2) - 1], highest power first;
least maximum of the error relative to log1p(f), 0.06 ulp after rounding to float32."""


def philox(seed: int, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox 4x32-10.

    Args:
        seed: the key, 64 bits.
        counter: four `int64[...]` with values of 32 bits, lowest first; shapes broadcast.

    Returns:
        Four words, `int64[...]`, values of 32 bits.
    """
    c0, c1, c2, c3 = counter
    key0, key1 = seed & MASK, seed >> 32
    for _ in range(ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # wrap at 64 bits
        c0, c1 = (product1 >> 32) & MASK ^ c1 ^ key0, product1 & MASK
        c2, c3 = (product0 >> 32) & MASK ^ c3 ^ key1, product0 & MASK
        key0, key1 = (key0 + KEY_STEPS[0]) & MASK, (key1 + KEY_STEPS[1]) & MASK
    return c0, c1, c2, c3


def reduced(mantissa: Tensor, exponent: Tensor) -> Tensor:
    """ln((1 + mantissa) 2^exponent) of float32 `mantissa` in [sqrt(1/2) - 1, sqrt(2) - 1]."""
    f, e = mantissa, exponent.float()
    square = f * f
    p = torch.full_like(f, LOG_TERMS[0])
    for term in LOG_TERMS[1:]:
        p = p * f + term
    tail = (f * square) * p + e * LN2_LOW
    return e * LN2_HIGH + (f + (tail - 0.5 * square))


def split(value: Tensor) -> tuple[Tensor, Tensor]:
    """Positive normal float32 as (m - 1, e): value = m 2^e, m in [sqrt(1/2), sqrt(2))."""
    bits = value.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    return (bits - (exponent << 23)).view(torch.float32) - 1, exponent


def to_gumbel(high: Tensor, low: Tensor) -> Tensor:
    """Gumbel noise of two words: float32[...]."""
    upper = high >= 2**31  # x > 1/2: complement, and 1 - x is the small one
    flip = upper.long() * MASK
    small = (high ^ flip).float() * 2.0**-32 + ((low ^ flip).float() * 2.0**-64 + 2.0**-65)
    mantissa, exponent = split(small)
    near = small <= 1 - 0.5**0.5  # 1 - s needs no halving
    one_minus = torch.where(near, -small, 1 - 2 * small)
    f = torch.where(upper, mantissa, one_minus)
    e = torch.where(upper, exponent, -(~near).int())
    return -reduced(*split(-reduced(f, e)))


def _noise(seed: int, steps: Tensor, rows: Tensor) -> Tensor:
    counter = (rows >> 1, torch.zeros_like(rows), steps & MASK, steps >> 32)
    w0, w1, w2, w3 = philox(seed, counter)
    odd = (rows & 1).bool()
    return to_gumbel(torch.where(odd, w2, w0), torch.where(odd, w3, w1))


def gumbel(seed: int, steps: Tensor, vocab_size: int) -> Tensor:
    """Noise of all rows at some steps, on the device of `steps`: float32[n, V]."""
    return _noise(seed, steps[:, None], torch.arange(vocab_size, device=steps.device)[None])


def gumbel_at(seed: int, step: int, rows: Tensor) -> Tensor:
    """Noise of some rows at one step: float32[k]."""
    return _noise(seed, torch.tensor(step), rows)


def add_gumbel(estimates: Tensor, seed: int, steps: Tensor, temperatures: Tensor) -> Tensor:
    """Perturb in place: float32[n, V]."""
    return estimates.add_(temperatures[:, None] * gumbel(seed, steps, estimates.shape[1]))


def draw(
    logits: Tensor, seed: int, steps: Tensor, temperature: float, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Winning positions int64[n] and their perturbed logits float32[n]."""
    rows = torch.arange(logits.shape[0]) if rows is None else rows
    winners = torch.empty(steps.shape[0], dtype=torch.int64)
    values = torch.empty(steps.shape[0], dtype=torch.float32)
    scale = torch.tensor(temperature, dtype=torch.float32)
    for start in range(0, steps.shape[0], max(1, DRAWN // logits.shape[0])):
        part = slice(start, start + max(1, DRAWN // logits.shape[0]))
        scores = logits + scale * _noise(seed, steps[part, None], rows[None])
        values[part] = scores.max(1).values
        winners[part] = (scores == values[part, None]).int().argmax(1)
    return winners, values
