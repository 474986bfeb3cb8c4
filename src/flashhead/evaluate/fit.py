"""Goodness of fit and equivalence of draws, against known probabilities.

**Fit.** G = 2 sum O ln(O / E) over bins, divided by Williams' correction
q = 1 + (sum n/E - 1) / (6 n dof), without which bins of ten make G about 2 % too large, follows
chi-square with bins - 1 degrees of freedom. Tokens with an expected count of 10 or more are bins of
their own; the rest, in descending order of probability, are pooled to bins of 10 to 30. p-values of
independent draws are combined by Fisher: -2 sum ln p is chi-square with 2N degrees of freedom.

**Equivalence.** A fit that is not rejected proves nothing, so the second question is turned round:
which distance can be excluded? X^2 = sum (O - E)^2 / E is noncentral chi-square with noncentrality
n chi^2(q || p) for draws from q instead of p, and TV(q, p) <= sqrt(chi^2(q || p)) / 2. The largest
noncentrality that would still give so small an X^2 with probability alpha is the limit; that is one
one-sided test of "TV >= margin" (the other side, TV >= 0, needs none).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

LEAST_EXPECTED = 10.0


def chi2_sf(x: float, dof: float) -> float:
    """Probability that a chi-square variable exceeds x; 1 where there is no freedom."""
    if dof <= 0:
        return 1.0
    half = torch.tensor([dof / 2, x / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def pooled(expected: Tensor) -> Tensor:
    """Bins of tokens, so that each is expected `LEAST_EXPECTED` times or more.

    Args:
        expected: `float64[V]`, expected counts; 0: the token cannot occur.

    Returns:
        Bin of each token, `int64[V]`, from 0; tokens that cannot occur are in the last.
    """
    counts, order = expected.sort(descending=True)
    alone = int((counts >= LEAST_EXPECTED).sum())
    tail = counts[alone:]
    # A bin holds what starts within 20 of the running sum. No count reaches 10: each has over 10.
    starts = (tail.cumsum(0) - tail).clamp(max=max(0.0, float(tail[tail > 0].sum()) - 1e-9))
    bins = torch.cat([torch.arange(alone), alone + (starts / (2 * LEAST_EXPECTED)).long()])
    last = bins == bins[-1]
    if float(counts[last].sum()) < LEAST_EXPECTED:
        bins[last] = max(0, int(bins[-1]) - 1)
    return torch.empty_like(bins).index_put_((order,), bins)


def binned(values: Tensor, bins: Tensor) -> Tensor:
    """Sums of `values[V]` in each bin: `float64[B]`."""
    sums = torch.zeros(int(bins.max()) + 1, dtype=torch.float64)
    return sums.index_add_(0, bins, values.double())


def g_test(observed: Tensor, expected: Tensor) -> tuple[float, int]:
    """Williams-corrected G and its degrees of freedom.

    Args:
        observed: `float64[B]`, counts.
        expected: `float64[B]`, above 0, with the same sum.
    """
    dof = len(expected) - 1
    if dof == 0:
        return 0.0, 0
    n = float(expected.sum())
    g = 2 * float(torch.special.xlogy(observed, observed / expected).sum())
    correction = 1 + (float((n / expected).sum()) - 1) / (6 * n * dof)
    return g / correction, dof


def fisher(p_values: list[float]) -> float:
    """One p-value of many independent ones."""
    statistic = -2 * math.fsum(math.log(max(p, 1e-300)) for p in p_values)
    return chi2_sf(statistic, 2 * len(p_values))


def chi_square(observed: Tensor, expected: Tensor) -> tuple[float, int]:
    """Pearson's X^2 and its degrees of freedom; arguments as `g_test`."""
    return float(((observed - expected).square() / expected).sum()), len(expected) - 1


def noncentral_cdf(x: float, dof: int, noncentrality: float) -> float:
    """P(X^2 <= x) of noncentral chi-square: a Poisson mixture of chi-squares, dof >= 1."""
    half = noncentrality / 2
    width = 12 * math.sqrt(half + 1) + 40
    j = torch.arange(max(0, int(half - width)), int(half + width) + 1, dtype=torch.float64)
    weights = torch.exp(torch.special.xlogy(j, torch.tensor(half)) - half - torch.lgamma(j + 1))
    below = torch.special.gammainc(dof / 2 + j, torch.tensor(x / 2, dtype=torch.float64))
    return float((weights * below).sum())


def noncentrality_limit(x: float, dof: int, alpha: float) -> float:
    """Largest noncentrality that still gives X^2 <= x with probability `alpha`."""
    if dof == 0 or noncentral_cdf(x, dof, 0.0) <= alpha:
        return 0.0
    return _bisect(lambda value: noncentral_cdf(x, dof, value) > alpha, x + dof + 10)


def poisson_limit(count: int, alpha: float) -> float:
    """Largest mean that still gives `count` or fewer with probability `alpha`."""
    shape = torch.tensor(count + 1.0, dtype=torch.float64)

    def too_small(mean: float) -> bool:
        return float(torch.special.gammaincc(shape, torch.tensor(mean).double())) > alpha

    return _bisect(too_small, count + 10.0)


def _bisect(too_small: Callable[[float], bool], start: float) -> float:
    low, high = 0.0, start
    while too_small(high):
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if too_small(middle) else (low, middle)
    return high
