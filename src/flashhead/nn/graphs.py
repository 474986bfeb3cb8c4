"""CUDA graphs of our own: a call from Python costs one replay instead of a launch a kernel.

Engines call the head outside their graphs, where launching from Python takes longer than the search
runs. A graph is captured for each kind of call, shape and stream, with static inputs; a call copies
its inputs, replays, and clones the outputs, so what it returns is the caller's own. Inside a
capture, or where there is no CUDA, the function itself is called.
"""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

MOST_GRAPHS = 256
"""The oldest is dropped beyond this."""


@dataclasses.dataclass
class _Entry:
    inputs: list[Tensor]
    given: list[Tensor | None]
    graph: torch.cuda.CUDAGraph
    outputs: tuple[Tensor, ...]


class GraphCache:
    """Graphs by key; safe with threads and streams (each stream has its own)."""

    def __init__(self) -> None:
        self._entries: dict[tuple[Any, ...], _Entry] = {}
        self._pools: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> "GraphCache":  # a copy has its own tensors
        return GraphCache()

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forget all graphs and free their memory."""
        with self._lock:
            self._entries.clear()
            self._pools.clear()

    def __call__(
        self,
        kind: tuple[Any, ...],
        function: Callable[..., tuple[Tensor, ...]],
        inputs: Sequence[Tensor],
        constant: int = 0,
        warmup: Callable[..., object] | None = None,
    ) -> tuple[Tensor, ...]:
        """`function(*inputs)` by a replay; its outputs are fresh tensors.

        Args:
            kind: what decides the function and the shapes of its inputs; hashable.
            function: launches kernels without waiting for them, returns tensors.
            inputs: on one device; the first one's dtype may vary.
            constant: the last so many of the inputs are never changed by the caller, so one that is
                passed again is not copied again.
            warmup: called once with the inputs before a capture, to compile the kernels; None: the
                function.
        """
        first = inputs[0]
        if not replays(first):
            return function(*inputs)
        key = (kind, first.dtype, raw_stream(first))
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                entry = self._capture(function, warmup or function, inputs)
                while len(self._entries) >= MOST_GRAPHS:
                    self._entries.pop(next(iter(self._entries)))
                self._entries[key] = entry
            changing = len(inputs) - constant
            for i, given in enumerate(inputs):
                if i < changing:
                    entry.inputs[i].copy_(given)
                elif entry.given[i] is not given:
                    entry.inputs[i].copy_(given)
                    entry.given[i] = given
            entry.graph.replay()
            if len(entry.outputs) == 1:
                return (entry.outputs[0].clone(),)
            return tuple(output.clone() for output in entry.outputs)

    def _capture(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        warmup: Callable[..., object],
        inputs: Sequence[Tensor],
    ) -> _Entry:
        device = inputs[0].device
        stream = torch.cuda.current_stream(device)
        with torch.cuda.device(device):
            static = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
            for own, given in zip(static, inputs, strict=True):
                own.copy_(given)
            side = torch.cuda.Stream(device)
            side.wait_stream(stream)
            with torch.cuda.stream(side):
                warmup(*static)  # compiles and loads the kernels
            side.synchronize()
            graph = torch.cuda.CUDAGraph()
            # graphs of one stream run one after another: they may share their scratch memory
            pool = self._pools.setdefault(stream.cuda_stream, torch.cuda.graph_pool_handle())
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                outputs = function(*static)
            stream.wait_stream(side)
        return _Entry(static, [None] * len(static), graph, outputs)


def replays(tensor: Tensor) -> bool:
    """Whether a call on this tensor goes through a graph of our own."""
    if not tensor.is_cuda or torch.compiler.is_compiling():
        return False
    return not torch.cuda.is_current_stream_capturing()


def raw_stream(tensor: Tensor) -> int:
    """The current stream of a tensor's device, as a number."""
    stream = torch.cuda.current_stream(tensor.device)
    return int(stream.cuda_stream)
