"""What a head is asked for, told by the model's `LogitsProcessor`: adapters, and a draft's calls.

Adapters on the output embedding itself (LoRA on `lm_head`): rows that they change are dense.
vLLM adds such an adapter's part to the logits, so these must be exact, and a winner found without
it need not be the winner. Where adapters are allowed vLLM wraps a model's `LogitsProcessor` and
calls the forward of the class that it wrapped, with the wrapper as `self`. That class is this one,
from vLLM's layer registry: before each call it tells the head which rows have an adapter with
weights of the head. Rows of adapters on the body only stay searched.

EAGLE and MTP drafts ask the target's head, through a `LogitsProcessor` of their own. What they
propose is verified whatever it is, so those rows are searched for their winner.
"""

from typing import Any

from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from flashhead.integrations.vllm.method import FlashHeadMethod


class FlashLogitsProcessor(LogitsProcessor):
    """`LogitsProcessor` that tells the head which rows an adapter changes, and who asks."""

    adapters: tuple[int | None, list[int]] = (None, [])
    """Version of the adapters' weights, and slots that have weights of the head."""
    is_draft = False
    """Whether it belongs to a draft that was built under the target's config."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_draft = builds_draft(get_current_vllm_config())

    def forward(self, lm_head: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Logits; `self` may be vLLM's wrapper of one of these."""
        method = getattr(getattr(lm_head, "base_layer", lm_head), "quant_method", None)
        if not isinstance(method, FlashHeadMethod):
            return LogitsProcessor.forward(self, lm_head, hidden_states, *args, **kwargs)
        method.adapted = adapted_rows(self, hidden_states.shape[:-1].numel())
        method.asked_by_draft = getattr(self, "is_draft", False)
        try:
            return LogitsProcessor.forward(self, lm_head, hidden_states, *args, **kwargs)
        finally:
            method.adapted, method.asked_by_draft = None, False


def builds_draft(engine: Any) -> bool:
    """Whether a model that is built now is a draft that vLLM builds under the target's config: it
    loads the target first, and gives EAGLE and MTP drafts no config of their own.
    """
    if getattr(engine.speculative_config, "draft_model_config", None) is None:
        return False
    target = engine.quant_config
    return bool(getattr(target, "is_loaded", False))


def adapted_rows(processor: Any, count: int) -> set[int]:
    """Rows of a batch whose adapter has weights of the head.

    Args:
        processor: the model's, or vLLM's wrapper of it.
        count: rows of the batch; where vLLM's mapping is of another number, all are meant.
    """
    if isinstance(processor, FlashLogitsProcessor):  # importing vLLM's wrapper takes a second
        return set()
    slots = _slots(processor)
    if not slots:
        return set()
    # on a GPU this waits for it, while an adapter of the head is loaded
    of_rows = processor.punica_wrapper.sampler_indices.tolist()
    if len(of_rows) != count:
        return set(range(count))
    return {row for row, slot in enumerate(of_rows) if slot in slots}


def _slots(processor: Any) -> list[int]:
    """Slots of adapters with weights of the head, looked up when an adapter came or went."""
    weights = processor.lora_a_stacked  # [slots, 1, rank, d], zero where there are none
    version = None if weights.is_inference() else weights._version
    known, slots = processor.base_layer.adapters
    if version is None or version != known:
        slots = weights.flatten(1).any(1).nonzero().flatten().tolist()
        if weights.is_cpu and len(weights) - 1 in slots:
            slots.append(-1)  # no adapter: vLLM's CPU operators add the last slot's
        processor.base_layer.adapters = (version, slots)
    return slots
