"""Which row of a batch needs which logits: told by the sampling parameters of its request.

An output embedding sees hidden states and no requests. `RowNeeds` is a logits processor that never
touches a logit: vLLM hands it the sampling parameters of every request, and it remembers what each
needs until the head asks, before the logits are computed.

- Model runner V1 says which request each row of the batch is (`update_state`).
- Model runner V2 says only which slot a request has (`add_request`), and of a slot no more than its
  next owner. A batch is then served as its most demanding slot asks, whether or not that one is
  still running: never too few logits, but one request can make others dense until its slot goes to
  another.

Whatever cannot be told (dummy batches, prompt log-probabilities, a processor of somebody else's) is
dense.
"""

import enum
import importlib.metadata
import logging
import weakref
from typing import Any

from vllm.distributed import get_pp_group
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor as ProcessorV1
from vllm.v1.sample.logits_processor import process_dict_updates

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as ProcessorV2
except ImportError:  # vLLM up to 0.26: with any processor installed it takes model runner V1
    ProcessorV2 = object

GROUP = "vllm.logits_processors"
_log = logging.getLogger("vllm.flashhead")
_trackers: "weakref.WeakValueDictionary[str, RowNeeds]" = weakref.WeakValueDictionary()
_least_served: "list[Need]" = []


class Need(enum.IntEnum):
    """What a row needs, the most demanding first."""

    DENSE = 0
    """Every logit as the dense head gives it."""
    LOGITS = 1
    """All logits, within the KL budget: sampling, with or without top-k, top-p, min-p."""
    WINNER = 2
    """The largest logit, certified: greedy decoding."""


SPECULATIVE_NEEDS = {"dense": Need.DENSE, "search": Need.LOGITS, "greedy": Need.WINNER}
"""What rows get, by the option `speculative_target`, where nothing tells them apart."""


def need_of(params: SamplingParams) -> Need:
    """What a request's rows need."""
    edited = (
        params.structured_outputs is not None
        or params.logit_bias
        or params.allowed_token_ids is not None
        or params.bad_words
        or params.min_tokens
        or params.repetition_penalty != 1
        or params.frequency_penalty != 0
        or params.presence_penalty != 0
        or getattr(params, "thinking_token_budget", None) is not None
    )
    reported = (
        params.logprobs is not None
        or params.prompt_logprobs is not None
        or getattr(params, "logprob_token_ids", None) is not None
        or getattr(params, "prompt_logprob_token_ids", None) is not None
    )
    if edited or reported:
        return Need.DENSE
    return Need.WINNER if params.temperature == 0 else Need.LOGITS


class RowNeeds(ProcessorV1, ProcessorV2):
    """The logits processor of both model runners that only listens.

    Args:
        vllm_config: of the engine.
        rest: whatever the model runner adds.
    """

    def __init__(self, vllm_config: Any, *rest: Any) -> None:  # noqa: ARG002
        self._by_row: dict[int, Need] = {}
        self._by_slot: dict[int, Need] = {}
        self._rows: int | None = None
        self._calls = 0
        self._config = vllm_config.quant_config
        self._others = _other_processors(vllm_config)
        if self._others:
            _log.warning(
                "other logits processors are installed (%s), which may change any logit: the "
                "dense head serves",
                self._others,
            )
        _trackers[vllm_config.instance_id] = self

    @classmethod
    def validate_params(cls, params: SamplingParams) -> None:
        """Refuse what the engine's `speculative_target` cannot serve."""
        if _least_served and need_of(params) < max(_least_served):
            greedy = max(_least_served) is Need.WINNER
            raise ValueError(
                f"flashhead's speculative_target={'greedy' if greedy else 'search'!r} serves no "
                "structured output, penalties, biases, allowed or bad tokens, min_tokens or "
                f"log-probabilities{' and no temperature above 0' if greedy else ''}"
            )

    def is_argmax_invariant(self) -> bool:
        """It changes nothing."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """V1, before each step: which request each row is."""
        self._calls = 0
        if batch_update is not None:
            self._require_searched()
            self._rows = batch_update.batch_size
            process_dict_updates(
                self._by_row, batch_update, lambda params, _prompt, _output: need_of(params)
            )

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """V2: a request gets a slot."""
        self._require_searched()
        self._by_slot[req_idx] = need_of(sampling_params)
        return False

    def _require_searched(self) -> None:
        """Once, before the first request is served: a head that was not found is an error."""
        check = getattr(self._config, "require_searched", None)
        self._config = None
        if check is not None and get_pp_group().is_last_rank:
            check()

    def apply_staged_writes(self) -> None:
        """V2, before each step."""
        self._calls = 0

    def apply(self, logits: Any, *_: Any) -> Any:
        """Logits as they are."""
        return logits

    def of_rows(self, rows: int) -> list[Need]:
        """Needs of the rows of the logits asked for now."""
        self._calls += 1
        if self._others:
            return [Need.DENSE] * rows
        if self._by_slot:
            return [min(self._by_slot.values())] * rows
        # later calls of a step are for prompt log-probabilities
        if self._calls > 1 or rows != self._rows:
            return [Need.DENSE] * rows
        return [self._by_row.get(row, Need.DENSE) for row in range(rows)]


def tracker_of(instance: str) -> RowNeeds | None:
    """The listener of an engine; None where its model runner loads no processors."""
    return _trackers.get(instance)


def refuse_below(need: Need) -> None:
    """From now on requests that need more are refused in this process."""
    _least_served.append(need)


def _other_processors(vllm_config: Any) -> str:
    """Names of custom logits processors beside this one."""
    installed = [
        entry.value
        for entry in importlib.metadata.entry_points(group=GROUP)
        if not entry.value.startswith("flashhead.")
    ]
    chosen = getattr(vllm_config.model_config, "logits_processors", None) or []
    return ", ".join([*installed, *map(str, chosen)])
