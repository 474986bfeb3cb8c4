"""Output embeddings that are not handed a quantization config: reached by vLLM's layer registry.

Some model classes build their head without `quant_config`. vLLM instantiates a registered subclass
in place of `ParallelLMHead`, and this one fills the config in where the engine's is ours.
"""

import logging
from typing import Any

from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

_log = logging.getLogger("vllm.flashhead")


class FlashParallelLMHead(ParallelLMHead):
    """`ParallelLMHead` that finds the engine's quantization config by itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from flashhead.integrations.vllm.config import FlashHeadConfig

        engine = get_current_vllm_config().quant_config
        # positional: num_embeddings, embedding_dim, bias, params_dtype, org_num, padding, config
        missing = len(args) < 7 and kwargs.get("quant_config") is None
        if missing and isinstance(engine, FlashHeadConfig):
            kwargs["quant_config"] = engine
        super().__init__(*args, **kwargs)


def register_layers() -> None:
    """Register the layer once; another plugin's stays."""
    from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot

    name = ParallelLMHead.__name__
    if name not in op_registry_oot and issubclass(ParallelLMHead, PluggableLayer):
        ParallelLMHead.register_oot(FlashParallelLMHead)
    elif op_registry_oot.get(name) is not FlashParallelLMHead:
        _log.warning(
            "another plugin replaces %s: models that give their head no quantization config are "
            "not searched",
            name,
        )
