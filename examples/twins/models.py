"""A small Llama with 32 heads and keys and values for each, and its twin with latent attention.

MHA caches 2 * heads * head_dim numbers a token and layer. The twin caches an eighth: a latent of
rank r and one rotary key for all heads (DeepSeek-V2, arXiv 2405.04434):

    r + rope = 2 * heads * head_dim / 8

A head's query and key have head_dim + rope coordinates, of which rope turn; its value has head_dim.

Widths, depth, MLP, initial spread of weights and everything that is trained on are the same.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from flashhead.convert.latent_folder import mark_latent
from flashhead.errors import FlashHeadError
from flashhead.integrations.latent_model import install, latent_modules, serve_latents
from flashhead.integrations.latent_roles import find_attention, rotary_table
from flashhead.nn.latent import LatentAttention
from flashhead.nn.latent_shape import LatentShape
from flashhead.nn.token_store import StoreOptions

TWINS = ("mha", "latent")
SMALLER = 8
"""The twin's cache is so many times smaller."""
SPREAD = 0.02
"""Standard deviation of first weights, as transformers' Llama has it."""


@dataclasses.dataclass(frozen=True)
class TwinSizes:
    """Sizes of both.

    Args:
        vocab_size: of embeddings and the head, which are tied.
        layers: decoder layers.
        hidden: of the residual stream.
        heads: of attention.
        head_dim: coordinates of a head's key and value.
        intermediate: of the MLP.
        context: longest text.

    Raises:
        FlashHeadError: sizes that do not fit each other.
    """

    vocab_size: int = 8192
    layers: int = 8
    hidden: int = 512
    heads: int = 32
    head_dim: int = 32
    intermediate: int = 1408
    context: int = 1024

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise FlashHeadError(f"{name}={value}: wanted 1 or more")
        if self.head_dim % 2 or self.heads < SMALLER:
            raise FlashHeadError(
                f"head_dim={self.head_dim}, heads={self.heads}: wanted an even head_dim and "
                f"{SMALLER} heads or more"
            )

    @property
    def latent_shape(self) -> LatentShape:
        """Of the twin's attention."""
        rope = self.head_dim
        width = 2 * self.heads * self.head_dim // SMALLER
        return LatentShape(
            hidden_size=self.hidden,
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=self.head_dim + rope,
            value_dim=self.head_dim,
            rank=width - rope,
            rotary_dim=rope,
            rotary="decoupled",
            components=(1,) * (rope // 2),
            scale=float(self.head_dim + rope) ** -0.5,
            norm=True,
            key_constant=False,
        )


def make_twin(kind: str, sizes: TwinSizes, seed: int, tokenizer: Any = None) -> PreTrainedModel:
    """A new model in float32: "mha" or "latent"."""
    end = None if tokenizer is None else tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=sizes.context,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        initializer_range=SPREAD,
        attn_implementation="sdpa",
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    if kind == "latent":
        table = rotary_table(model, None)
        for roles in find_attention(model):
            attention = LatentAttention(sizes.latent_shape, table, roles.module.layer_idx)
            first_weights(attention)
            install(model, roles.name, attention)
    return model


def first_weights(attention: LatentAttention) -> None:
    """All matrices normal, biases 0; every head reads the rotary key as it is."""
    with torch.no_grad():
        for module in attention.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=SPREAD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(attention.key_up, std=SPREAD)
        nn.init.normal_(attention.value_up, std=SPREAD)
        if attention.mix is not None:
            attention.mix.zero_()[..., 0] = 1


def cache_numbers(kind: str, sizes: TwinSizes) -> int:
    """Numbers a token in the cache of all layers."""
    shape = sizes.latent_shape
    return sizes.layers * (2 * sizes.heads * sizes.head_dim if kind == "mha" else shape.width)


def parameter_counts(model: PreTrainedModel) -> dict[str, int]:
    """Parameters in all, in attention, and in embeddings."""
    attention = [p for n, p in model.named_parameters() if ".self_attn." in n]
    return {
        "all": sum(p.numel() for p in model.parameters()),
        "attention": sum(p.numel() for p in attention),
        "embeddings": model.get_input_embeddings().weight.numel(),
    }


def save_twin(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """A folder in bfloat16 that `flashhead.load` takes. The model itself is left as it is."""
    if latent_modules(model) and not hasattr(model, "latent_store"):
        serve_latents(model, StoreOptions())
    weights = {name: value.bfloat16() for name, value in model.state_dict().items()}
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder, state_dict=weights)
    mark_latent(model, folder)
    tokenizer.save_pretrained(folder)
