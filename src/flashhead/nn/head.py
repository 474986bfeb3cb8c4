"""FlashHead: an output embedding that searches the vocabulary instead of multiplying it.

It is an `nn.Linear` with the same weight (shared with the input embedding where the model ties
them), so saving, tying and whatever reads `lm_head.weight` work as before; the index rides along
outside the state dict. Logits are complete and float32: a bf16 head ties its two best tokens at
2-6 % of the positions of the models measured here.

The dense product serves what a search cannot: rows beyond `crossover_rows` (prefill, large
batches), gradients, and hidden states that are not finite.
"""

import logging
import math
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from flashhead.errors import FlashHeadError
from flashhead.index.clusters import ClustersIndex
from flashhead.index.codes import CodesIndex
from flashhead.nn.output import HeadOutput, HeadStatistics
from flashhead.ops.dispatch import resolve_impl

_log = logging.getLogger("flashhead")
MOST_ROWS = 64
"""Largest number of rows the crossover measurement tries."""


class FlashHead(nn.Linear):
    """Output embedding with a search index.

    Args:
        linear: the head to replace; its weight and bias are shared, not copied.
        index: index of that weight, or None for a dense head.
        impl: "auto", "cpu" or "reference".
        sample: floating `[n, d]`, hidden states to measure the crossover with, or None for random
            ones.

    Raises:
        FlashHeadError: the index is of another shape, or `impl` cannot run here.
    """

    def __init__(
        self,
        linear: nn.Linear,
        index: CodesIndex | ClustersIndex | None,
        *,
        impl: str = "auto",
        sample: Tensor | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)
        self.index = index
        self.sample = sample
        self.stats = HeadStatistics()
        self.kind = "dense" if index is None else index.kind
        self.impl = "dense"
        self.crossover_rows = 0
        if index is not None:
            if (index.vocab_size, index.hidden_size) != tuple(self.weight.shape):
                got = [index.vocab_size, index.hidden_size]
                raise FlashHeadError(
                    f"the index is of a head {got}, this head is {list(self.weight.shape)}"
                )
            self.impl = resolve_impl(impl, self.weight.device)
            self._plan: Any = _plan_of(index)
            self._fingerprint = self._weight_state()
            self.crossover_rows = self._measure_crossover()

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states;
        equals `F.linear(hidden, weight, bias).float()` up to the index's fidelity.

        Args:
            hidden: floating `[..., d]`.

        Returns:
            `float32[..., V]`.
        """
        rows = hidden.numel() // max(1, self.in_features)
        if self._searches(hidden, rows):
            output = self._search(hidden.reshape(-1, self.in_features))
            self.stats.add(output)
            return output.logits.view(*hidden.shape[:-1], self.out_features)
        self.stats.add_dense(rows, self.weight.numel() * self.weight.element_size())
        return self.dense(hidden).float()

    def dense(self, hidden: Tensor) -> Tensor:
        """The product of the head that was replaced, in the dtype of the weight."""
        return super().forward(hidden)

    def search(self, hidden: Tensor) -> HeadOutput:
        """Search the index, whatever the number of rows.

        Args:
            hidden: floating `[n, d]`, finite.

        Raises:
            FlashHeadError: the head is dense, `hidden` has another shape or is not finite, or the
                weight changed.
        """
        if self.index is None:
            raise FlashHeadError("this head is dense: it has no index to search")
        if hidden.dim() != 2 or hidden.shape[1] != self.in_features:
            raise FlashHeadError(
                f"hidden has shape {list(hidden.shape)}, wanted [n, {self.in_features}]"
            )
        if not _is_finite(hidden):
            raise FlashHeadError("hidden holds NaN or infinity: no token can be searched for")
        return self._search(hidden)

    @torch.compiler.disable
    @torch.no_grad()
    def _search(self, hidden: Tensor) -> HeadOutput:
        if self._fingerprint != self._weight_state():
            raise FlashHeadError(
                "the head's weight changed after its index was built: detach and attach again"
            )
        from flashhead.nn.search import search_clusters, search_codes

        bias = None if self.bias is None else self.bias.float()
        if isinstance(self.index, CodesIndex):
            return search_codes(hidden, self.weight, bias, self.index, self._plan, self.impl)
        assert isinstance(self.index, ClustersIndex)
        return search_clusters(hidden, self.weight, bias, self.index, self.impl)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        search = f"head={self.kind}, impl={self.impl}, crossover_rows={self.crossover_rows}"
        return f"{super().extra_repr()}, {search}"

    def _searches(self, hidden: Tensor, rows: int) -> bool:
        if self.index is None or rows == 0 or rows > self.crossover_rows:
            return False
        if torch.is_grad_enabled() and (hidden.requires_grad or self.training):
            return False
        return _is_finite(hidden)

    def _weight_state(self) -> tuple[int, int, torch.dtype]:
        version = 0 if self.weight.is_inference() else self.weight._version
        return self.weight.data_ptr(), version, self.weight.dtype

    @torch.no_grad()
    def _measure_crossover(self) -> int:
        """Largest of 1, 2, 4, ... rows for which the search beats the dense product here."""
        states = self.sample
        if states is None or states.shape[0] == 0:
            states = torch.randn(MOST_ROWS, self.in_features)
        states = states.to(self.weight.dtype)
        states = states.repeat(-(-MOST_ROWS // states.shape[0]), 1)
        best, rows = 0, 1
        while rows <= MOST_ROWS:
            batch = states[:rows]
            self.search(batch)  # compiles, warms the caches
            pairs = [(_seconds(self.search, batch), _seconds(self.dense, batch)) for _ in range(3)]
            if statistics.median(search / dense for search, dense in pairs) >= 1:
                break
            best, rows = rows, 2 * rows
        if best == 0:
            _log.warning(
                "the %s search does not beat the dense head here: the dense one runs", self.kind
            )
        else:
            _log.info("measured crossover: the %s search pays up to %d rows", self.kind, best)
        return best


def _plan_of(index: CodesIndex | ClustersIndex) -> Any:
    if isinstance(index, CodesIndex):
        from flashhead.ops.scan.query import make_plan

        return make_plan(index)
    return None


def _is_finite(hidden: Tensor) -> bool:
    """One operator instead of three: finite values cannot overflow a float64 sum."""
    return math.isfinite(hidden.sum(dtype=torch.float64).item())


def _seconds(function: Any, batch: Tensor) -> float:
    start = time.perf_counter()
    function(batch)
    return time.perf_counter() - start
