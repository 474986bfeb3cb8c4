"""Model classes of vLLM whose attention is latent: vLLM's own models with other attention modules.

A class is made when it is asked for (`FlashHeadLatentQwen2ForCausalLM`, ...): vLLM's class builds
itself, then each attention module gives way to a `ServedLatentAttention`, which keeps its norms.
Angles and the check of the folder's shapes are those of `integrations.latent_model`.
"""

import functools
import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from vllm.config import VllmConfig

from flashhead.errors import FlashHeadError
from flashhead.integrations.latent_model import (
    SECTION,
    give_angles,
    latent_class_of,
    latent_modules,
    require_tensors,
)
from flashhead.integrations.vllm.latent_config import BASES, PREFIX
from flashhead.integrations.vllm.latent_layer import ServedLatentAttention


def __getattr__(name: str) -> Any:
    """The model class of this name."""
    base = name.removeprefix(PREFIX)
    if name == base or base not in BASES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _model_class(base)


@functools.cache
def _model_class(base: str) -> type[nn.Module]:
    module = importlib.import_module(f"vllm.model_executor.models.{BASES[base]}")
    theirs = getattr(module, base)

    def build(self: Any, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        require_servable(vllm_config)
        theirs.__init__(self, vllm_config=vllm_config, prefix=prefix, **kwargs)
        replace_attention(self, vllm_config)

    def load(self: Any, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return load_weights(self, theirs.load_weights, weights)

    members = {"__init__": build, "load_weights": load, "__module__": __name__}
    return type(f"{PREFIX}{base}", (theirs,), members)


def require_servable(engine: VllmConfig) -> None:
    """Raise FlashHeadError for a way of serving that latent attention does not have."""
    parallel = engine.parallel_config
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if getattr(parallel, name) != 1:
            raise FlashHeadError(
                f"vLLM with latent attention: {name} {getattr(parallel, name)}: wanted 1"
            )
    if engine.lora_config is not None:
        raise FlashHeadError("vLLM with latent attention: adapters (LoRA) are not supported")
    kept = str(engine.cache_config.cache_dtype)
    if kept not in ("auto", str(engine.model_config.dtype).removeprefix("torch.")):
        raise FlashHeadError(
            f"vLLM with latent attention: kv_cache_dtype {kept!r}: wanted auto, the model's dtype"
        )


def replace_attention(model: nn.Module, engine: VllmConfig) -> None:
    """Put latent attention in the place of vLLM's.

    Raises:
        FlashHeadError: the folder's shapes do not fit its model.
    """
    expected = _expected(engine)
    for name, wanted in latent_modules(expected).items():
        parent, _, own = name.rpartition(".")
        theirs: Any = model.get_submodule(name)
        layer_name = theirs.attn.layer_name
        del engine.compilation_config.static_forward_context[layer_name]
        norms = {
            "query_norm": getattr(theirs, "q_norm", None),
            "key_norm": getattr(theirs, "k_norm", None),
        }
        served = ServedLatentAttention(
            wanted.shape, wanted.table, wanted.layer_idx, layer_name, engine, **norms
        )
        setattr(model.get_submodule(parent), own, served)


def _expected(engine: VllmConfig) -> PreTrainedModel:
    """The model in transformers, without weights: its shapes are checked, its angles are there."""
    config, folder = engine.model_config.hf_config, Path(engine.model_config.model)
    with torch.device("meta"):
        expected = latent_class_of(config, getattr(config, SECTION))(config)
    if folder.is_dir():
        require_tensors(folder, expected, packed=False)
    for name, module in list(expected.named_modules()):
        if any(own.endswith("inv_freq") for own, _ in module.named_buffers(recurse=False)):
            parent, _, own = name.rpartition(".")
            # angles are computed, not loaded: not on the meta device
            setattr(expected.get_submodule(parent), own, type(module)(config.get_text_config()))
    give_angles(expected)
    return expected


def load_weights(model: nn.Module, others: Any, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Load latent attention by its names in the folder, and all else as vLLM's class does.

    Args:
        model: whose attention has been replaced.
        others: `load_weights` of vLLM's class.
        weights: names and tensors of the checkpoint.

    Returns:
        names of all parameters that were loaded.

    Raises:
        FlashHeadError: a tensor of latent attention that is missing or of another shape.
    """
    own = {
        f"{name}.{key}": parameter
        for name, module in model.named_modules()
        if isinstance(module, ServedLatentAttention)
        for key, parameter in module.named_parameters()
    }
    loaded: set[str] = set()

    def split() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            if name not in own:
                yield name, tensor
                continue
            if own[name].shape != tensor.shape:
                raise FlashHeadError(
                    f"{name} is {list(tensor.shape)}, wanted {list(own[name].shape)}"
                )
            own[name].data.copy_(tensor)
            loaded.add(name)

    rest = others(model, split())
    missing = sorted(set(own) - loaded)
    if missing:
        raise FlashHeadError(f"{len(missing)} tensors missing, such as {missing[0]}")
    return set(rest) | loaded
