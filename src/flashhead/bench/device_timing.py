"""Timing on a CUDA device: graphs of several calls, interleaved, and single calls from Python.

A graph holds several calls, each on other hidden states and, in turn, on another copy of the
weights, so many that a round of copies is more than twice the L2 cache: no call finds its weights
there. CUDA events around a replay, divided by the calls, are what a call costs inside a decoding
loop that is itself a graph. A call from Python is timed alone on an idle device:

    python_us  events in the stream just before and just after the call: what the caller waits for
    host_us    time until the call returns, without waiting for the device
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashhead.bench.timing import quantiles

COPY_BYTES = 2**30
LEAST_CALLS = 16
"""Calls a graph, at least."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A line of the table at one batch size.

    Args:
        name: of the line.
        call: enqueues call number i on the current stream, with states and copy of its turn.
        copies: of what it reads.
        bytes_read: a call, or None: not known.
        gives_tokens: whether it returns `int64[n]` tokens, not logits.
        variant: which of several ways to the same result runs.
    """

    name: str
    call: Callable[[int], Tensor]
    copies: int
    bytes_read: float | None
    gives_tokens: bool = False
    variant: str | None = None

    @property
    def calls(self) -> int:
        """Calls a graph: each copy has its turn."""
        return max(LEAST_CALLS, self.copies)


@dataclasses.dataclass(frozen=True)
class Captured:
    """A graph of some calls, and the tokens its calls write at every replay."""

    graph: torch.cuda.CUDAGraph
    calls: int
    tokens: list[Tensor]


def copies_needed(bytes_read: int, l2_bytes: int) -> int:
    """Copies, two or more, whose bytes together exceed twice the L2 cache."""
    return max(2, 2 * l2_bytes // max(1, bytes_read) + 1)


def capture(call: Callable[[int], Tensor], calls: int, keep: bool = False) -> Captured:
    """Graph of calls 0, 1, ...; each ran twice before, so that whatever compiles has compiled.

    Args:
        call: as in `Method`.
        calls: how many.
        keep: keep what they return.
    """
    for _ in range(2):
        for number in range(calls):
            call(number)
    torch.cuda.synchronize()
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for number in range(calls):
            result = call(number)
            if keep:
                kept.append(result)
            del result  # or the next call could not have its memory
    graph.replay()
    torch.cuda.synchronize()
    return Captured(graph, calls, kept)


def time_graphs(
    graphs: dict[str, Captured], baseline: str, rounds: int
) -> dict[str, dict[str, Any]]:
    """Microseconds a call; every round replays every graph once, each round in another order.

    Returns:
        For each name `median_us, p10_us, p90_us` and, round by round against the baseline, `ratio,
        ratio_p10, ratio_p90`; ratio 2: twice as fast.
    """
    names = list(graphs)
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in names}
    for captured in graphs.values():
        captured.graph.replay()
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            events[name].append(_events())
            start, end = events[name][-1]
            start.record()
            graphs[name].graph.replay()
            end.record()
        if number % 16 == 15:  # a bounded queue: the host never waits inside a timed span
            torch.cuda.synchronize()
            for captured in graphs.values():
                captured.graph.replay()
    torch.cuda.synchronize()
    samples = {
        name: [1e3 * start.elapsed_time(end) / graphs[name].calls for start, end in pairs]
        for name, pairs in events.items()
    }
    return {name: _row(samples[baseline], samples[name]) for name in names}


def _row(base: list[float], own: list[float]) -> dict[str, Any]:
    median, p10, p90 = quantiles(own)
    ratio, ratio_p10, ratio_p90 = quantiles([b / o for b, o in zip(base, own, strict=True)])
    times = {"median_us": median, "p10_us": p10, "p90_us": p90}
    return times | {"ratio": ratio, "ratio_p10": ratio_p10, "ratio_p90": ratio_p90}


def quick_us(call: Callable[[int], Tensor], repeats: int = 9) -> float:
    """Median microseconds of a call in a graph of four, to choose between ways to one result."""
    captured = capture(call, 4)
    times = []
    for _ in range(repeats):
        start, end = _events()
        captured.graph.replay()
        start.record()
        captured.graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end) / captured.calls)
    return statistics.median(times)


def time_from_python(call: Callable[[int], Tensor], repeats: int = 50) -> dict[str, float]:
    """`python_us` and `host_us` of a call on an idle device, medians."""
    device, host = [], []
    for number in range(5 + repeats):
        start, end = _events()
        torch.cuda.synchronize()
        start.record()
        began = time.perf_counter()
        call(number)
        returned = time.perf_counter()
        end.record()
        torch.cuda.synchronize()
        if number >= 5:
            host.append((returned - began) * 1e6)
            device.append(1e3 * start.elapsed_time(end))
    return {"python_us": statistics.median(device), "host_us": statistics.median(host)}


def copy_bytes_per_sec(repeats: int = 9) -> float:
    """Bytes read plus bytes written a second by a large copy on the device."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = []
    for _ in range(repeats):
        start, end = _events()
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        seconds.append(1e-3 * start.elapsed_time(end))
    return 2 * COPY_BYTES / statistics.median(seconds)


def _events() -> tuple[Any, Any]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def l2_bytes() -> int:
    """Size of the device's L2 cache."""
    return int(torch.cuda.get_device_properties(0).L2_cache_size)
