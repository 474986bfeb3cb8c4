"""Two models' scores on the same questions: standard errors and a paired bootstrap.

Questions of one document are no independent samples, so everything is counted by group: the
standard error is the cluster-robust one, and the bootstrap draws groups with their questions. A
mean may be weighted (tokens of a text) and exponentiated (perplexity).
"""

import math
from typing import Any

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95


def compare(
    base: list[float],
    value: list[float],
    groups: list[Any],
    seed: int,
    *,
    weights: list[float] | None = None,
    exponential: bool = False,
) -> dict[str, Any]:
    """Both means, their standard errors, and the paired difference or ratio.

    Args:
        base: the base's score of each question.
        value: the other model's.
        groups: what each question belongs to.
        seed: of the bootstrap.
        weights: of the questions; None: all alike.
        exponential: compare exp(mean), as a ratio.

    Returns:
        `base`, `value`, `difference` or `ratio`, `base_stderr`, `stderr`, `difference_stderr` or
        `ratio_stderr`, `interval` of the difference or ratio (95 %), `n`, `groups`. Errors and
        interval are None for a single group: nothing is known of another one.
    """
    scores = np.array([base, value], dtype=np.float64)
    w = np.ones(len(base)) if weights is None else np.array(weights, dtype=np.float64)
    _, place = np.unique([str(g) for g in groups], return_inverse=True)
    count = int(place.max()) + 1
    means = scores @ w / w.sum()
    errors = [_stderr(x - m, w, place, count) for x, m in zip(scores, means, strict=True)]
    gaps = scores[1] - scores[0]
    gap_error = _stderr(gaps - gaps @ w / w.sum(), w, place, count)
    sums = np.bincount(place, w * gaps), np.bincount(place, w)
    drawn = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    gap_means = sums[0][drawn].sum(1) / sums[1][drawn].sum(1)
    tail = (1 - CONFIDENCE) / 2
    interval = [float(x) for x in np.quantile(gap_means, [tail, 1 - tail])]
    found: dict[str, Any] = {"n": len(base), "groups": count}
    if exponential:
        shown = [math.exp(m) for m in means]
        ratio = shown[1] / shown[0]
        errors = [None if e is None else s * e for s, e in zip(shown, errors, strict=True)]
        found |= {"base": shown[0], "value": shown[1], "ratio": ratio}
        found["ratio_stderr"] = None if gap_error is None else ratio * gap_error
        interval = [math.exp(x) for x in interval]
    else:
        found |= {"base": float(means[0]), "value": float(means[1])}
        found |= {"difference": float(means[1] - means[0]), "difference_stderr": gap_error}
    found |= {"base_stderr": errors[0], "stderr": errors[1]}
    return found | {"interval": interval if count > 1 else None}


def _stderr(
    centred: np.ndarray, weights: np.ndarray, place: np.ndarray, count: int
) -> float | None:
    """Of a weighted mean, by group; None for one group."""
    if count < 2:
        return None
    sums = np.bincount(place, weights * centred)
    return float(math.sqrt(count / (count - 1) * (sums @ sums)) / weights.sum())
