"""Models of random weights with full, grouped and latent caches that share all but attention.

For timing only: a Llama of 32,000 tokens whose MLP is 2.6875 times as wide as its hidden states (as
Llama 2 7B). The latent one is laid out as DeepSeek-V2's attention (arXiv 2405.04434): a latent, and
a rotary key that turns for all heads; without rotary numbers in the shape, keys are rebuilt.
"""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from flashhead.bench.attention_shapes import AttentionShape
from flashhead.integrations.latent_model import serve_latents
from flashhead.nn.latent import LatentAttention
from flashhead.nn.latent_shape import LatentShape
from flashhead.nn.rotary import RotaryTable
from flashhead.nn.token_store import StoreOptions

VOCAB = 32000
MLP = 2.6875


def random_models(
    shape: AttentionShape, layers: int, longest: int, device: str, dtype: torch.dtype
) -> tuple[PreTrainedModel, dict[str, PreTrainedModel]]:
    """The latent model, and those with a full cache of all heads ("full") and of few ("gqa").

    Args:
        shape: of one layer's attention.
        layers: of the model.
        longest: tokens of a row.
        device: where they are made.
        dtype: of the weights.
    """
    torch.manual_seed(0)
    full = _llama(shape, shape.heads, layers, longest, device, dtype)
    bases = {"full": full}
    if shape.kv_heads < shape.heads:
        grouped = _llama(shape, shape.kv_heads, layers, longest, "meta", dtype)
        small = _llama(shape, shape.kv_heads, 1, longest, device, dtype)
        _share(grouped, full)
        for layer in grouped.model.layers:
            layer.self_attn.to_empty(device=device)
            layer.self_attn.load_state_dict(small.model.layers[0].self_attn.state_dict())
        bases["gqa"] = grouped
    latent = _llama(shape, shape.heads, layers, longest, "meta", dtype)
    _share(latent, full)
    table = RotaryTable.of_base(_latent_shape(shape).rotary_dim)
    for i, layer in enumerate(latent.model.layers):
        with torch.device(device):
            layer.self_attn = LatentAttention(_latent_shape(shape), table, i).to(dtype)
    serve_latents(latent, StoreOptions())
    return latent.eval(), {name: base.eval() for name, base in bases.items()}


def _llama(
    shape: AttentionShape, kv_heads: int, layers: int, longest: int, device: str,
    dtype: torch.dtype,
) -> PreTrainedModel:  # fmt: skip
    d = shape.heads * shape.head_dim
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=d,
        intermediate_size=int(d * MLP),
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=longest,
    )
    with torch.device(device):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return made


def _share(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Everything but attention is the other model's."""
    model.lm_head = other.lm_head
    for name in ("embed_tokens", "norm", "rotary_emb"):
        setattr(model.model, name, getattr(other.model, name))
    for own, given in zip(model.model.layers, other.model.layers, strict=True):
        for name in ("mlp", "input_layernorm", "post_attention_layernorm"):
            setattr(own, name, getattr(given, name))


def _latent_shape(shape: AttentionShape) -> LatentShape:
    """Of `rope` rotary numbers each pair is kept once, and as many coordinates of a key turn; with
    0 all turn, and keys of the few KV heads are rebuilt.
    """
    turning = shape.rope or shape.head_dim
    return LatentShape(
        hidden_size=shape.heads * shape.head_dim,
        heads=shape.heads,
        kv_heads=shape.heads if shape.rope else shape.kv_heads,
        head_dim=shape.head_dim,
        value_dim=shape.head_dim,
        rank=shape.rank,
        rotary_dim=turning,
        rotary="decoupled" if shape.rope else "rebuilt",
        components=(1,) * (shape.rope // 2),
        scale=shape.head_dim**-0.5,
        key_constant=False,
    )
