"""The methods that `flashhead eval` can measure, by name; `options.METHODS` lists them.

Indexes that a method needs and the head does not have are built here, from the same calibration
states as the head's own: clusters without tokens that are always scored, codes with the default
options.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flashhead.errors import FlashHeadError
from flashhead.evaluate.baselines import QuantizedHead, quantize_head, quantize_head_fp8
from flashhead.evaluate.lowrank import hidden_second_moment, low_rank_family
from flashhead.evaluate.measure import Chunk, Family, Figures, Head, dense_bytes
from flashhead.evaluate.probed import clusters_codes_family, clusters_family
from flashhead.evaluate.sampled import sampled_family
from flashhead.index.build_clusters import fit_clusters, store_clusters
from flashhead.index.build_codes import build_codes
from flashhead.index.clusters import CENTROID_DTYPES, ClustersIndex
from flashhead.index.codes import CodesIndex
from flashhead.nn.head import FlashHead
from flashhead.nn.output import HeadOutput
from flashhead.options import CALIBRATED_METHODS, METHODS, ClustersOptions, CodesOptions

KL_BUDGETS = (1e-2, 3e-3, 2e-4, 5e-5)
"""Beside the default's."""
WIDTHS = (3.0, 5.0)
"""z, beside the default's."""


class Searchable(Protocol):
    """Something with a search."""

    def search(self, hidden: Tensor) -> HeadOutput:
        """Logits of `bf16/f32[n, d]` through an index, and what was counted."""


class SearchHead(Head, Searchable, Protocol):
    """A head with an index: `flashhead.nn.head.FlashHead` is one."""

    kind: str
    index: Any


def families(
    head: SearchHead,
    names: Sequence[str],
    calibration: Tensor | None = None,
    progress: bool = False,
) -> list[Family]:
    """Build the methods `names`.

    Args:
        head: of the model.
        names: of `options.METHODS`.
        calibration: floating `[n, d]`, hidden states that the model sampled; wanted by
            `options.CALIBRATED_METHODS`.
        progress: show bars on stderr while indexes are built.

    Raises:
        FlashHeadError: an unknown name, or a method that wants calibration states and has none.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise FlashHeadError(f"methods={unknown[0]!r}: wanted {', '.join(METHODS)}")
    wanting = [name for name in names if name in CALIBRATED_METHODS]
    if wanting and calibration is None:
        raise FlashHeadError(f"method {wanting[0]!r}: wanted calibration hidden states, got none")
    indexes = _Indexes(head, calibration, progress)
    return [_MAKERS[name](head, indexes) for name in dict.fromkeys(names)]


class _Indexes:
    """Indexes of a head, built when the first method asks for them."""

    def __init__(self, head: SearchHead, calibration: Tensor | None, progress: bool) -> None:
        self._head, self._calibration, self._progress = head, calibration, progress
        self._clusters: dict[str, dict[str, ClustersIndex]] = {}
        self._codes: CodesIndex | None = None

    def states(self) -> Tensor:
        """The calibration states."""
        assert self._calibration is not None  # `families` refused a method that wants them
        return self._calibration

    def clusters(self, metric: str) -> dict[str, ClustersIndex]:
        """One index for every centroid type, by that type."""
        if metric not in self._clusters:
            options = ClustersOptions(metric=metric)
            fitted = fit_clusters(
                self._head.weight, options, self._calibration, self._progress, self._head.bias
            )
            self._clusters[metric] = {
                dtype: store_clusters(fitted, dataclasses.replace(options, centroid_dtype=dtype))
                for dtype in CENTROID_DTYPES
            }
        return self._clusters[metric]

    def codes(self) -> CodesIndex:
        """The head's own codes, or some with the default options."""
        if isinstance(self._head.index, CodesIndex):
            return self._head.index
        if self._codes is None:
            self._codes = build_codes(
                self._head.weight, CodesOptions(), self._calibration, self._progress
            )
        return self._codes


def _one_row(
    name: str, series: str, point: str, score: Callable[[Chunk], tuple[Tensor, dict[str, Tensor]]]
) -> Family:
    """A family of one row; `score` gives its logits and counts."""

    def measure(chunk: Chunk) -> Iterator[tuple[str, Figures]]:
        logits, counts = score(chunk)
        yield name, chunk.compare(name, logits, **counts)

    return Family(name, {name: (series, point)}, measure)


def _flashhead(head: SearchHead, _: _Indexes) -> Family:
    return _one_row("flashhead", "flashhead", head.kind, lambda chunk: _searched(head, chunk))


def _searched(head: Searchable, chunk: Chunk) -> tuple[Tensor, dict[str, Tensor]]:
    output = head.search(chunk.hidden)
    counts = {"candidates": output.candidates, "certified": output.certified}
    return output.logits, {"bytes_read": output.bytes_read} | counts


def _bf16(head: SearchHead, _: _Indexes) -> Family:
    def score(chunk: Chunk) -> tuple[Tensor, dict[str, Tensor]]:
        read = torch.full((len(chunk.hidden),), dense_bytes(head))
        return head.dense(chunk.hidden), {"bytes_read": read}

    return _one_row("bf16", "dense", "bf16", score)


def _quantized(name: str, point: str, make: Callable[[SearchHead], QuantizedHead]) -> "_Maker":
    def build(head: SearchHead, _: _Indexes) -> Family:
        rounded = make(head)

        def score(chunk: Chunk) -> tuple[Tensor, dict[str, Tensor]]:
            read = torch.full((len(chunk.hidden),), rounded.bytes_read)
            return rounded.logits(chunk.hidden), {"bytes_read": read}

        return _one_row(name, "dense", point, score)

    return build


def _clusters(name: str, metric: str) -> "_Maker":
    def build(head: SearchHead, indexes: _Indexes) -> Family:
        series = {f"{name}-{dtype}": index for dtype, index in indexes.clusters(metric).items()}
        return clusters_family(name, head, series)

    return build


def _sampled(head: SearchHead, indexes: _Indexes) -> Family:
    series = {
        "sampled-published": indexes.clusters("spherical")["bf16"],
        "sampled-hidden": indexes.clusters("hidden")["bf16"],
    }
    return sampled_family(head, series)


def _clusters_codes(head: SearchHead, indexes: _Indexes) -> Family:
    clusters = indexes.clusters("hidden")["int8"]
    return clusters_codes_family(head, clusters, indexes.codes(), _impl(head))


def _svd(head: SearchHead, _: _Indexes) -> Family:
    return low_rank_family("svd", head, torch.eye(head.weight.shape[1], dtype=torch.float64))


def _svd_hidden(head: SearchHead, indexes: _Indexes) -> Family:
    return low_rank_family("svd-hidden", head, hidden_second_moment(indexes.states()))


def _codes(head: SearchHead, indexes: _Indexes) -> Family:
    """The codes index at several KL budgets and interval widths, each a head of its own."""
    index = indexes.codes()
    default = index.options
    budgets = {budget: dataclasses.replace(default, kl_budget=budget) for budget in KL_BUDGETS}
    widths = {z: dataclasses.replace(default, z=z) for z in WIDTHS}
    variants = {f"codes-kl{x:g}": ("codes", f"KL {x:g}", new) for x, new in budgets.items()}
    variants |= {f"codes-z{x:g}": ("codes-z", f"z={x:g}", new) for x, new in widths.items()}
    linear = _as_linear(head)
    with _quiet():
        heads = {
            row: FlashHead(linear, dataclasses.replace(index, options=options), impl=_impl(head))
            for row, (_, _, options) in variants.items()
        }

    def measure(chunk: Chunk) -> Iterator[tuple[str, Figures]]:
        for row, variant in heads.items():
            logits, counts = _searched(variant, chunk)
            yield row, chunk.compare(row, logits, **counts)

    rows = {row: (series, point) for row, (series, point, _) in variants.items()}
    return Family("codes", rows, measure)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Heads that are only measured tell nobody from how many rows on they pay."""
    log = logging.getLogger("flashhead")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _as_linear(head: SearchHead) -> nn.Linear:
    """A plain layer with the head's own weight."""
    rows, d = head.weight.shape
    linear = nn.Linear(d, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(head.weight.detach(), requires_grad=False)
    if head.bias is not None:
        linear.bias = nn.Parameter(head.bias.detach(), requires_grad=False)
    return linear.eval()


def _impl(head: SearchHead) -> str:
    """The implementation that the head runs."""
    return str(getattr(head, "impl", "auto"))


_Maker = Callable[[SearchHead, _Indexes], Family]
_MAKERS: dict[str, _Maker] = {
    "flashhead": _flashhead,
    # Certified greedy (a row of agreement and bytes without KL: `head.next_token`) goes here, and
    # its name into `options.METHODS`. Figures may lack kl, tv and ties: see `Totals.row`.
    "codes": _codes,
    "clusters": _clusters("clusters", "hidden"),
    "clusters-published": _clusters("clusters-published", "spherical"),
    "sampled": _sampled,
    "clusters-codes": _clusters_codes,
    "svd": _svd,
    "svd-hidden": _svd_hidden,
    "bf16": _bf16,
    "int8": _quantized("int8", "int8", lambda head: quantize_head(head.weight, 8, bias=head.bias)),
    "fp8": _quantized("fp8", "fp8", lambda head: quantize_head_fp8(head.weight, head.bias)),
    "int4": _quantized(
        "int4", "int4 g32", lambda head: quantize_head(head.weight, 4, 32, bias=head.bias)
    ),
    "int4-g128": _quantized(
        "int4-g128", "int4 g128", lambda head: quantize_head(head.weight, 4, 128, bias=head.bias)
    ),
}
assert tuple(_MAKERS) == METHODS
