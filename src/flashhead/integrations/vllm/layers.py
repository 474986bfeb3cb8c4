"""Layers that vLLM instantiates in place of its own, by its layer registry.

Some model classes build their head without `quant_config`: `FlashParallelLMHead` fills it in where
the engine's is ours. vLLM would not quantize such a head whatever the checkpoint says, so it is
searched with its plain weights. `FlashLogitsProcessor` tells which rows have adapters of the head,
and which calls are a draft's: EAGLE and MTP drafts share the target's head.
"""

import logging
from typing import Any

from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from flashhead.integrations.vllm.adapters import FlashLogitsProcessor, builds_draft

_log = logging.getLogger("vllm.flashhead")


class FlashParallelLMHead(ParallelLMHead):
    """`ParallelLMHead` that finds the engine's quantization config by itself."""

    was_given_none = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from flashhead.integrations.vllm.config import FlashHeadConfig

        # positional: num_embeddings, embedding_dim, bias, params_dtype, org_num, padding, config
        missing = len(args) < 7 and kwargs.get("quant_config") is None
        config = _config_for(get_current_vllm_config()) if missing else None
        if isinstance(config, FlashHeadConfig):
            kwargs["quant_config"] = config
            kwargs["prefix"] = kwargs.get("prefix") or "lm_head"
            self.was_given_none = True
        super().__init__(*args, **kwargs)


def _config_for(engine: Any) -> Any:
    """The quantization config of the model that is built now: the target's, or its draft's.

    A draft that names the target's folder (MTP) has no head of its own to search: vLLM puts the
    target's in its place.
    """
    if not builds_draft(engine):
        return engine.quant_config
    draft = engine.speculative_config.draft_model_config
    if draft.model == engine.speculative_config.target_model_config.model:
        return None
    return VllmConfig.get_quantization_config(draft, engine.load_config)


def register_layers() -> None:
    """Register the layers once; another plugin's stay."""
    from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot

    for theirs, ours, otherwise in (
        (ParallelLMHead, FlashParallelLMHead, "heads that get no quantization config are dense"),
        (LogitsProcessor, FlashLogitsProcessor, "engines that allow adapters are dense"),
    ):
        name = theirs.__name__
        if name not in op_registry_oot and issubclass(theirs, PluggableLayer):
            theirs.register_oot(ours)
        elif op_registry_oot.get(name) is not ours:
            _log.warning("another plugin replaces %s: %s", name, otherwise)
