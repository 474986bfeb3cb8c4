"""Step times of both twins at several contexts: a training step, and a decode step.

Training: forward, backward and optimizer over the same number of tokens, in rows of the context.
Decode: one token a row behind `context` cached ones. MHA through transformers' DynamicCache (every
step copies all keys and values) and StaticCache, the twin through `LatentCache`; caches are filled
with random numbers, as times do not depend on what is in them. Rounds of the methods are
interleaved, so ratios hold on a busy machine too.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from flashhead.bench.timing import interleave
from flashhead.integrations.latent_cache import LatentCache
from flashhead.integrations.latent_model import serve_latents
from flashhead.nn.token_store import StoreOptions
from twins.models import TWINS, TwinSizes, cache_numbers, make_twin
from twins.steps import compile_layers, make_optimizer, next_token_loss, train_step

WARM_STEPS = 3
CACHES = {"dynamic": "mha", "static": "mha", "latent": "latent"}
"""Cache: the twin that reads it."""


def train_times(
    sizes: TwinSizes, context: int, tokens: int, repeats: int, compiled: bool, device: torch.device
) -> dict[str, Any]:
    """Training steps of both on `tokens` tokens (at least a row), all in one pass.

    Returns:
        JSON-able, by twin: as `bench.timing.interleave`, `rows` and `tokens_per_sec`.
    """
    torch.compiler.reset()  # shapes are compiled as constants
    rows = max(1, tokens // context)
    batch = torch.randint(sizes.vocab_size, (rows, context + 1), device=device)
    steps = {}
    for kind in TWINS:
        model = make_twin(kind, sizes, 0).to(device).train()
        loss_of = compile_layers(model) if compiled else next_token_loss
        optimizer = make_optimizer(model, 1e-4)
        steps[kind] = _waiting(train_step, device, model, optimizer, batch, rows, loss_of)
    found = interleave(steps, "mha", rounds=repeats, warmup=WARM_STEPS)
    for row in found.values():
        row["rows"] = rows
        row["tokens_per_sec"] = round(1e3 * rows * context / row["median_ms"])
    return found


def _waiting(call: Callable[..., Any], device: torch.device, *args: Any) -> Callable[[int], None]:
    """A call that returns when the device is done."""

    def run(_: int) -> None:
        call(*args)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def filled(kind: str, model: PreTrainedModel, sizes: TwinSizes, batch: int, context: int) -> Any:
    """A cache that holds `context` tokens of random numbers: "dynamic", "static" or "latent"."""
    like = model.get_input_embeddings().weight
    if kind == "latent":
        cache: Any = LatentCache(model, StoreOptions())
        widths = (sizes.latent_shape.rank, sizes.latent_shape.rotary_width)
        shapes = [(batch, 1, context, width) for width in widths]
    else:
        room = context + 256
        cache = DynamicCache() if kind == "dynamic" else StaticCache(model.config, room)
        shapes = [(batch, sizes.heads, context, sizes.head_dim)] * 2
    for layer in range(sizes.layers):
        first, second = (torch.randn(s, dtype=like.dtype, device=like.device) for s in shapes)
        cache.update(first, second, layer)
    return cache


@torch.no_grad()
def decode_times(
    sizes: TwinSizes, context: int, batch: int, repeats: int, device: torch.device
) -> dict[str, Any]:
    """Decode steps through all three caches, in turn, one token more each time.

    Returns:
        JSON-able, by cache: as `bench.timing.interleave`, and `cache_bytes` that a step reads.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    models = {kind: make_twin(kind, sizes, 0).to(device, dtype).eval() for kind in TWINS}
    serve_latents(models["latent"], StoreOptions())
    token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    steps, read = {}, {}
    for kind, twin in CACHES.items():
        cache = filled(kind, models[twin], sizes, batch, context)
        steps[kind] = _waiting(_decode, device, models[twin], token, cache)
        read[kind] = batch * context * cache_numbers(twin, sizes) * dtype.itemsize
    found = interleave(steps, "static", rounds=repeats, warmup=WARM_STEPS)
    for kind, row in found.items():
        row["cache_bytes"] = read[kind]
    return found


def _decode(model: PreTrainedModel, token: Tensor, cache: Any) -> Tensor:
    return model(token, past_key_values=cache, use_cache=True).logits
