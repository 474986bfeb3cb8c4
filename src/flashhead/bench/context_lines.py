"""Decode steps at a long context: the models and caches that `bench.context` times.

A line is one model with one cache, filled with `context` tokens of `batch` equal rows. The text is
run through each model once, for one row; its keys and values, or latents, then fill every cache.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashhead.errors import FlashHeadError
from flashhead.integrations.latent_cache import LatentCache, RoundedCache, StoredCache, StoredLayer
from flashhead.integrations.latent_static import StaticLatentCache
from flashhead.integrations.transformers import logit_postprocess
from flashhead.nn.graphs import GraphCache
from flashhead.nn.token_store import StoreOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 512
"""Tokens of the text at a time."""
RESERVE = 256
"""Tokens that a full cache has room for beyond its context, so that a step copies nothing."""
PRODUCTS = "flashhead_products"
"""As transformers knows `_attend_products`."""
Contents = list[tuple[Tensor, Tensor]]
"""Of each layer, one row's two streams `[1, heads, context, width]`."""


@dataclasses.dataclass(frozen=True)
class Line:
    """A model and its filled cache.

    Args:
        name: of the line.
        step: logits `[batch, V]` of the next position, of tokens `int64[batch, 1]`.
        rewind: forgets the last so many tokens.
        cache_bytes: that the cache holds.
    """

    name: str
    step: Callable[[Tensor], Tensor]
    rewind: Callable[[int], None]
    cache_bytes: int


@torch.no_grad()
def read_text(model: "PreTrainedModel", ids: Tensor, latent: bool) -> Contents:
    """What a text leaves in a bf16 cache.

    Args:
        model: that reads it.
        ids: `int64[1, context]`.
        latent: whether the model keeps latents.
    """
    cache: StoredCache = LatentCache(model, StoreOptions()) if latent else _full(model, "bf16")
    for layer in cache.layers:
        layer.activate_past_recording()
    for part in ids.to(model.device).split(CHUNK, 1):
        model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return [_contents(layer) for layer in cache.layers]


def _contents(layer: StoredLayer) -> tuple[Tensor, Tensor]:
    first, second = layer.stores
    heads, others = layer.heads
    read = first.read().unflatten(-1, (heads, -1)).transpose(1, 2)
    if not second.parts:
        return read, read.new_empty(1, 1, read.shape[2], 0)
    return read, second.read().unflatten(-1, (others, -1)).transpose(1, 2)


def full_lines(
    name: str, model: "PreTrainedModel", contents: Contents, batch: int, room: int
) -> dict[str, Callable[[], Line]]:
    """Lines of a model with keys and values: `name`, in fp8, on a GPU as a graph, on a CPU by plain
    products.

    Args:
        name: of the first line.
        model: whose cache is full.
        contents: of its cache.
        batch: rows.
        room: tokens that a static cache has room for.
    """

    def eager(line: str, kind: str) -> Callable[[], Line]:
        return lambda: stored_line(line, model, _full(model, kind), contents, batch)

    made = {name: eager(name, "bf16"), f"{name} fp8": eager(f"{name} fp8", "fp8")}
    if model.device.type == "cpu":
        made[f"{name} products"] = lambda: products_line(f"{name} products", model, contents, batch)
    if model.device.type == "cuda":
        made[f"{name} graph"] = lambda: static_line(f"{name} graph", model, contents, batch, room)
    return made


def latent_lines(
    model: "PreTrainedModel", kinds: tuple[StoreOptions, ...], contents: Contents, batch: int,
    room: int,
) -> dict[str, Callable[[], Line]]:  # fmt: skip
    """Of each kind, the latent cache that grows and the one of fixed size.

    Args:
        model: with latent attention.
        kinds: how latents are kept.
        contents: of its cache.
        batch: rows.
        room: tokens that the static cache has room for.
    """
    made: dict[str, Callable[[], Line]] = {}
    for options in kinds:

        def grows(options: StoreOptions = options) -> Line:
            name, cache = f"latent {options.kind}", LatentCache(model, options)
            return stored_line(name, model, cache, contents, batch)

        def static(options: StoreOptions = options) -> Line:
            name, cache = f"latent {options.kind} static", StaticLatentCache(model, room, options)
            return stored_line(name, model, cache, contents, batch)

        made |= {f"latent {options.kind}": grows, f"latent {options.kind} static": static}
    return made


def stored_line(
    name: str, model: "PreTrainedModel", cache: Any, contents: Contents, batch: int
) -> Line:
    """A line that calls the model as any caller does."""
    for layer, own in zip(cache.layers, contents, strict=True):
        layer.activate_past_recording()
        layer.update(*(x.expand(batch, -1, -1, -1) for x in own))

    def step(tokens: Tensor) -> Tensor:
        out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]

    def rewind(tokens: int) -> None:
        for layer in cache.layers:
            layer.crop(-tokens)

    return Line(name, step, rewind, cache.bytes_held())


def products_line(name: str, model: "PreTrainedModel", contents: Contents, batch: int) -> Line:
    """As `stored_line`, with attention as two products a KV head: torch's own is slower on CPUs."""
    from transformers import AttentionInterface

    AttentionInterface.register(PRODUCTS, _attend_products)
    line = stored_line(name, model, _full(model, "bf16"), contents, batch)

    def step(tokens: Tensor) -> Tensor:
        config = model.config.get_text_config(decoder=True)
        own, config._attn_implementation = config._attn_implementation, PRODUCTS
        try:
            return line.step(tokens)
        finally:
            config._attn_implementation = own

    return dataclasses.replace(line, step=step)


def _attend_products(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001  of one token a row, over what its cache returns
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """One query a row over keys and values `[batch, kv_heads, cached, head_dim]`."""
    assert query.shape[2] == 1
    grouped = query.unflatten(1, (key.shape[1], -1)).squeeze(3)  # [batch, kv_heads, share, dim]
    scores = (grouped @ key.mT).float() * (scaling or module.scaling)
    mixed = scores.softmax(-1).to(value.dtype) @ value
    return mixed.flatten(1, 2).unsqueeze(1), None


def static_line(
    name: str, model: "PreTrainedModel", contents: Contents, batch: int, room: int
) -> Line:
    """The StaticCache of transformers, a step of the decoder in a CUDA graph.

    Raises:
        FlashHeadError: windows, whose static layers count on the host, or a version of
            transformers whose static layers do.
    """
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=room)
    if any(layer.is_sliding for layer in cache.layers):
        raise FlashHeadError("transformers' static windows count on the host")
    if not all(hasattr(layer, "cumulative_length") for layer in cache.layers):
        raise FlashHeadError("this version of transformers counts a static cache on the host")
    for i, own in enumerate(contents):
        cache.update(*(x.expand(batch, -1, -1, -1) for x in own), i)
    held = contents[0][0].shape[2]
    decoder, head, graphs = model.get_decoder(), model.get_output_embeddings(), GraphCache()
    finish = logit_postprocess(model.config)
    places = torch.full((1, 1), held, device=model.device)

    def hidden_of(tokens: Tensor, positions: Tensor) -> tuple[Tensor]:
        given = {"position_ids": positions, "past_key_values": cache, "use_cache": True}
        return (decoder(input_ids=tokens, **given).last_hidden_state,)

    def step(tokens: Tensor) -> Tensor:
        hidden = graphs(("full", tuple(tokens.shape)), hidden_of, (tokens, places))[0]
        places.add_(1)
        return finish(head(hidden)[:, -1])

    def rewind(tokens: int) -> None:
        places.sub_(tokens)
        for layer in cache.layers:
            layer.cumulative_length.copy_(places[0, 0])

    step(torch.zeros(batch, 1, dtype=torch.int64, device=model.device))
    rewind(1)  # the step that was captured ran once before
    size = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    return Line(name, step, rewind, size)


def _full(model: "PreTrainedModel", kind: str) -> RoundedCache:
    return RoundedCache(model.config, StoreOptions(kind), RESERVE)
