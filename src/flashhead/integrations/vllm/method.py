"""The output embedding's method: the checkpoint's own, and a search in front of it.

Logits come back fresh and writable. Rows that need every logit are the checkpoint's own product,
bit by bit; where all rows do, its result is returned as it is. The other rows are float32: the
winner and what the distribution needs are exact, the rest are estimates (`nn/head.py`). Of greedy
rows a GPU gives the winner alone; the others are -inf.
"""

import logging
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from flashhead.integrations.vllm.find_index import Head, find_index
from flashhead.integrations.vllm.ranks import ANY, agree
from flashhead.integrations.vllm.requests import SPECULATIVE_NEEDS, Need, tracker_of
from flashhead.integrations.vllm.winners import gives_winners, searched_winners
from flashhead.nn.head import FlashHead
from flashhead.nn.tuning import Crossover

if TYPE_CHECKING:
    from flashhead.integrations.vllm.config import FlashHeadConfig

_log = logging.getLogger("vllm.flashhead")
REPORT_SECONDS = 60.0


class FlashHeadMethod(QuantizeMethodBase):
    """Searches the vocabulary for the rows that allow it.

    Args:
        inner: the checkpoint's own method of this layer, not quantized.
        config: of the model that the layer belongs to.
        prefix: name of the layer.
        is_head: whether the layer is an output embedding for sure; an input embedding is searched
            only where the model has no other.
    """

    def __init__(
        self, inner: QuantizeMethodBase, config: "FlashHeadConfig", prefix: str, is_head: bool
    ) -> None:
        self.inner, self.config, self.prefix, self.is_head = inner, config, prefix, is_head
        engine = get_current_vllm_config()
        self.instance = engine.instance_id
        self.is_draft = _is_draft(engine, config.model)
        self.trust_remote_code = engine.model_config.trust_remote_code
        self.allows_adapters = engine.lora_config is not None
        self.adapted: set[int] | None = None
        """Rows of the batch with an adapter of the head itself; None: nobody has told."""
        self.asked_by_draft = False
        """Whether a draft that shares the head asks."""
        self.head: FlashHead | None = None
        self.dense_rows = self.draft_rows = self.index_bytes = 0
        self.is_gathered = self.is_ready = False
        self._reported = time.monotonic()
        self._warned = False

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        """The inner method's."""
        self.inner.create_weights(layer, *args, **kwargs)

    def embedding(self, layer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The inner method's."""
        return self.inner.embedding(layer, *args, **kwargs)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """The inner method's: the storage is shared, never written to."""
        tie = getattr(self.inner, "tie_weights", None)
        if tie is None:
            layer.weight = embed_tokens.weight
            return layer
        return tie(layer, embed_tokens)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Find or build the index."""
        self.inner.process_weights_after_loading(layer)
        if not self.is_head and self.config.has_lm_head:
            return
        self.is_gathered, self.is_ready = layer.tp_size > 1, True
        options, start = self.config.options, time.perf_counter()
        weight, first_row, vocab_size = _own_rows(layer)
        if not len(weight):  # a rank of padding only
            if self.is_gathered:
                agree(ANY, get_tp_group().cpu_group)
            return
        head = Head(
            weight,
            first_row,
            vocab_size,
            self.config.model or "",
            self.config.revision,
            self.trust_remote_code,
        )
        index, sample, source = find_index(head, options)
        linear = nn.Linear(weight.shape[1], len(weight), bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        bias = getattr(layer, "bias", None)
        if bias is not None:
            linear.bias = nn.Parameter(bias[: len(weight)], requires_grad=False)
        given = options.crossover
        self.head = FlashHead(
            linear.eval(),
            index,
            impl=options.impl,
            sample=None if sample is None else sample.to(weight.dtype),
            crossover=None if given is None else Crossover(given, given),
        )
        if self.is_gathered:
            own = Crossover(self.head.crossover_rows, self.head.token_crossover_rows)
            agreed = agree(own, get_tp_group().cpu_group)
            self.head.crossover_rows, self.head.token_crossover_rows = agreed.logits, agreed.token
        self.index_bytes = sum(tensor.nbytes for tensor in index.tensors().values())
        _log.info(
            "FlashHead on %s%s: index %s (%.0f MB beside a head of %.0f MB), impl %s, searched up "
            "to %d rows greedy, %d rows sampled; %.1f s",
            *(self.prefix, " of the draft model" if self.is_draft else "", source),
            *(self.index_bytes / 1e6, weight.nbytes / 1e6, self.head.impl),
            *(self.head.token_crossover_rows, self.head.crossover_rows),
            time.perf_counter() - start,
        )

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits of hidden states, of this rank's rows of the vocabulary."""
        head = self.head
        if head is None:
            return self._dense(layer, x, bias)
        states = x.reshape(-1, x.shape[-1])
        self.draft_rows += len(states) if self.asked_by_draft and not self.is_draft else 0
        winner, logits = self._split(len(states), head)
        if not (winner or logits) or not _is_searchable(states, head):
            self.dense_rows += len(states)
            return self._dense(layer, x, bias)
        width = layer.num_embeddings_per_partition
        if len(winner) == len(states) and gives_winners(head):  # most steps by far
            return searched_winners(head, states, width).view(*x.shape[:-1], width)
        out = states.new_empty(len(states), width, dtype=torch.float32)
        out[:, head.out_features :] = -torch.inf
        searched = {*winner, *logits}
        dense = [row for row in range(len(states)) if row not in searched]
        if winner:
            _fill(out, winner, self._winners(head, _rows_of(states, winner)))
        if logits:
            _fill(out, logits, self._logits(head, _rows_of(states, logits)))
        if dense:
            self.dense_rows += len(dense)
            _fill(out, dense, self.inner.apply(layer, _rows_of(states, dense), bias))
        self._report()
        return out.view(*x.shape[:-1], -1)

    def _dense(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """The inner product; in float32 where ranks are gathered, as another may have searched."""
        logits: Tensor = self.inner.apply(layer, x, bias)
        return logits.float() if self.is_gathered else logits

    def _split(self, count: int, head: FlashHead) -> tuple[list[int], list[int]]:
        """Rows to be searched for their winner, and for their logits."""
        needs = self._needs(count)
        winner = [row for row, need in enumerate(needs) if need is Need.WINNER]
        logits = [row for row, need in enumerate(needs) if need is Need.LOGITS]
        # beyond the crossover the dense product is as fast
        winner = winner if len(winner) <= head.token_crossover_rows else []
        logits = logits if len(logits) <= head.crossover_rows else []
        return winner, logits

    def _needs(self, count: int) -> list[Need]:
        if self.is_draft or self.asked_by_draft:  # whatever it proposes is verified
            return [Need.WINNER] * count
        tracker = tracker_of(self.instance)
        if tracker is not None:
            needs = tracker.of_rows(count)
        else:
            needs = [SPECULATIVE_NEEDS[self.config.options.speculative_target]] * count
        if not self.allows_adapters:
            return needs
        if self.adapted is None:
            if not self._warned:
                _log.warning(
                    "the model's logits processor is not vLLM's own and does not say which "
                    "adapters change %s: where adapters are enabled the dense head serves",
                    self.prefix,
                )
            self._warned = True
            return [Need.DENSE] * count
        return [Need.DENSE if row in self.adapted else need for row, need in enumerate(needs)]

    @staticmethod
    def _winners(head: FlashHead, states: Tensor) -> Tensor:
        if gives_winners(head):
            return searched_winners(head, states, head.out_features)
        if head.device_search is not None:  # clusters: tokens without scores
            return head.search(states).logits
        found = head.search_rows(states, None, winner_only=True)
        head.stats.add(found)
        return found.logits

    @staticmethod
    def _logits(head: FlashHead, states: Tensor) -> Tensor:
        found = head.search(states)
        if head.device_search is None:
            head.stats.add(found)
        return found.logits

    @property
    def serves(self) -> bool:
        """Whether the layer is asked for logits."""
        return self.is_head or self.head is not None

    def statistics(self) -> dict[str, Any]:
        """What was searched and what it read, as JSON values."""
        if self.head is None:
            return {"layer": self.prefix, "kind": "dense"}
        stats = self.head.stats
        searched = max(1, stats.rows)
        return {
            "layer": self.prefix,
            "kind": self.head.kind,
            "impl": self.head.impl,
            "draft": self.is_draft,
            "searched_rows": stats.rows,
            "dense_rows": self.dense_rows,
            "draft_rows": self.draft_rows,
            "certified_fraction": stats.certified / searched,
            "bytes_fraction": stats.bytes_read / searched / self.head.dense_bytes,
            "index_bytes": self.index_bytes,
            "head_bytes": self.head.dense_bytes,
            "crossover_rows": self.head.crossover_rows,
            "token_crossover_rows": self.head.token_crossover_rows,
        }

    def _report(self) -> None:
        """Log the counters once a minute of work; on a GPU reading them would wait for it."""
        now = time.monotonic()
        on_device = self.head is None or self.head.device_search is not None
        if now - self._reported < REPORT_SECONDS or on_device:
            return
        self._reported = now
        stats = self.statistics()
        _log.info(
            "FlashHead: %d rows searched (%.1f%% of the head's bytes, %.1f%% certified), %d dense",
            *(stats["searched_rows"], 100 * stats["bytes_fraction"]),
            *(100 * stats["certified_fraction"], self.dense_rows),
        )


def _own_rows(layer: Any) -> tuple[Tensor, int, int]:
    """Rows of the vocabulary that this rank has, the first one's id, and how many all are."""
    shard = layer.shard_indices
    first, last = shard.org_vocab_start_index, shard.org_vocab_end_index
    return layer.weight.detach()[: last - first], first, layer.org_vocab_size


def _is_draft(engine: Any, model: str | None) -> bool:
    """Whether the model proposes what another verifies."""
    speculative = engine.speculative_config
    draft = getattr(speculative, "draft_model_config", None)
    if draft is None:
        return False
    return draft.model == model and model != speculative.target_model_config.model


def _is_searchable(states: Tensor, head: FlashHead) -> bool:
    """A host's search wants finite states; on a GPU a state that is not finite is not certified."""
    if head.device_search is not None:
        return True
    return bool(torch.isfinite(states.sum(dtype=torch.float64)))


def _rows_of(states: Tensor, rows: list[int]) -> Tensor:
    if len(rows) == len(states):
        return states
    return states[torch.tensor(rows).to(states.device, non_blocking=True)]


def _fill(out: Tensor, rows: list[int], logits: Tensor) -> None:
    """Logits into rows of the batch; the dense product's may have padding."""
    width = logits.shape[-1]
    if len(rows) == len(out):
        out[:, :width] = logits
    else:
        out[torch.tensor(rows).to(out.device, non_blocking=True), :width] = logits.float()
