"""A small Llama with 32 heads and keys and values for each, and its twin with latent attention.

MHA caches 2 * heads * head_dim numbers a token and layer. The twin caches an eighth: a latent of
rank r and one rotary key for all heads (DeepSeek-V2, arXiv 2405.04434):

    r + rope = 2 * heads * head_dim / 8

A head's query and key have head_dim + rope coordinates, of which rope turn; its value has head_dim.

Parameters that attention saves go to the twin's MLP, so that both have as many. Depth and all that
is trained on are the same.
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
"""Standard deviation of first embeddings."""


@dataclasses.dataclass(frozen=True)
class TwinSizes:
    """Sizes of both.

    Args:
        vocab_size: of embeddings and the head, which are tied.
        layers: decoder layers.
        hidden: of the residual stream.
        heads: of attention.
        head_dim: coordinates of a head's key and value.
        intermediate: of MHA's MLP.
        context: longest text.

    Raises:
        FlashHeadError: sizes that do not fit each other.
    """

    vocab_size: int = 8192
    layers: int = 6
    hidden: int = 1024
    heads: int = 32
    head_dim: int = 32
    intermediate: int = 2048
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

    @property
    def latent_intermediate(self) -> int:
        """Of the twin's MLP: wider by what attention saves, in steps of 32."""
        with torch.device("meta"):
            own = sum(p.numel() for p in LatentAttention(self.latent_shape, None).parameters())
        saved = 4 * self.hidden * self.heads * self.head_dim - own
        return self.intermediate + max(0, saved // (3 * self.hidden)) // 32 * 32


def make_twin(kind: str, sizes: TwinSizes, seed: int, tokenizer: Any = None) -> PreTrainedModel:
    """A new model in float32: "mha" or "latent"."""
    end = None if tokenizer is None else tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.latent_intermediate if kind == "latent" else sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=sizes.context,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        attn_implementation="sdpa",
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    if kind == "latent":
        table = rotary_table(model, None)
        for roles in find_attention(model):
            attention = LatentAttention(sizes.latent_shape, table, roles.module.layer_idx)
            nn.init.zeros_(attention.encode.bias)
            install(model, roles.name, attention)
    first_weights(model)
    return model


def first_weights(model: PreTrainedModel) -> None:
    """Matrices normal with 1 / sqrt(inputs), so that what they give begins with unit variance.

    Projections into the residual stream begin smaller by sqrt(2 layers), embeddings with `SPREAD`,
    biases are 0; every head reads the rotary key as it is. One rule for both: a first comparison
    with 0.02 everywhere was decided by the spread of first keys and values (docs/log.md).
    """
    residual = (2 * model.config.num_hidden_layers) ** -0.5
    with torch.no_grad():
        for name, p in model.named_parameters():
            own = name.rpartition(".self_attn.")[2]
            if p is model.get_input_embeddings().weight:
                nn.init.normal_(p, std=SPREAD)
            elif own == "mix":
                p.zero_()[..., 0] = 1
            elif p.dim() == 2:
                scale = residual if own.startswith("o_proj") or "down_proj" in own else 1.0
                nn.init.normal_(p, std=scale * p.shape[1] ** -0.5)


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
