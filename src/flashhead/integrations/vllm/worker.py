"""`--worker-extension-cls flashhead.integrations.vllm.worker.FlashHeadWorker`: what was searched.

`llm.collective_rpc("flashhead_statistics")` then returns the counters of each worker's heads, and
`"flashhead_cache_bytes"` what a token takes in each layer's cache.
"""

from typing import Any

from flashhead.integrations.vllm.method import FlashHeadMethod


class FlashHeadWorker:
    """Methods that vLLM adds to its workers."""

    model_runner: Any

    def flashhead_statistics(self) -> list[dict[str, Any]]:
        """Counters of the heads of this worker, the target's and the draft's."""
        models = [self.model_runner.get_model()]
        for name in ("drafter", "speculator"):
            draft = getattr(getattr(self.model_runner, name, None), "model", None)
            if draft is not None:
                models.append(draft)
        methods: dict[int, FlashHeadMethod] = {}
        for model in models:
            for module in model.modules():
                method = getattr(module, "quant_method", None)
                if isinstance(method, FlashHeadMethod) and method.serves:
                    methods[id(method)] = method
        return [method.statistics() for method in methods.values()]

    def flashhead_cache_bytes(self) -> dict[str, float]:
        """Bytes a token of each layer's cache tensor, as it was allocated, by the layer's name."""
        found = {}
        context = self.model_runner.compilation_config.static_forward_context
        for group in self.model_runner.kv_cache_config.kv_cache_groups:
            for name in group.layer_names:
                cache = context[name].kv_cache
                cache = cache[0] if isinstance(cache, list) else cache  # older versions of vLLM
                tokens = cache.shape[0] * group.kv_cache_spec.block_size
                found[name] = cache.numel() * cache.element_size() / tokens
        return found
