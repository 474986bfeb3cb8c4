"""Decode steps of `nn.latent` that read a part of their context: scan, choose, attend exactly.

What is coded of a token are the keys that its query meets, without their constant, whose scores are
known for every index (`latent_kernel.constant_scores`): turned keys of each KV head where keys are
rebuilt, latent and rotary key together where they are decoupled. Layers with a window read it
whole, and prefills read everything.
"""

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from flashhead.errors import FlashHeadError
from flashhead.nn import latent_kernel
from flashhead.nn.rotary import rotate
from flashhead.ops.latent_decode.api import latent_decode
from flashhead.ops.latent_decode.rebuilt import latent_decode_rebuilt
from flashhead.ops.latent_decode.reference import KeyUp
from flashhead.ops.latent_decode.rows import Rows
from flashhead.ops.latent_select.api import latent_select
from flashhead.ops.latent_select.codes import KeyCodes
from flashhead.ops.latent_select.options import SelectOptions

if TYPE_CHECKING:
    from flashhead.nn.latent import LatentAttention

HIDDEN = -1e30
"""A mask that adds less hides a token."""


class SelectingLayer(Protocol):
    """One layer of a cache that keeps codes of its keys: `integrations.selecting_layer`."""

    select: SelectOptions

    def append_keys(self, keys: Tensor) -> None:
        """Code the keys of tokens that are about to be appended."""
        ...

    def append_tokens(self, latent: Tensor, rotary: Tensor) -> int:
        """Append; how many tokens are held."""
        ...

    def scanned(self) -> KeyCodes:
        """Codes of all tokens held."""
        ...

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and rotary keys of tokens int64 `[batch, n]`."""
        ...


def layer_of(module: "LatentAttention", cache: Any) -> SelectingLayer | None:
    """The layer that a module's selection goes through; None: it reads everything.

    Raises:
        FlashHeadError: the module's mode asks for something else.
    """
    if getattr(cache, "select", None) is None or module.shape.window is not None:
        return None
    if module.mode not in ("auto", "absorbed", "kernel"):
        raise FlashHeadError(
            f"select with mode={module.mode!r}: wanted auto, absorbed or kernel, since values of "
            "selected tokens are absorbed"
        )
    layer: SelectingLayer = cache.layers[module.layer_idx]
    return layer


def scan_keys(module: "LatentAttention", latent: Tensor, rotary: Tensor, start: int) -> Tensor:
    """What is coded: floating `[batch, tokens, groups, dim]`.

    Args:
        module: whose keys they are.
        latent: `[batch, tokens, r]`.
        rotary: `[batch, tokens, rotary_width]`, turned.
        start: index of the first of them.
    """
    if module.shape.rotary == "decoupled":
        return torch.cat((latent, rotary), -1).unsqueeze(2)
    keys = functional.linear(latent, module.key_up).unflatten(-1, (module.shape.kv_heads, -1))
    cos, sin = module.table.at(start, start + latent.shape[1], keys)
    return rotate(keys.transpose(1, 2), cos, sin).transpose(1, 2)


def estimate_inputs(
    module: "LatentAttention", query: Tensor, bias: Tensor | None, held: int
) -> tuple[Tensor, Tensor | None]:
    """Query against `scan_keys`, and what is added to its scores.

    Args:
        module: whose query it is.
        query: turned, `[batch, heads, head_dim]`.
        bias: floating `[1 or batch, 1, held]` or None.
        held: tokens.
    """
    if module.key_constant is not None:
        added = latent_kernel.constant_scores(
            module, query, *module.table.at(0, held, query.float())
        )
        bias = added if bias is None else bias + added
    if module.shape.rotary == "decoupled":
        query = latent_kernel.absorbed_query(module, query)
    return query, bias


def attend(
    module: "LatentAttention",
    query: Tensor,
    latent: Tensor,
    rotary: Tensor,
    mask: Tensor | None,
    layer: SelectingLayer,
) -> Tensor:
    """Append one token a row and attend over the selected ones: `[batch, heads, 1, value_dim]`.

    Args:
        module: whose projections are taken.
        query: turned, `[batch, heads, 1, head_dim]`.
        latent: of the new token, `[batch, 1, r]`.
        rotary: likewise, `[batch, 1, rotary_width]`.
        mask: bool (True: seen) or additive `[1 or batch, 1, 1, held]`, or None.
        layer: of the cache; the new token's keys are coded already.
    """
    query = query.squeeze(2)
    held = layer.append_tokens(latent, rotary)
    bias = None if mask is None else latent_kernel.bias_of(mask[:, 0])
    lengths = torch.full((len(query),), held, dtype=torch.int32, device=query.device)
    starts = None
    if bias is not None:  # padding on the left: the first tokens are the first that are seen
        first = (bias[:, 0] > HIDDEN).int().argmax(-1).int()
        starts = first.expand(len(query)).contiguous()
    scanned, added = estimate_inputs(module, query, bias, held)
    index, _ = latent_select(
        scanned,
        layer.scanned(),
        lengths,
        scale=module.shape.scale,
        options=layer.select,
        starts=starts,
        bias=added,
    )
    mixed = _attend_at(module, query, index, bias, layer)
    return latent_kernel.values_of(module, mixed)


def _attend_at(
    module: "LatentAttention",
    query: Tensor,
    index: Tensor,
    bias: Tensor | None,
    layer: SelectingLayer,
) -> Tensor:
    """Exact attention over tokens int32 `[batch, n]` (-1: none): `[batch, heads, r]`."""
    shape, places = module.shape, index.clamp_min(0).long()
    latent, rotary = layer.take(places)
    seen = torch.zeros(index.shape, device=index.device).masked_fill(index < 0, -torch.inf)
    seen = seen.unsqueeze(1)
    if bias is not None:
        seen = seen + bias.expand(len(index), -1, -1).gather(2, places.unsqueeze(1))
    lengths = torch.full_like(index[:, 0], index.shape[1])
    held = layer.scanned().codes.shape[1]
    if shape.rotary == "rebuilt":
        cos, sin = (angles[places] for angles in module.table.at(0, held, query.float()))
        return _rebuilt(module, query, latent, (cos, sin), lengths, seen)
    if module.key_constant is not None:
        constant = latent_kernel.constant_scores(
            module, query, *module.table.at(0, held, query.float())
        )
        seen = seen + constant.gather(2, places.unsqueeze(1).expand(-1, shape.heads, -1))
    turning = Rows(rotary, shape.rotary_width) if shape.rotary_width else None
    asked = latent_kernel.absorbed_query(module, query)
    out, _ = latent_decode(
        asked, Rows(latent, shape.rank), lengths, scale=shape.scale, rotary=turning, bias=seen
    )
    return out


def _rebuilt(
    module: "LatentAttention",
    query: Tensor,
    latent: Tensor,
    angles: tuple[Tensor, Tensor],
    lengths: Tensor,
    bias: Tensor,
) -> Tensor:
    """Keys are rebuilt with the angles of the selected tokens, row by row: each row has its own."""
    shape = module.shape
    # as in latent_kernel.wanted: on a GPU the kernel that rebuilds keys must be asked for
    impl = "reference" if query.is_cuda and module.mode != "kernel" else "auto"
    outs = []
    for row, (cos, sin) in enumerate(zip(*angles, strict=True)):
        one = slice(row, row + 1)
        up = KeyUp(module.key_up, shape.kv_heads, cos, sin, module.key_constant)
        out, _ = latent_decode_rebuilt(
            query[one],
            Rows(latent[one], shape.rank),
            up,
            lengths[one],
            scale=shape.scale,
            bias=bias[one],
            impl=impl,
        )
        outs.append(out)
    return torch.cat(outs)
