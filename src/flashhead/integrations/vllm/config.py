"""The quantization method `flashhead`: a search for the head, the checkpoint's own for the rest."""

import inspect
import logging
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import (
    QUANTIZATION_METHODS,
    get_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from flashhead.integrations.vllm.layers import register_layers
from flashhead.integrations.vllm.method import FlashHeadMethod
from flashhead.integrations.vllm.options import PluginOptions, read_options
from flashhead.integrations.vllm.plugin import METHOD, is_enabled
from flashhead.integrations.vllm.requests import SPECULATIVE_NEEDS, refuse_below

_log = logging.getLogger("vllm.flashhead")
OVERRIDES = "flashhead_options"
"""Name of the options in `--hf-overrides`."""
SECTION = "flashhead"
"""What a converted folder's config.json has."""


class FlashHeadConfig(QuantizationConfig):
    """Wraps the checkpoint's quantization config, or none.

    Args:
        inner: of the checkpoint; None: it is not quantized.
        values: options as `quantization_config` in config.json gives them.
    """

    def __init__(
        self, inner: QuantizationConfig | None = None, values: dict[str, Any] | None = None
    ) -> None:
        self.inner = inner
        if inner is not None:  # vLLM asks the config of the engine, not its class
            self.get_min_capability = inner.get_min_capability  # type: ignore[method-assign]
            # names of KV-cache scales and tensors to skip in the checkpoint are its method's
            for name in (
                "get_cache_scale_mapper",
                "get_checkpoint_weight_mapper",
                "_ignore_unexpected_suffixes",
            ):
                if hasattr(inner, name):
                    setattr(self, name, getattr(inner, name))
        packed = {} if inner is None else inner.packed_modules_mapping
        super().__init__()
        self.packed_modules_mapping = packed
        self.values = values or {}
        self.options: PluginOptions = read_options(self.values)
        self.model: str | None = None
        self.revision: str | None = None
        self.heads: list[FlashHeadMethod] = []
        self.has_lm_head = self.keeps_head = False

    def __getattr__(self, name: str) -> Any:
        """What model classes read of the checkpoint's method: its ignore list, block shape, ..."""
        inner = self.__dict__.get("inner")
        if inner is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        return getattr(inner, name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Registries do not travel with a config to vLLM's worker processes: it brings its own."""
        self.__dict__.update(state)
        register_layers()

    @property
    def packed_modules_mapping(self) -> dict[str, list[str]]:
        """Of the model, shared with the inner config."""
        return self._packed

    @packed_modules_mapping.setter
    def packed_modules_mapping(self, mapping: dict[str, list[str]]) -> None:
        self._packed = mapping
        if self.inner is not None:
            self.inner.packed_modules_mapping = mapping

    def get_name(self) -> str:
        """Of the method."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Of the inner method; a search takes all that a head can be."""
        if self.inner is not None:
            return self.inner.get_supported_act_dtypes()
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Compute capability: of the inner method, where there is one."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: any checkpoint will do."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "FlashHeadConfig":
        """From `quantization_config` of config.json: ours, or the checkpoint's own to wrap."""
        if config.get("quant_method") != METHOD:
            return cls(_inner_config(config))
        values = {name: value for name, value in config.items() if name != "quant_method"}
        inner = values.pop("inner", None)
        return cls(None if inner is None else _inner_config(inner), values)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim a quantized checkpoint that the user, or its folder, wants searched."""
        converted = isinstance(getattr(hf_config, SECTION, None), dict)
        ours = hf_quant_cfg.get("quant_method") == METHOD
        return METHOD if user_quant == METHOD or ours or converted else None

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Learn the model's name and the user's options."""
        self.model, self.revision = model_name, revision
        given = getattr(hf_config, OVERRIDES, None) or {}
        self.options = read_options({**self.values, **given})
        if self.options.speculative_target != "dense":
            refuse_below(SPECULATIVE_NEEDS[self.options.speculative_target])
        if self.inner is not None:
            known = inspect.signature(self.inner.maybe_update_config).parameters
            more = {"hf_config": hf_config, "revision": revision}
            self.inner.maybe_update_config(
                model_name, **{name: value for name, value in more.items() if name in known}
            )
        register_layers()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Names of the inner config follow the model's."""
        if self.inner is not None:
            self.inner.apply_vllm_mapper(hf_to_vllm_mapper)

    def get_cache_scale(self, name: str) -> str | None:
        """Of the inner config."""
        getter = getattr(self.inner, "get_cache_scale", None)
        return None if getter is None else getter(name)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The inner method, wrapped for the output embedding."""
        inner = None
        if self.inner is not None and not getattr(layer, "was_given_none", False):
            inner = self.inner.get_quant_method(layer, prefix)
        if not isinstance(layer, VocabParallelEmbedding):
            if inner is None and isinstance(layer, LinearBase):
                return UnquantizedLinearMethod()
            return inner
        inner = inner or UnquantizedEmbeddingMethod()
        is_head = isinstance(layer, ParallelLMHead)
        self.has_lm_head |= is_head
        if not is_enabled() or not (is_head or _serves_as_head()):
            return inner
        if not isinstance(inner, UnquantizedEmbeddingMethod | UnquantizedLinearMethod):
            _log.warning(
                "%s is quantized by the checkpoint (%s): it stays so and is not searched",
                *(prefix, type(inner).__name__),
            )
            self.keeps_head |= is_head
            return inner
        method = FlashHeadMethod(inner, self, prefix, is_head)
        self.heads.append(method)
        return method

    @property
    def is_loaded(self) -> bool:
        """Whether the model of this config has its head already."""
        return self.keeps_head or any(head.is_ready for head in self.heads)

    def require_searched(self) -> None:
        """Refuse to serve a model whose head was not found, instead of serving it dense.

        Raises:
            RuntimeError: no output embedding came by, nor one that the checkpoint quantizes.
        """
        if is_enabled() and not self.is_loaded:
            raise RuntimeError(
                f"flashhead: no output embedding of {self.model} is a ParallelLMHead or a tied "
                "VocabParallelEmbedding of vLLM's: serve it without --quantization flashhead"
            )


def _serves_as_head() -> bool:
    """Whether an input embedding may be the head too: some models have no other."""
    model_config = get_current_vllm_config().model_config
    text = model_config.hf_config.get_text_config()
    return bool(getattr(text, "tie_word_embeddings", False))


def _inner_config(config: dict[str, Any]) -> QuantizationConfig:
    """The checkpoint's quantization config, as vLLM would choose it without this plugin."""
    chosen = config.get("quant_method")
    for name in QUANTIZATION_METHODS:
        if name != METHOD:
            found = get_quantization_config(name).override_quantization_method(config, None)
            if found is not None:
                chosen = found
                break
    if chosen is None:
        raise ValueError(f"the checkpoint's quantization config names no quant_method: {config}")
    return get_quantization_config(chosen).from_config(config)
