"""What a GPU does in each step of a decode, from a trace of torch's profiler.

A step goes from the first kernel of one HEAD range to the first of the next, so it is a head, the
sampler and the body of the token after it. Kernels belong to the range on the host in which they
were launched (by the launch's correlation id), and so do those that start between the first and
the last of these, as the kernels of a replayed graph. A kernel may start before the one before it
has ended (programmatic dependent launch), so beside the sum of lengths there is the union of
intervals: the time in which anything runs.
"""

import bisect
import collections
import itertools
import statistics
from collections.abc import Iterable
from typing import Any

HEAD, SAMPLER = "HEAD", "SAMPLER"
GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
MOST_NAMES = 12
Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> float:
    """Length of what intervals (start, end) cover together."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def quantiles(values: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered),
        "p10": ordered[round(0.1 * last)],
        "p90": ordered[round(0.9 * last)],
    }


def step_times(events: list[dict[str, Any]], skip: int = 8) -> dict[str, Any]:
    """Times of decode steps in microseconds.

    Args:
        events: `traceEvents` of a Chrome trace with the ranges HEAD and SAMPLER.
        skip: the first so many steps, which are prefill and its echo.

    Returns:
        `steps`; of `step`, `head`, `sampler` each `union_us` and `sum_us`, and `step_wall_us`, as
        `quantiles`; `head_kernels`: mean microseconds a step and launches a step by name.

    Raises:
        ValueError: too few HEAD ranges, or one without work on the GPU.
    """
    work = _work_by_correlation(events)
    heads = _works_of(events, HEAD, work)
    samplers = _works_of(events, SAMPLER, work)
    if len(heads) < skip + 3:
        raise ValueError(f"{len(heads)} HEAD ranges in the trace: wanted {skip + 3} or more")
    if not all(heads):
        raise ValueError("a HEAD range launched nothing: no kernel in the trace has its id")
    everything = sorted(
        (event["ts"], event["ts"] + event.get("dur", 0))
        for event in events
        if event.get("cat") in GPU_WORK
    )
    starts = [start for start, _ in everything]
    begins = [min(item["ts"] for item in head) for head in heads][skip:]
    steps = [
        everything[bisect.bisect_left(starts, first) : bisect.bisect_left(starts, after)]
        for first, after in itertools.pairwise(begins)
    ]
    own = [[_interval(item) for item in head] for head in heads[skip:-1]]
    drawn = [[_interval(item) for item in sampler] for sampler in samplers[skip:-1]]
    found: dict[str, Any] = {"steps": len(steps)}
    for name, parts in (("step", steps), ("head", own), ("sampler", drawn)):
        if parts:
            found[f"{name}_union_us"] = quantiles([union(part) for part in parts])
            found[f"{name}_sum_us"] = quantiles([sum(e - s for s, e in part) for part in parts])
    walls = [after - first for first, after in itertools.pairwise(begins)]
    found["step_wall_us"] = quantiles(walls)
    found["head_kernels"] = _names(heads[skip:-1])
    found["sampler_kernels"] = _names(samplers[skip:-1])
    return found


def _interval(event: dict[str, Any]) -> Interval:
    return event["ts"], event["ts"] + event.get("dur", 0)


def _work_by_correlation(events: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = collections.defaultdict(list)
    for event in events:
        if event.get("cat") in GPU_WORK:
            found[event.get("args", {}).get("correlation", -1)].append(event)
    return found


def _works_of(
    events: list[dict[str, Any]], name: str, work: dict[int, list[dict[str, Any]]]
) -> list[list[dict[str, Any]]]:
    """GPU work of each range of a name, in the order of the ranges."""
    kernels = sorted(
        (event for event in events if event.get("cat") == "kernel"), key=lambda item: item["ts"]
    )
    begins = [kernel["ts"] for kernel in kernels]
    launches = sorted(
        (event["ts"], event["args"]["correlation"], event["tid"])
        for event in events
        if event.get("cat") in LAUNCHES and "correlation" in event.get("args", {})
    )
    starts = [launch[0] for launch in launches]
    ranges = sorted(
        (event["ts"], event["ts"] + event["dur"], event["tid"])
        for event in events
        if event.get("cat") == "user_annotation" and event.get("name") == name
    )
    found = []
    for start, end, thread in ranges:
        inside = launches[bisect.bisect_left(starts, start) : bisect.bisect_right(starts, end)]
        own = [item for _, number, tid in inside if tid == thread for item in work.get(number, [])]
        if own:
            first, last = min(item["ts"] for item in own), max(_interval(item)[1] for item in own)
            between = kernels[bisect.bisect_left(begins, first) : bisect.bisect_left(begins, last)]
            known = {id(item) for item in own}
            own += [kernel for kernel in between if id(kernel) not in known]
        found.append(own)
    return found


def _names(parts: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Kernels of some ranges: microseconds and launches a range, the longest first."""
    times: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    for part in parts:
        for item in part:
            times[item["name"]] += item.get("dur", 0)
            counts[item["name"]] += 1
    return [
        {
            "name": name[:120],
            "us": round(total / len(parts), 3),
            "launches": round(counts[name] / len(parts), 2),
        }
        for name, total in times.most_common(MOST_NAMES)
    ]
