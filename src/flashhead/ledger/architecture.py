"""What the tensors of a language model are shaped by, out of its config.json, checked.

Families differ in few things: biases, norms of queries and keys, norms around a layer, experts, and
which layers see a window only. What a config leaves out is what transformers takes for it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from flashhead.errors import FlashHeadError
from flashhead.ledger.fields import Fields, brief
from flashhead.ledger.windows import (
    Windows,
    late_window,
    no_window,
    one_window,
    pattern_window,
    switched_window,
)

MOST_LAYERS = 4096


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Sizes of a decoder; fields are called as in config.json, and `token_bytes` reads them.

    Args:
        layer_types: of each layer, "full_attention" or "sliding_attention".
        sliding_window: tokens that a sliding layer sees; None: all.
        sparse_layers: whether a layer's MLP is a mixture of `num_experts`.
        qkv_bias: queries, keys and values have one; `output_bias`: the attention's output;
            `mlp_bias`: the MLP's layers.
        qk_norm: queries and keys are normalised a head.
        norms: RMS norms of a layer outside its attention, 2 or 4.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tie_word_embeddings: bool
    layer_types: tuple[str, ...]
    sliding_window: int | None
    sparse_layers: tuple[bool, ...]
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    norms: int


@dataclasses.dataclass(frozen=True)
class _Family:
    """How the models of a `model_type` differ from a Llama."""

    windows: Callable[[Fields, int], Windows]
    qkv_bias: bool | None = None
    """None: as `attention_bias` says."""
    output_bias: bool | None = None
    mlp_bias: bool | None = False
    qk_norm: bool = False
    norms: int = 2
    experts: bool = False
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)


def parse(config: dict[str, Any]) -> Architecture:
    """The architecture of a model's config; of a multimodal one, that of its text part.

    Raises:
        FlashHeadError: an unknown `model_type`, weights that are quantized, a size that is missing
            or makes no sense.
    """
    text = config.get("text_config", config)
    if not isinstance(text, dict):
        raise FlashHeadError(f"text_config={brief(text)}: wanted an object")
    kind = text.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise FlashHeadError(f"model_type {brief(kind)}: wanted one of {', '.join(FAMILIES)}")
    if text.get("quantization_config") or config.get("quantization_config"):
        raise FlashHeadError(
            "the config is of quantized weights, whose bytes it does not say: inspect the model"
        )
    outer = {"tie_word_embeddings": config.get("tie_word_embeddings")}
    defaults = {name: value for name, value in outer.items() if value is not None}
    family = FAMILIES[kind]
    return _build(kind, family, Fields(text, family.defaults | defaults))


def _build(kind: str, family: _Family, fields: Fields) -> Architecture:
    layers = fields.size("num_hidden_layers", most=MOST_LAYERS)
    heads = fields.size("num_attention_heads")
    kv_heads = _kv_heads(fields, heads, required=kind != "llama")
    types, window = family.windows(fields, layers)
    sparse = _sparse_layers(fields, layers) if family.experts else (False,) * layers
    experts = fields.size("num_experts", "num_local_experts") if any(sparse) else 0
    active = fields.size("num_experts_per_tok") if any(sparse) else 0
    if active > experts:
        raise FlashHeadError(f"num_experts_per_tok={active}: wanted at most {experts}, the experts")
    bias = fields.flag("attention_bias")
    return Architecture(
        model_type=kind,
        vocab_size=fields.size("vocab_size"),
        hidden_size=fields.size("hidden_size"),
        intermediate_size=0 if all(sparse) else fields.size("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=_head_dim(fields, heads),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        layer_types=types,
        sliding_window=window,
        sparse_layers=sparse,
        num_experts=experts,
        num_experts_per_tok=active,
        moe_intermediate_size=fields.size("moe_intermediate_size") if any(sparse) else 0,
        qkv_bias=bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=bias if family.output_bias is None else family.output_bias,
        mlp_bias=fields.flag("mlp_bias") if family.mlp_bias is None else family.mlp_bias,
        qk_norm=family.qk_norm,
        norms=family.norms,
    )


def _kv_heads(fields: Fields, heads: int, required: bool) -> int:
    """As many as query heads where the config says null, or, of a Llama, nothing."""
    name = "num_key_value_heads"
    if fields.get(name) is None and (name in fields.config or not required):
        return heads
    kv_heads = fields.size(name)
    if heads % kv_heads:
        raise FlashHeadError(f"{name}={kv_heads}: wanted a divisor of {heads}, the query heads")
    return kv_heads


def _head_dim(fields: Fields, heads: int) -> int:
    if fields.get("head_dim") is not None:
        return fields.size("head_dim")
    hidden = fields.size("hidden_size")
    if hidden % heads:
        raise FlashHeadError(f"no head_dim, and {hidden} dimensions are not {heads} equal heads")
    return hidden // heads


def _sparse_layers(fields: Fields, layers: int) -> tuple[bool, ...]:
    """Layers whose MLP is a mixture: every so many, without those that are named."""
    step = fields.size("decoder_sparse_step")
    dense = fields.get("mlp_only_layers")
    if not isinstance(dense, list | tuple) or any(type(layer) is not int for layer in dense):
        raise FlashHeadError(f"mlp_only_layers={brief(dense)}: wanted a list of layers")
    return tuple((i + 1) % step == 0 and i not in dense for i in range(layers))


_WINDOW = {"sliding_window": 4096}
FAMILIES: dict[str, _Family] = {
    "llama": _Family(no_window, mlp_bias=None),
    "mistral": _Family(one_window, qkv_bias=False, output_bias=False, defaults=_WINDOW),
    "qwen2": _Family(
        late_window,
        qkv_bias=True,
        output_bias=False,
        defaults={**_WINDOW, "max_window_layers": 28},
    ),
    "qwen3": _Family(
        late_window, qk_norm=True, defaults={**_WINDOW, "max_window_layers": 28, "head_dim": 128}
    ),
    "qwen3_moe": _Family(
        switched_window,
        qk_norm=True,
        experts=True,
        defaults={**_WINDOW, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "gemma3_text": _Family(
        pattern_window,
        qk_norm=True,
        norms=4,
        defaults={
            **_WINDOW,
            "vocab_size": 262208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "tie_word_embeddings": True,
            "sliding_window_pattern": 6,
        },
    ),
}
"""By `model_type`; defaults as in transformers' config classes."""
