"""Interleaved timing: every round runs every method once, so that a busy machine slows all of them.

What counts is the ratio to a baseline, taken round by round: two calls of one round see the same
machine. Absolute medians are reported beside it and depend on the load.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

COPY_BYTES = 2**29
"""Size of the buffer copied to measure the memory's bandwidth; larger than most caches."""


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile."""
    ordered = torch.tensor(samples, dtype=torch.float64)
    p10, p50, p90 = ordered.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    return p50, p10, p90


def interleave(
    methods: dict[str, Callable[[int], object]], baseline: str, *, rounds: int, warmup: int = 3
) -> dict[str, dict[str, Any]]:
    """Time methods against one of them in interleaved rounds, each round in another order.

    Args:
        methods: name to a call; it gets the number of the round, to pick its input by.
        baseline: name of the method that ratios are relative to.
        rounds: measured rounds.
        warmup: rounds that are thrown away first.

    Returns:
        For each name `median_ms, p10_ms, p90_ms, best_ms, ratio, ratio_p10, ratio_p90`; ratio 2:
        twice as fast as the baseline.
    """
    names = list(methods)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.perf_counter()
            methods[name](number)
            elapsed = time.perf_counter() - start
            if number >= warmup:
                samples[name].append(elapsed * 1e3)
    rows = {}
    for name in names:
        ratios = [base / own for base, own in zip(samples[baseline], samples[name], strict=True)]
        median, p10, p90 = quantiles(samples[name])
        ratio, ratio_p10, ratio_p90 = quantiles(ratios)
        rows[name] = {"median_ms": median, "p10_ms": p10, "p90_ms": p90}
        rows[name] |= {"best_ms": min(samples[name])}
        rows[name] |= {"ratio": ratio, "ratio_p10": ratio_p10, "ratio_p90": ratio_p90}
    return rows


def copy_bytes_per_sec(repeats: int = 7) -> float:
    """Bytes read plus bytes written a second by a large copy on torch's threads."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    target.copy_(source)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * COPY_BYTES / statistics.median(times)
