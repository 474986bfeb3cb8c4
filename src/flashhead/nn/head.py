"""FlashHead: an output embedding that searches the vocabulary instead of multiplying it.

It is an `nn.Linear` with the same weight (shared with the input embedding where the model ties
them), so saving, tying and whatever reads `lm_head.weight` work as before; the index rides along
outside the state dict. Logits are complete and float32: a bf16 head ties its two best tokens at
2-6 % of the positions of the models measured here.

The dense product serves what a search cannot: rows beyond `crossover_rows` (prefill, large
batches), gradients, and hidden states that are not finite.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flashhead.errors import FlashHeadError
from flashhead.index.clusters import ClustersIndex
from flashhead.index.codes import CodesIndex
from flashhead.nn.crossover import find_crossover
from flashhead.nn.next_token import Context, next_token
from flashhead.nn.output import HeadOutput, HeadStatistics, LogProbs, NextToken
from flashhead.nn.rest import DRAWS
from flashhead.nn.tuning import Crossover
from flashhead.ops.dispatch import resolve_impl
from flashhead.ops.rescore.api import rescore
from flashhead.options import Sampling, require_failure_probability

if TYPE_CHECKING:
    from flashhead.nn.device import DeviceSearch

_DEVICE_ROWS = 2**14
_GREEDY = Sampling()


class FlashHead(nn.Linear):
    """Output embedding with a search index.

    Args:
        linear: the head to replace; its weight and bias are shared, not copied.
        index: index of that weight, or None for a dense head.
        impl: "auto", "cpu", "triton" or "reference".
        sample: floating `[n, d]`, hidden states to measure the crossover with, or None for random
            ones.
        crossover: up to how many rows the search runs; None: measured once and kept.

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
        crossover: Crossover | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)
        self.index = index
        self.sample = sample
        self._stats = HeadStatistics()
        self.device_search: DeviceSearch | None = None
        self.kind = "dense" if index is None else index.kind
        self.impl = "dense"
        self.crossover_rows = self.token_crossover_rows = 0
        if index is not None:
            if (index.vocab_size, index.hidden_size) != tuple(self.weight.shape):
                got = [index.vocab_size, index.hidden_size]
                raise FlashHeadError(
                    f"the index is of a head {got}, this head is {list(self.weight.shape)}"
                )
            self.impl = resolve_impl(impl, self.weight.device)
            self._place()
            self._given = crossover
            found = crossover or find_crossover(self)
            self.crossover_rows, self.token_crossover_rows = found.logits, found.token

    def _place(self) -> None:
        """Bring the index to where the weight is."""
        assert self.index is not None
        self.index = self.index.to(self.weight.device)
        self.plan: Any = _plan_of(self.index)
        self._fingerprint = self._weight_state()
        self.device_search = None
        if self.impl == "triton":
            from flashhead.nn.device import DeviceSearch

            self.device_search = DeviceSearch(self.index, self.weight, self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> "FlashHead":
        """`to(device)` and the like: the index follows the weight to another device."""
        before = self.weight.device, self.weight.dtype
        super()._apply(fn, recurse)
        moved = before[0] != self.weight.device and before[1] == self.weight.dtype
        if self.index is not None and moved:
            self.impl = resolve_impl("auto", self.weight.device)
            self._place()
            found = self._given or find_crossover(self)
            self.crossover_rows, self.token_crossover_rows = found.logits, found.token
        return self

    @property
    def stats(self) -> HeadStatistics:
        """Counters since the last reset; on a GPU reading them waits for the device."""
        if self.device_search is not None:
            self._stats.add_counts(*self.device_search.take_totals())
        return self._stats

    @stats.setter
    def stats(self, value: HeadStatistics) -> None:
        if self.device_search is not None:
            self.device_search.take_totals()
        self._stats = value

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
            if self.device_search is None or self.kind == "clusters":
                self._stats.add(output)
            return output.logits.view(*hidden.shape[:-1], self.out_features)
        self._stats.add_dense(rows, self.dense_bytes)
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
        self._require_hidden(hidden)
        return self._search(hidden)

    def next_token(
        self,
        hidden: Tensor,
        sampling: Sampling | None = None,
        *,
        steps: Tensor | None = None,
        contexts: list[Context] | None = None,
        failure_probability: float = 1e-6,
    ) -> NextToken:
        """Choose the next token of each hidden state, with a certificate.

        Greedy, it equals `(hidden.float() @ weight.float().T + bias).argmax(1)`; with a temperature
        it draws from the softmax of these logits (`nn/sampling.py` says what is exact for each
        feature). What the search cannot certify is completed by the dense product.

        On a GPU the answer stays on the device and nothing waits for it: a hidden state that is not
        finite, or for which every token is forbidden, is then not certified instead of an error.

        Args:
            hidden: floating `[n, d]`, finite, on the head's device.
            sampling: how a token is chosen; None: greedy.
            steps: `int64[n]`, number of each draw: equal seeds and steps give equal tokens,
                whatever the batch; None: 0, 1, ....
            contexts: previous tokens, biases and masks, one a hidden state; None: none.
            failure_probability: of the certificate (`index/bound.py`); 0: a deterministic bound.

        Raises:
            FlashHeadError: `hidden` has another shape or is not finite, an argument is out of
                range, or every token is forbidden.
        """
        self._require_hidden(hidden)
        require_failure_probability(failure_probability)
        sampling = sampling or _GREEDY
        if steps is not None and (steps.dtype != torch.int64 or steps.shape != (len(hidden),)):
            got = f"{steps.dtype} {list(steps.shape)}"
            raise FlashHeadError(f"steps is {got}: wanted int64 [{len(hidden)}]")
        search = self.device_search
        if search is not None and self._draws_on_device(sampling, contexts) and len(hidden):
            if not torch.compiler.is_compiling():
                self._require_unchanged()
            return search.next_token(
                hidden.detach(), failure_probability, sampling.temperature, sampling.seed, steps
            )
        return self._next_token(hidden, sampling, steps, contexts, failure_probability)

    @torch.compiler.disable
    @torch.no_grad()
    def _next_token(
        self,
        hidden: Tensor,
        sampling: Sampling,
        steps: Tensor | None,
        contexts: list[Context] | None,
        failure_probability: float,
    ) -> NextToken:
        steps = torch.arange(len(hidden)) if steps is None else steps.cpu()
        if contexts is not None and len(contexts) != len(hidden):
            raise FlashHeadError(f"{len(contexts)} contexts: wanted {len(hidden)}, one a row")
        if not len(hidden):
            empty = torch.zeros(0, dtype=torch.int64)
            return NextToken(empty, empty.bool(), empty.bool(), empty, empty)
        chosen = next_token(self, hidden, sampling, steps, contexts, failure_probability)
        self._stats.add(chosen)
        return chosen

    def _draws_on_device(self, sampling: Sampling, contexts: list[Context] | None) -> bool:
        """Whether the kernels do all of it: no filters, penalties, biases or masks."""
        return self.kind == "codes" and contexts is None and not sampling.filters

    @torch.no_grad()
    def log_probs(
        self, hidden: Tensor, tokens: Tensor, temperature: float = 1.0, *, draws: int = DRAWS
    ) -> LogProbs:
        """Log-probabilities of given tokens; estimates
        `log_softmax((hidden.float() @ weight.float().T + bias) / temperature)` at the tokens.

        The token's logit and the candidates' are exact; the mass of all other rows is an unbiased
        estimate (`nn/rest.py`), on a GPU the dense product. Without draws the normaliser is that of
        the complete logits, on any device: off by about the KL budget at a temperature of 1, with
        no standard error. `log_softmax(head(hidden))` is worse than both for tokens that are no
        candidates: their logits there are estimates (docs/sampling.md).

        Args:
            hidden: floating `[n, d]`, finite.
            tokens: `int64[n]`.
            temperature: above 0.
            draws: rows that are drawn and scored for a hidden state, 2 or more; 0: none.

        Raises:
            FlashHeadError: an argument has another shape or range, or a dense head without draws.
        """
        self._require_hidden(hidden)
        if tokens.shape != (len(hidden),) or tokens.dtype != torch.int64:
            got = f"{tokens.dtype} {list(tokens.shape)}"
            raise FlashHeadError(f"tokens is {got}: wanted int64 [{len(hidden)}]")
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.out_features:
            raise FlashHeadError(f"tokens: wanted 0 to {self.out_features - 1}")
        if not 0 < temperature < math.inf:
            raise FlashHeadError(f"temperature={temperature}: wanted above 0")
        if draws < 0 or draws == 1:
            raise FlashHeadError(f"draws={draws}: wanted 0, or 2 or more")
        from flashhead.nn.rest import log_probs

        return log_probs(self, hidden, tokens, temperature, draws)

    @torch.no_grad()
    def draws(
        self,
        hidden: Tensor,
        count: int,
        sampling: Sampling,
        first_step: int = 0,
        failure_probability: float = 1e-6,
    ) -> Tensor:
        """Many draws for one hidden state: the tokens of `next_token` at `count` steps.

        One search serves all draws: rows are known by bounds, and a row that wins is made exact.

        Args:
            hidden: floating `[1, d]`, finite.
            count: of draws.
            sampling: temperature above 0; no penalties.
            first_step: of the noise.
            failure_probability: of each draw's certificate, above 0.

        Returns:
            `int64[count]`.
        """
        self._require_hidden(hidden)
        require_failure_probability(failure_probability)
        from flashhead.nn.draws import draws

        steps = torch.arange(first_step, first_step + count)
        return draws(self, hidden, steps, sampling, failure_probability)

    @property
    def searches_codes(self) -> bool:
        """Whether the host can search an index that certifies, with biases and margins."""
        return isinstance(self.index, CodesIndex) and self.device_search is None

    @property
    def searches_tokens(self) -> bool:
        """Whether it has an index that certifies, on whatever device."""
        return isinstance(self.index, CodesIndex)

    @property
    def noise_impl(self) -> str:
        """Implementation of the noise: that of the search, for a dense head the reference."""
        return self.impl if self.impl in ("cpu", "reference") else "reference"

    @property
    def dense_bytes(self) -> int:
        """Bytes that the dense product reads."""
        bias = 0 if self.bias is None else self.bias.numel() * self.bias.element_size()
        return self.weight.numel() * self.weight.element_size() + bias

    def exact_logits(self, hidden: Tensor, rows: Tensor | None) -> Tensor:
        """Float32 logits of some rows, `int64[k]`, or of all: float32[k].

        Args:
            hidden: floating `[d]`.
            rows: row ids, or None.
        """
        bias = None if self.bias is None else self.bias.detach().float()
        weight = self.weight.detach()
        if weight.device.type != "cpu":
            return _device_logits(hidden, weight, bias, rows)
        rows = torch.arange(self.out_features) if rows is None else rows
        return rescore(hidden, weight, bias, rows, impl=self.noise_impl)

    def search_rows(self, hidden: Tensor, bias: Tensor | None, **options: Any) -> HeadOutput:
        """Search the codes with a bias of one's own, or score all rows without codes.

        Args:
            hidden: floating `[n, d]`, finite.
            bias: `float32[1, V]` or `float32[n, V]`, added to the logits beside the head's own, or
                None.
            options: of `search_codes`.
        """
        if self.index is not None:
            self._require_unchanged()
        own = None if self.bias is None else self.bias.detach().float()
        added = own if bias is None else bias if own is None else bias + own
        weight = self.weight.detach()
        if self.searches_codes:
            from flashhead.nn.search import search_codes

            assert isinstance(self.index, CodesIndex)
            return search_codes(hidden, weight, added, self.index, self.plan, self.impl, **options)
        logits = torch.stack([self.exact_logits(state, None) for state in hidden])
        logits = logits if bias is None else logits + bias
        count, yes = torch.full((len(hidden),), self.out_features), torch.ones(len(hidden)) > 0
        read = torch.full((len(hidden),), self.dense_bytes)
        everything = torch.arange(self.out_features, dtype=torch.int32)
        upper = torch.full((len(hidden),), -math.inf, dtype=torch.float32)
        return HeadOutput(
            logits, logits.argmax(1), count, yes, yes, read, upper, [everything] * len(hidden)
        )

    def _require_hidden(self, hidden: Tensor) -> None:
        if hidden.dim() != 2 or hidden.shape[1] != self.in_features:
            raise FlashHeadError(
                f"hidden has shape {list(hidden.shape)}, wanted [n, {self.in_features}]"
            )
        if self.device_search is not None:
            if hidden.device != self.weight.device:
                got, wanted = hidden.device, self.weight.device
                raise FlashHeadError(f"hidden is on {str(got)!r}, wanted {str(wanted)!r}")
        elif not _is_finite(hidden):
            raise FlashHeadError("hidden holds NaN or infinity: no token can be searched for")

    def _require_unchanged(self) -> None:
        if self._fingerprint != self._weight_state():
            raise FlashHeadError(
                "the head's weight changed after its index was built: detach and attach again"
            )

    @torch.no_grad()
    def _search(self, hidden: Tensor) -> HeadOutput:
        if self.device_search is not None:
            return self._search_device(hidden)
        return self._search_host(hidden)

    def _search_device(self, hidden: Tensor) -> HeadOutput:
        from flashhead.nn.device import clusters_output, logits_output

        assert self.device_search is not None
        if not torch.compiler.is_compiling():
            self._require_unchanged()
        if isinstance(self.index, CodesIndex):
            return logits_output(self.device_search, hidden, self.index)
        return clusters_output(self.device_search, hidden, self.dense_bytes)

    @torch.compiler.disable
    def _search_host(self, hidden: Tensor) -> HeadOutput:
        self._require_unchanged()
        from flashhead.nn.search import search_clusters, search_codes

        bias = None if self.bias is None else self.bias.float()
        if isinstance(self.index, CodesIndex):
            return search_codes(hidden, self.weight, bias, self.index, self.plan, self.impl)
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
        return self.device_search is not None or _is_finite(hidden)

    def _weight_state(self) -> tuple[int, int, torch.dtype]:
        version = 0 if self.weight.is_inference() else self.weight._version
        return self.weight.data_ptr(), version, self.weight.dtype


def _plan_of(index: CodesIndex | ClustersIndex) -> Any:
    if isinstance(index, CodesIndex):
        from flashhead.ops.scan.query import make_plan

        return make_plan(index)
    return None


def _device_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None
) -> Tensor:
    """Float32 products on the weight's device, a part of the rows at a time; the sums to the host.

    What the GPU kernels do not serve (filters, penalties, log-probabilities) goes on from there.
    """
    state = hidden.to(weight.device).float()
    chosen = None if rows is None else rows.to(weight.device)
    parts = weight.split(_DEVICE_ROWS) if chosen is None else weight[chosen].split(_DEVICE_ROWS)
    # elementwise products and sums: no TF32, whatever the user allows matrix products
    logits = torch.cat([(part.float() * state).sum(1) for part in parts])
    if bias is not None:
        logits += bias if chosen is None else bias[chosen]
    return logits.cpu()


def _is_finite(hidden: Tensor) -> bool:
    """One operator instead of three: finite values cannot overflow a float64 sum."""
    return math.isfinite(hidden.sum(dtype=torch.float64).item())
