"""The byte ledger: what decoding one token reads, from a model's config and tensor shapes alone.

    head   V * d elements: the output embedding; a tied one is counted here and not in the body
    body   every other weight once; of an embedding table one row; of experts the active share
    KV     keys and values of every attention layer, of a sliding layer its window at most

The head is found by role: the V x d table. With two of them one is the input embedding.
"""

import dataclasses
from typing import Any

from flashhead.errors import FlashHeadError
from flashhead.ledger.files import TensorInfo

CACHE_BYTES = 2
"""Of a cached key or value, bf16."""


@dataclasses.dataclass(frozen=True)
class Ledger:
    """Bytes that one token reads, and the head's shape."""

    vocab_size: int
    hidden_size: int
    tied: bool
    context: int
    head_bytes: float
    kv_bytes: float
    body_bytes: float

    @property
    def total_bytes(self) -> float:
        """All three."""
        return self.head_bytes + self.kv_bytes + self.body_bytes

    def speedup_bound(self, head_fraction: float) -> float:
        """How many times as fast a token is at most, where bytes decide.

        Args:
            head_fraction: what is read for a token in place of the head, as a share of its bytes.
        """
        return self.total_bytes / (self.total_bytes - (1 - head_fraction) * self.head_bytes)


def token_bytes(config: dict[str, Any], tensors: dict[str, TensorInfo], context: int) -> Ledger:
    """The ledger of a model.

    Args:
        config: the model's config.json.
        tensors: name to shape and size.
        context: tokens in the cache.

    Raises:
        FlashHeadError: no V x d table, or a config that names no sizes.
    """
    config = config.get("text_config", config)
    vocab, hidden = _size(config, "vocab_size"), _size(config, "hidden_size", "n_embd", "d_model")
    wide = {
        name: info
        for name, info in tensors.items()
        if len(info.shape) == 2 and info.shape[0] >= vocab and info.shape[1] == hidden
    }
    if not wide:
        raise FlashHeadError(f"no tensor of shape [{vocab}, {hidden}]: is it a language model?")
    rows = min(info.shape[0] for info in wide.values())  # V, or V padded
    tables = {name: info for name, info in wide.items() if info.shape[0] == rows}
    head = max(tables.values(), key=lambda info: info.size_bytes)
    body = sum(
        _read(name, info, config, rows) for name, info in tensors.items() if name not in tables
    )
    one_row = head.size_bytes / head.shape[0]
    return Ledger(
        vocab_size=head.shape[0],
        hidden_size=hidden,
        tied=len(tables) == 1 or bool(config.get("tie_word_embeddings")),
        context=context,
        head_bytes=head.size_bytes,
        kv_bytes=_cache_bytes(config, context),
        body_bytes=body + one_row,
    )


def _read(name: str, info: TensorInfo, config: dict[str, Any], rows: int) -> float:
    """Bytes of one body tensor that a token reads."""
    if info.shape[:1] == (rows,) and len(info.shape) == 2:  # another table that is looked up
        return info.size_bytes / rows
    active = config.get("num_experts_per_tok")
    keys = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((config[key] for key in keys if config.get(key)), None)
    if active and experts and (".experts." in name or "_exps." in name):  # safetensors, GGUF
        return info.size_bytes * active / experts
    return info.size_bytes


def _cache_bytes(config: dict[str, Any], context: int) -> float:
    """Bytes of keys and values that one token reads at a context."""
    layers = _size(config, "num_hidden_layers", "n_layer", "num_layers")
    heads = _size(config, "num_attention_heads", "n_head", "num_heads")
    hidden = _size(config, "hidden_size", "n_embd", "d_model")
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    kinds = config.get("layer_types") or ["full_attention"] * layers
    window = config.get("sliding_window") or context
    seen = {"full_attention": context, "sliding_attention": min(window, context)}
    tokens = sum(seen.get(kind, 0) for kind in kinds)  # a recurrent layer has no growing cache
    return float(tokens * 2 * kv_heads * head_dim * CACHE_BYTES)


def _size(config: dict[str, Any], *names: str) -> int:
    for name in names:
        if isinstance(config.get(name), int):
            return int(config[name])
    raise FlashHeadError(f"the config names no {names[0]}: is it a language model of transformers?")
