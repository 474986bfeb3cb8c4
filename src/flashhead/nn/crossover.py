"""How many rows a search serves faster than the dense product, measured where it runs."""

import logging
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from flashhead.nn.head import FlashHead

_log = logging.getLogger("flashhead")
MOST_ROWS = 64
"""Largest number of rows that is tried."""


@torch.no_grad()
def measure_crossover(head: "FlashHead") -> int:
    """Largest of 1, 2, 4, ... rows for which the search beats the dense product here; 0: none.

    Args:
        head: with an index; its `sample` of hidden states is searched, or random ones.
    """
    states = head.sample
    if states is None or states.shape[0] == 0:
        states = torch.randn(MOST_ROWS, head.in_features)
    states = states.to(head.weight.dtype)
    states = states.repeat(-(-MOST_ROWS // states.shape[0]), 1)
    best, rows = 0, 1
    while rows <= MOST_ROWS:
        batch = states[:rows]
        head.search(batch)  # compiles, warms the caches
        pairs = [(_seconds(head.search, batch), _seconds(head.dense, batch)) for _ in range(3)]
        if statistics.median(search / dense for search, dense in pairs) >= 1:
            break
        best, rows = rows, 2 * rows
    if best == 0:
        _log.warning(
            "the %s search does not beat the dense head here: the dense one runs", head.kind
        )
    else:
        _log.info("measured crossover: the %s search pays up to %d rows", head.kind, best)
    return best


def _seconds(function: Callable[[Tensor], object], batch: Tensor) -> float:
    start = time.perf_counter()
    function(batch)
    return time.perf_counter() - start
