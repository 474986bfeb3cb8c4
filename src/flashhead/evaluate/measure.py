"""Methods side by side: what one is asked for, and the loop that shows all of them the same text.

A family is one or more rows of the table that share work: the same index at several numbers of
probes, say. It sees a chunk of positions at a time, with their float32 logits and softmax computed
once for all, and yields the figures of its rows one by one, so that one set of logits is held at a
time. 20,000 positions of 262,144 logits would be 21 GB.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from flashhead.evaluate.baselines import float32_logits
from flashhead.evaluate.capture import Postprocess
from flashhead.evaluate.metrics import Reference, Totals, argmax, top_ties

CHUNK_LOGITS = 2**25
"""Logits of one method held at a time (128 MB of float32)."""

Figures = dict[str, Tensor]
"""A tensor `[n]` by the name that `Totals.row` knows it by."""


class Head(Protocol):
    """What is asked of a model's head: `flashhead.nn.head.FlashHead` is one."""

    weight: Tensor
    bias: Tensor | None

    def dense(self, hidden: Tensor) -> Tensor:
        """Logits of `bf16/f32[n, d]` in the dtype of the weight."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """n positions as every method sees them.

    Args:
        hidden: `bf16/f32[n, d]`.
        exact: `float32[n, V]`, logits of the head itself.
        truth: of `postprocess(exact)`.
        postprocess: what the model does to logits after its head, element by element.
        number: of the chunk, from 0.
    """

    hidden: Tensor
    exact: Tensor
    truth: Reference
    postprocess: Postprocess
    number: int

    def compare(self, name: str, logits: Tensor, bytes_read: Tensor, **counts: Tensor) -> Figures:
        """Figures of a method that gives every logit.

        Args:
            name: for the error.
            logits: floating `[n, V]`, before `postprocess`.
            bytes_read: `int64[n]`.
            counts: `candidates: int64[n]`, `certified: bool[n]`, `fallback: bool[n]`.

        Raises:
            RuntimeError: logits of another shape, or one that is not finite.
        """
        logits = self.postprocess(logits)
        if logits.shape != self.exact.shape:
            wanted = tuple(self.exact.shape)
            raise RuntimeError(f"{name}: logits of shape {tuple(logits.shape)}, wanted {wanted}")
        kl, tv = self.truth.divergences(logits)
        if not bool(torch.isfinite(kl).all()):
            raise RuntimeError(
                f"{name}: a logit is NaN or infinite; every token must have a finite one"
            )
        agree = self.truth.chosen(argmax(logits))
        figures = {"agree": agree, "kl": kl, "tv": tv, "ties": top_ties(logits)}
        return figures | {"bytes_read": bytes_read} | counts


@dataclasses.dataclass(frozen=True)
class Family:
    """Rows of the table that are measured together.

    Args:
        name: what `--methods` calls it.
        rows: the series and the point in it, by the name of the row: `{"int8-p64": ("int8 ...",
            "P=64")}`. A plot joins the points of a series.
        measure: figures of every row, `(name of the row, figures)`.
    """

    name: str
    rows: dict[str, tuple[str, str]]
    measure: Callable[[Chunk], Iterator[tuple[str, Figures]]]


def measure(
    head: Head,
    families: list[Family],
    states: Iterator[Tensor],
    positions: int,
    postprocess: Postprocess,
    *,
    precision: torch.dtype = torch.float64,
    desc: str = "eval",
    progress: bool = True,
) -> dict[str, Any]:
    """Show every family the same hidden states.

    Args:
        head: of the model.
        families: what is measured.
        states: `bf16/f32[n, d]` hidden states, a tensor a window, `positions` in all.
        positions: for the bar and the shares.
        postprocess: what the model does to logits after its head.
        precision: of the metrics, see `metrics`.
        desc: of the bar on stderr.
        progress: show the bar.

    Returns:
        `methods` (a row each), `truth_ties`, and `ms_per_position` by family.
    """
    totals = {row: Totals() for family in families for row in family.rows}
    seconds = {"truth": 0.0} | {family.name: 0.0 for family in families}
    ties, number = 0, 0
    chunk_rows = max(1, CHUNK_LOGITS // head.weight.shape[0])
    bar = tqdm(total=positions, desc=desc, unit="pos", file=sys.stderr, disable=not progress)
    with bar, torch.inference_mode():
        for window in states:
            for hidden in window.split(chunk_rows):
                start = time.perf_counter()
                exact = float32_logits(hidden, head.weight, head.bias)
                truth = Reference(postprocess(exact), precision)
                ties += int(top_ties(truth.logits).sum())
                seconds["truth"] += time.perf_counter() - start
                chunk = Chunk(hidden, exact, truth, postprocess, number)
                for family in families:
                    start = time.perf_counter()
                    for row, figures in family.measure(chunk):
                        totals[row].add(**figures)
                    seconds[family.name] += time.perf_counter() - start
                number += 1
                bar.update(len(hidden))
    points = {row: point for family in families for row, point in family.rows.items()}
    return {
        "methods": {
            row: {"series": points[row][0], "point": points[row][1], **total.row(dense_bytes(head))}
            for row, total in totals.items()
        },
        "truth_ties": ties / positions,
        "ms_per_position": {name: 1e3 * spent / positions for name, spent in seconds.items()},
    }


def dense_bytes(head: Head) -> int:
    """Bytes that the bf16 dense head reads for every token: what all fractions are of."""
    return 2 * (head.weight.numel() + (0 if head.bias is None else head.bias.numel()))
