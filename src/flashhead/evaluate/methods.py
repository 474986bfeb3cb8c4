"""The methods that `flashhead eval` can measure, by name; `method_names` lists them.

"flashhead" gives every logit, "certified" the next token alone: the codes index read no further
than the winner needs, with a certificate that fails with a stated probability.

Indexes that a method needs and the head does not have are built here, from the same calibration
states as the head's own: clusters without tokens that are always scored, codes with the default
options.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

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
from flashhead.method_names import CALIBRATED_METHODS, METHODS
from flashhead.nn.output import HeadOutput, NextToken
from flashhead.nn.search import search_codes
from flashhead.ops.dispatch import resolve_impl
from flashhead.ops.scan.query import make_plan
from flashhead.options import ClustersOptions, CodesOptions, require_failure_probability

KL_BUDGETS = (1e-2, 3e-3, 1e-3, 2e-4, 5e-5)
"""Beside the default's."""
FAILURE_PROBABILITY = 1e-6
"""Of the certified token, unless it is told otherwise."""


class Searchable(Protocol):
    """Something with a search."""

    def search(self, hidden: Tensor) -> HeadOutput:
        """Logits of `bf16/f32[n, d]` through an index, and what was counted."""


class SearchHead(Head, Searchable, Protocol):
    """A head with an index: `flashhead.nn.head.FlashHead` is one."""

    kind: str
    index: Any

    def next_token(self, hidden: Tensor, *, failure_probability: float) -> NextToken:
        """Certified winners of `bf16/f32[n, d]`, by a codes index."""


def families(
    head: SearchHead,
    names: Sequence[str],
    calibration: Tensor | None = None,
    progress: bool = False,
    failure_probability: float = FAILURE_PROBABILITY,
) -> list[Family]:
    """Build the methods `names`.

    Args:
        head: of the model.
        names: of `method_names.METHODS`.
        calibration: floating `[n, d]`, hidden states that the model sampled, see
            `wanting_calibration`.
        progress: show bars on stderr while indexes are built.
        failure_probability: of "certified"; 0: the deterministic bound.

    Raises:
        FlashHeadError: an unknown name, or a method that wants calibration states and has none.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise FlashHeadError(f"methods={unknown[0]!r}: wanted {', '.join(METHODS)}")
    wanting = wanting_calibration(head.index, names)
    if wanting and calibration is None:
        raise FlashHeadError(f"method {wanting[0]!r}: wanted calibration hidden states, got none")
    require_failure_probability(failure_probability)
    indexes = _Indexes(head, calibration, progress, failure_probability)
    return [_MAKERS[name](head, indexes) for name in dict.fromkeys(names)]


def wanting_calibration(index: Any, names: Sequence[str]) -> list[str]:
    """Those methods that need hidden states sampled from the model, for a head with this index."""
    alone = () if isinstance(index, CodesIndex) else ("certified",)
    return [name for name in names if name in (*CALIBRATED_METHODS, *alone)]


class _Indexes:
    """Indexes of a head, built when the first method asks for them, and what else methods share."""

    def __init__(
        self,
        head: SearchHead,
        calibration: Tensor | None,
        progress: bool,
        failure_probability: float,
    ) -> None:
        self._head, self._calibration, self._progress = head, calibration, progress
        self.failure_probability = failure_probability
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
    return output.logits, _counts(output)


def _counts(output: HeadOutput | NextToken) -> dict[str, Tensor]:
    names = ("bytes_read", "candidates", "certified", "fallback")
    return {name: getattr(output, name) for name in names}


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
    """The codes index at several KL budgets."""
    index = indexes.codes()
    variants = {
        f"codes-kl{budget:g}": dataclasses.replace(
            index, options=dataclasses.replace(index.options, kl_budget=budget)
        )
        for budget in KL_BUDGETS
    }
    search = _search(head, index)

    def measure(chunk: Chunk) -> Iterator[tuple[str, Figures]]:
        for row, variant in variants.items():
            output = search(chunk.hidden, variant)
            yield row, chunk.compare(row, output.logits, **_counts(output))

    rows = {f"codes-kl{budget:g}": ("codes", f"KL {budget:g}") for budget in KL_BUDGETS}
    return Family("codes", rows, measure)


def _certified(head: SearchHead, indexes: _Indexes) -> Family:
    """The next token alone: no distribution, hence no KL."""
    index, probability = indexes.codes(), indexes.failure_probability
    search = _search(head, index, failure_probability=probability, winner_only=True)

    def choose(hidden: Tensor) -> HeadOutput | NextToken:
        if index is head.index:
            return head.next_token(hidden, failure_probability=probability)
        return search(hidden, index)  # codes beside the head's own clusters

    def measure(chunk: Chunk) -> Iterator[tuple[str, Figures]]:
        found = choose(chunk.hidden)
        yield "certified", {"agree": chunk.truth.chosen(found.tokens), **_counts(found)}

    return Family("certified", {"certified": ("certified", f"p={probability:g}")}, measure)


def _search(
    head: SearchHead, index: CodesIndex, **how: Any
) -> Callable[[Tensor, CodesIndex], HeadOutput]:
    """The search of a codes index, or of the same with other options, by the head's weight."""
    weight, plan = head.weight.detach(), make_plan(index)
    bias = None if head.bias is None else head.bias.detach().float()
    impl = resolve_impl(_impl(head), weight.device)

    def search(hidden: Tensor, variant: CodesIndex) -> HeadOutput:
        return search_codes(hidden, weight, bias, variant, plan, impl, **how)

    return search


def _impl(head: SearchHead) -> str:
    """The implementation that the head runs."""
    return str(getattr(head, "impl", "auto"))


_Maker = Callable[[SearchHead, _Indexes], Family]
_MAKERS: dict[str, _Maker] = {
    "flashhead": _flashhead,
    "certified": _certified,
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
