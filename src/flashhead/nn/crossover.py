"""How many rows a search serves faster than the dense product: measured once, where it runs.

A search reads less but computes more a row, so the dense product overtakes it at some batch size.
Where depends on the machine, the index and the use: complete logits (`search` against `dense`) or
the certified token (`next_token` against the argmax of `dense`). Search and dense product are timed
in interleaved pairs, in turn the one or the other first, each pair on other hidden states: what
counts is the median of the pairs' ratios, which a busy machine hardly moves. `tuning.py` keeps the
answer.
"""

import dataclasses
import importlib.metadata
import itertools
import logging
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from flashhead._version import __version__
from flashhead.environment import cpu_name
from flashhead.errors import FlashHeadError
from flashhead.index.clusters import ClustersIndex
from flashhead.index.codes import CodesIndex
from flashhead.nn.output import HeadStatistics
from flashhead.nn.tuning import (
    ROW_COUNTS,
    Crossover,
    Entry,
    TuneKey,
    cache_is_on,
    find_entry,
    store_entry,
)

if TYPE_CHECKING:
    from flashhead.nn.head import FlashHead

_log = logging.getLogger("flashhead")
MOST_ROWS = ROW_COUNTS[-1]
"""Largest number of rows that is tried."""
ATTACH_PAIRS = 5
"""Timed pairs a batch size when nothing was measured before; `flashhead tune` takes more."""
Call = Callable[[Tensor], object]


@dataclasses.dataclass(frozen=True)
class Timing:
    """One use at one batch size.

    Args:
        use: "logits" or "token".
        rows: batch size.
        search_ms: median.
        dense_ms: median.
        ratio: search over dense, the median of the pairs; below 1 the search is faster.
        ratio_p10: its 10th percentile.
        ratio_p90: its 90th percentile.
    """

    use: str
    rows: int
    search_ms: float
    dense_ms: float
    ratio: float
    ratio_p10: float
    ratio_p90: float


def find_crossover(head: "FlashHead") -> Crossover:
    """Crossover of a head with an index: from `tune.json`, else measured now and kept there, unless
    the search lost: `flashhead tune` keeps that too.
    """
    entry = _kept(head) if cache_is_on() else None
    if entry is None:
        crossover, source = crossover_of(time_rows(head, ATTACH_PAIRS)), "measured"
        # "never" may be a busy moment: measure again
        if cache_is_on() and max(crossover.logits, crossover.token) > 0:
            _keep(Entry(key_of(head), crossover, ATTACH_PAIRS))
    else:
        crossover, source = entry.crossover, "from tune.json"
    _log.info(
        "crossover %s: the %s search pays up to %d rows for complete logits, "
        "%d for the certified token",
        *(source, head.kind, crossover.logits, crossover.token),
    )
    if max(crossover.logits, crossover.token) == 0:
        _log.warning(
            "the %s search does not beat the dense head here (%s): the dense one runs; "
            "flashhead tune measures again",
            *(head.kind, source),
        )
    return crossover


@torch.no_grad()
def time_rows(
    head: "FlashHead", pairs: int, *, all_rows: bool = False, progress: bool = False
) -> list[Timing]:
    """Time each use at 1, 2, 4, ... rows.

    Args:
        head: with an index; its `sample` of hidden states is searched, or random ones.
        pairs: interleaved timings behind each median, 2 or more.
        all_rows: go on where the dense product has overtaken.
        progress: show a progress bar on stderr.

    Returns:
        Timings, use by use, rows ascending. A clusters index certifies no token, so it has one use.
    """
    states = _states(head)
    uses = _uses(head)
    timings: list[Timing] = []
    kept, head.stats = head.stats, HeadStatistics()
    bar = tqdm(total=len(uses) * len(ROW_COUNTS), desc="timing", disable=not progress, leave=False)
    try:
        with bar:
            for use, (search, dense) in uses.items():
                for rows in ROW_COUNTS:
                    timings.append(_time(use, search, dense, states, rows, pairs))
                    bar.update()
                    if timings[-1].ratio >= 1 and not all_rows:
                        break
    finally:
        head.stats = kept
    return timings


def crossover_of(timings: list[Timing]) -> Crossover:
    """The last batch size of each use before the first at which the dense product is as fast."""
    return Crossover(logits=_last_win("logits", timings), token=_last_win("token", timings))


def key_of(head: "FlashHead") -> TuneKey:
    """What decides the crossover of a head with an index."""
    assert head.index is not None
    return TuneKey(
        device=_device_name(head.weight.device, head.impl),
        impl=head.impl,
        head=head.kind,
        vocab_size=head.out_features,
        hidden_size=head.in_features,
        dtype=str(head.weight.dtype).removeprefix("torch."),
        bias=head.bias is not None,
        layout=_layout(head.index),
        states="random" if head.sample is None or len(head.sample) == 0 else "model",
        versions=_versions(head.impl),
    )


def _kept(head: "FlashHead") -> Entry | None:
    try:
        return find_entry(key_of(head))
    except FlashHeadError as error:
        _log.warning("%s: the crossover is measured again", error)
        return None


def _keep(entry: Entry) -> None:
    """Store, or say why the next attach has to measure again."""
    try:
        store_entry(entry)
    except FlashHeadError as error:
        _log.warning("%s: the next attach measures the crossover again", error)


def _states(head: "FlashHead") -> Tensor:
    """Hidden states to search for, on the device of the weight: [n, d]."""
    states = head.sample
    if states is None or len(states) == 0:
        generator = torch.Generator().manual_seed(0)  # the global one is the user's
        states = torch.randn(MOST_ROWS, head.in_features, generator=generator, dtype=torch.float32)
    return states.to(head.weight.device, head.weight.dtype)


def _uses(head: "FlashHead") -> dict[str, tuple[Call, Call]]:
    """Search and dense product of each use."""
    uses: dict[str, tuple[Call, Call]] = {"logits": (head.search, head.dense)}
    if isinstance(head.index, CodesIndex):
        uses["token"] = (head.next_token, lambda batch: head.dense(batch).argmax(-1))
    return uses


def _time(use: str, search: Call, dense: Call, states: Tensor, rows: int, pairs: int) -> Timing:
    search_ms: list[float] = []
    dense_ms: list[float] = []
    for number in range(-1, pairs):
        places = torch.arange(number * rows, (number + 1) * rows, device=states.device)
        batch = states[places % len(states)]
        timed = [(search, search_ms), (dense, dense_ms)]
        for call, samples in timed if number % 2 else reversed(timed):
            elapsed = _milliseconds(call, batch)
            if number >= 0:  # the first pair compiles and warms the caches
                samples.append(elapsed)
    ratios = [ours / theirs for ours, theirs in zip(search_ms, dense_ms, strict=True)]
    deciles = statistics.quantiles(ratios, n=10, method="inclusive")
    return Timing(
        use=use,
        rows=rows,
        search_ms=statistics.median(search_ms),
        dense_ms=statistics.median(dense_ms),
        ratio=statistics.median(ratios),
        ratio_p10=deciles[0],
        ratio_p90=deciles[-1],
    )


def _milliseconds(call: Call, batch: Tensor) -> float:
    """Wall time; on a GPU from idle to idle, as a search waits for the host in between."""
    if batch.is_cuda:
        torch.cuda.synchronize(batch.device)
    start = time.perf_counter()
    call(batch)
    if batch.is_cuda:
        torch.cuda.synchronize(batch.device)
    return (time.perf_counter() - start) * 1e3


def _last_win(use: str, timings: list[Timing]) -> int:
    own = [timing for timing in timings if timing.use == use]
    wins = itertools.takewhile(lambda timing: timing.ratio < 1, own)
    return max((timing.rows for timing in wins), default=0)


def _device_name(device: torch.device, impl: str) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    name = f"{cpu_name()}, {capability}, {torch.get_num_threads()} threads"
    if impl == "cpu":
        from numba import config  # its set number of threads would start them

        name += f", {config.NUMBA_NUM_THREADS} of numba"
    return name


def _layout(index: CodesIndex | ClustersIndex) -> str:
    """What a search reads: segments and planes with their limits, or clusters and probes."""
    if isinstance(index, CodesIndex):
        segments = " + ".join(f"{part.dims} x {part.base_bits}" for part in index.segments)
        budget = index.options.kl_budget
        kl = "none" if budget is None else f"{budget:.2g}"
        limits = f"failure {index.options.failure_probability:g}, kl {kl}"
        return f"{segments} bits, {index.planes} planes, {limits}"
    size = index.members.shape[1]
    searched = f"{index.options.probes} probes, {len(index.always)} always"
    return f"{index.clusters} x {size} tokens, {index.options.centroid_dtype}, {searched}"


def _versions(impl: str) -> str:
    versions = f"flashhead {__version__}, torch {torch.__version__}"
    return f"{versions}, numba {importlib.metadata.version('numba')}" if impl == "cpu" else versions
