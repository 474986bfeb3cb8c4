"""Counter-based Gumbel noise: a sample of softmax(l / T) is the argmax of l / T + g.

The noise of a row v at a step of a seed is a function of these three numbers, so it does not depend
on the batch, on the order of calls, or on which other rows are asked for. Philox 4x32-10 (Salmon,
Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; SC'11) turns a counter into four
32-bit words:

    key     = (seed mod 2^32, seed div 2^32)
    counter = (v div 2, 0, step mod 2^32, step div 2^32)
    words   = w0, w1 for even v; w2, w3 for odd v              (hi, lo below)

Two words are one uniform number of 64 bits, and a Gumbel number is large where it is small:

    x = (2^32 hi + lo + 1/2) / 2^64,   g = -ln(-ln(1 - x)),    0 < x < 1,  -3.81 < g < 45.06

A float32 x near 1 would have no digits left, so the smaller of x and 1 - x is computed. The bits of
the other one are the complement of its own, so with h, l = hi, lo or both complemented (h < 2^31),

    s = float32(h) 2^-32 + (float32(l) 2^-64 + 2^-65)    min(x, 1 - x), to 1 ulp at any size
    E = -log1p(-s) where x is the smaller, else -log(s)
    g = -log(E)

Both tails keep all their digits: the error is below 2 units in the last place of max(|g|, 1) (1.5
measured). log is the textbook reduction to m in [sqrt(1/2), sqrt(2)) and f - f^2/2 + f^3 P(f) with
f = m - 1, P of degree 7 fitted here to 0.06 ulp. Every operation is a single correctly rounded
float32 one in a stated order, never fused, so all implementations return the same bits on every
processor.
"""

import math

import torch
from torch import Tensor

from flashhead.errors import FlashHeadError
from flashhead.ops.dispatch import require_host_impl

SMALLEST_GUMBEL, LARGEST_GUMBEL = -3.81, 45.06
"""No noise is outside: x is a multiple of 2^-65 between 2^-65 and 1 - 2^-65."""


def gumbel(seed: int, steps: Tensor, vocab_size: int, *, impl: str) -> Tensor:
    """Gumbel noise of all rows at n steps.

    Distributed as `-torch.empty(n, vocab_size).exponential_().log()`.

    Args:
        seed: 0 to 2^64 - 1.
        steps: `int64[n]`, 0 or more, in any order.
        vocab_size: rows.
        impl: "cpu", "triton" or "reference".

    Returns:
        `float32[n, vocab_size]`; a row of it depends on its step only.

    Raises:
        FlashHeadError: `seed`, `steps` or `vocab_size` out of range.
    """
    _check(seed, steps)
    if vocab_size < 0:
        raise FlashHeadError(f"vocab_size={vocab_size}: wanted 0 or more")
    if impl == "cpu":
        from flashhead.ops.noise import cpu

        return cpu.gumbel(seed, steps, vocab_size)
    if impl == "triton":
        from flashhead.ops.noise import triton

        return triton.gumbel(seed, steps, vocab_size)
    require_host_impl(impl)
    from flashhead.ops.noise import reference

    return reference.gumbel(seed, steps, vocab_size)


def gumbel_at(seed: int, step: int, rows: Tensor, *, impl: str) -> Tensor:
    """Gumbel noise of some rows at one step; equals `gumbel(seed, [step], V)[0, rows]`, bit by bit.

    Args:
        seed: 0 to 2^64 - 1.
        step: 0 or more.
        rows: `int64[k]`, each 0 to 2^33 - 1.
        impl: "cpu" or "reference".

    Returns:
        `float32[k]`.

    Raises:
        FlashHeadError: `seed`, `step` or `rows` out of range.
    """
    _check(seed, torch.tensor([step], dtype=torch.int64))
    _check_rows(rows)
    require_host_impl(impl)
    if impl == "cpu":
        from flashhead.ops.noise import cpu

        return cpu.gumbel_at(seed, step, rows)
    from flashhead.ops.noise import reference

    return reference.gumbel_at(seed, step, rows)


def add_gumbel(
    estimates: Tensor, seed: int, steps: Tensor, temperatures: Tensor, *, impl: str
) -> Tensor:
    """Perturb logits in place; equals `estimates += temperatures[:, None] * gumbel(...)`.

    The argmax of a row of exact logits is then a sample of softmax(logits / temperature), and at
    temperature 0 the greedy token.

    Args:
        estimates: `float32[n, V]`, contiguous; changed.
        seed: 0 to 2^64 - 1.
        steps: `int64[n]`, 0 or more.
        temperatures: `float32[n]`, 0 or more.
        impl: "cpu" or "reference".

    Returns:
        `estimates`.

    Raises:
        FlashHeadError: an argument has another type, shape or range.
    """
    _check(seed, steps)
    n = steps.shape[0]
    floats = estimates.dtype == torch.float32 and temperatures.dtype == torch.float32
    shaped = estimates.dim() == 2 and estimates.shape[0] == n and temperatures.shape == (n,)
    if not (floats and shaped and estimates.is_contiguous()):
        got = f"{estimates.dtype} {list(estimates.shape)}, {list(temperatures.shape)} temperatures"
        raise FlashHeadError(f"estimates is {got}: wanted contiguous float32 [{n}, V] and [{n}]")
    if not bool((temperatures >= 0).all()):
        raise FlashHeadError(f"temperatures={temperatures.tolist()}: wanted 0 or more")
    require_host_impl(impl)
    if impl == "cpu":
        from flashhead.ops.noise import cpu

        return cpu.add_gumbel(estimates, seed, steps, temperatures)
    from flashhead.ops.noise import reference

    return reference.add_gumbel(estimates, seed, steps, temperatures)


def draw(
    logits: Tensor,
    seed: int,
    steps: Tensor,
    temperature: float,
    rows: Tensor | None = None,
    *,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Draw n times from one distribution: the perturbed argmax of each step.

    Equals, without its n times k numbers in memory, and with the lowest position among equals,

        add_gumbel(logits.repeat(n, 1), seed, steps, torch.full((n,), temperature)).max(1)

    where the logits are of rows 0, 1, ... With upper bounds in place of unknown logits, a winner
    whose logit is exact is the winner of the exact logits.

    Args:
        logits: `float32[k]`, k >= 1; -inf never wins.
        seed: 0 to 2^64 - 1.
        steps: `int64[n]`, 0 or more.
        temperature: above 0.
        rows: `int64[k]`, whose noise to take, or None for 0, 1, ..., k - 1.
        impl: "cpu" or "reference".

    Returns:
        Positions in `logits` that win, `int64[n]`, and their perturbed logits, `float32[n]`.

    Raises:
        FlashHeadError: an argument out of range, or no logit to choose from.
    """
    _check(seed, steps)
    if logits.dtype != torch.float32 or logits.dim() != 1:
        raise FlashHeadError(f"logits is {logits.dtype} {list(logits.shape)}: wanted float32 [k]")
    if logits.numel() == 0 or not -math.inf < float(logits.max()) < math.inf:
        raise FlashHeadError("logits: wanted one that is finite, and none that is NaN or +inf")
    if not 0 < temperature < math.inf:
        raise FlashHeadError(f"temperature={temperature}: wanted above 0")
    if rows is not None:
        _check_rows(rows)
        if rows.shape != logits.shape:
            raise FlashHeadError(f"rows is {len(rows)} rows: wanted {len(logits)}, one a logit")
    require_host_impl(impl)
    if impl == "cpu":
        from flashhead.ops.noise import cpu

        return cpu.draw(logits, seed, steps, temperature, rows)
    from flashhead.ops.noise import reference

    return reference.draw(logits, seed, steps, temperature, rows)


def _check_rows(rows: Tensor) -> None:
    if rows.dtype != torch.int64 or rows.dim() != 1:
        raise FlashHeadError(f"rows is {rows.dtype} {list(rows.shape)}: wanted int64 [k]")
    if rows.numel() > 0 and not 0 <= int(rows.min()) <= int(rows.max()) < 2**33:
        raise FlashHeadError(f"rows from {int(rows.min())} to {int(rows.max())}: wanted 0 or more")


def _check(seed: int, steps: Tensor) -> None:
    if not 0 <= seed < 2**64:
        raise FlashHeadError(f"seed={seed}: wanted 0 to 2^64 - 1")
    if steps.dtype != torch.int64 or steps.dim() != 1:
        raise FlashHeadError(f"steps is {steps.dtype} {list(steps.shape)}: wanted int64 [n]")
    if bool((steps < 0).any()):
        raise FlashHeadError(f"steps={steps.tolist()}: wanted 0 or more")
