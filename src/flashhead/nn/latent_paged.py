"""Latent attention over a paged cache: rows of a batch at any place of their texts.

An engine keeps the latents of all requests in blocks `[blocks, block_size, r + rotary_width]` and
a table of each request's blocks. Rows of one query token come first: they decode through
`ops.latent_decode`, which reads the blocks where they lie. Rows of more (a prompt, or a piece of
one) gather their latents and rebuild keys and values once for all their queries.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashhead.nn import latent_kernel
from flashhead.nn.rotary import rotate
from flashhead.ops.latent_decode.api import latent_decode
from flashhead.ops.latent_decode.rebuilt import latent_decode_rebuilt
from flashhead.ops.latent_decode.reference import KeyUp
from flashhead.ops.latent_decode.rows import Rows

if TYPE_CHECKING:
    from flashhead.nn.latent import LatentAttention


@dataclasses.dataclass(frozen=True)
class PagedBatch:
    """Which tokens a call brings, and where their texts lie in the cache.

    Args:
        decodes: rows of one query token; they come first.
        starts: where the queries of each other row start, and where the last one ends: `rows -
            decodes + 1` numbers, from `decodes` to the number of tokens.
        lengths: `int32[rows]`: tokens of each row, those of this call among them.
        prompt_lengths: of rows `decodes` and on, as the host knows them.
        longest: no row is longer.
        table: `int32[rows, most_blocks]`: blocks of each row, in order.
        slots: `int64[tokens]`: block * block_size + place, where each token is kept.
        positions: `int64[tokens]`: index of each token in its text.
    """

    decodes: int
    starts: list[int]
    lengths: Tensor
    prompt_lengths: list[int]
    longest: int
    table: Tensor
    slots: Tensor
    positions: Tensor

    @classmethod
    def of_rows(
        cls,
        counts: list[int],
        lengths: Tensor,
        table: Tensor,
        slots: Tensor,
        longest: int,
    ) -> "PagedBatch":
        """From what every engine knows.

        Args:
            counts: query tokens of each row, 1 or more, rows of one token first.
            lengths: `int32[rows]`.
            table: `int32[rows, most_blocks]`.
            slots: `int64[tokens]`.
            longest: no row is longer.
        """
        decodes = next((row for row, count in enumerate(counts) if count > 1), len(counts))
        starts, positions = [decodes], [lengths[:decodes].long() - 1]
        # the device is asked only where there is a prompt
        prompt_lengths = lengths[decodes:].tolist() if decodes < len(counts) else []
        for count, length in zip(counts[decodes:], prompt_lengths, strict=True):
            starts.append(starts[-1] + count)
            positions.append(torch.arange(length - count, length, device=lengths.device))
        return cls(
            decodes, starts, lengths, prompt_lengths, longest, table, slots, torch.cat(positions)
        )


def paged_attention(
    module: "LatentAttention", query: Tensor, latent: Tensor, cache: Tensor, batch: PagedBatch
) -> Tensor:
    """Keep the tokens of a call in the cache, and attend.

    Args:
        module: whose shape, angles and projections are taken.
        query: `[tokens, heads, head_dim]`, normed, not turned.
        latent: `[tokens, rotary_width + r]`, as `LatentAttention.compress` gives it.
        cache: `[blocks, block_size, r + rotary_width]`; written to.
        batch: the rows.

    Returns:
        `[tokens, heads, value_dim]`.
    """
    angles = query.new_empty(0, dtype=torch.float32)
    cos, sin = module.table.at(0, batch.longest, angles)
    own_cos, own_sin = (x[batch.positions].to(query.dtype) for x in (cos, sin))
    latent, rotary = module.turned(latent, own_cos, own_sin)
    size = cache.shape[1]
    cache[batch.slots // size, batch.slots % size] = torch.cat((latent, rotary), -1).to(cache.dtype)
    query = rotate(query.transpose(0, 1), own_cos, own_sin).transpose(0, 1)
    parts = []
    if batch.decodes:
        parts.append(_decode(module, query[: batch.decodes], cache, batch, (cos, sin)))
    for row, length in enumerate(batch.prompt_lengths):
        own = query[batch.starts[row] : batch.starts[row + 1]]
        parts.append(_prefill(module, own, cache, batch.table[batch.decodes + row], length))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _decode(
    module: "LatentAttention",
    query: Tensor,
    cache: Tensor,
    batch: PagedBatch,
    angles: tuple[Tensor, Tensor],
) -> Tensor:
    """One token a row: `[rows, heads, value_dim]` of turned `[rows, heads, head_dim]`."""
    shape, rows = module.shape, len(query)
    blocks = -(-batch.longest // cache.shape[1])
    lengths = batch.lengths[:rows]
    seen: dict[str, Any] = {
        "scale": shape.scale,
        "table": batch.table[:rows, :blocks],
        "starts": None if shape.window is None else (lengths - shape.window).clamp_min(0),
        "longest": batch.longest,
    }
    latent, rotary = cache.split((shape.rank, shape.rotary_width), -1)
    held = Rows(latent, shape.rank)
    if shape.rotary == "rebuilt":
        up = KeyUp(module.key_up, shape.kv_heads, *angles, module.key_constant)
        mixed, _ = latent_decode_rebuilt(query.contiguous(), held, up, lengths, **seen)
    else:
        if module.key_constant is not None:
            room = module.table.at(0, blocks * cache.shape[1], angles[0])
            seen["bias"] = latent_kernel.constant_scores(module, query, *room)
        mixed, _ = latent_decode(
            latent_kernel.absorbed_query(module, query),
            held,
            lengths,
            rotary=Rows(rotary, shape.rotary_width) if shape.rotary_width else None,
            **seen,
        )
    return latent_kernel.values_of(module, mixed).squeeze(2)


def _prefill(
    module: "LatentAttention", query: Tensor, cache: Tensor, blocks: Tensor, length: int
) -> Tensor:
    """The last tokens of one text: `[tokens, heads, value_dim]` of turned queries.

    Args:
        module: whose projections are taken.
        query: `[tokens, heads, head_dim]`.
        cache: of all requests.
        blocks: `int32[most_blocks]`: of this one.
        length: tokens of the text.
    """
    shape, tokens, size = module.shape, len(query), cache.shape[1]
    # a window sees no further back than its first query does
    first = 0 if shape.window is None else max(0, length - tokens - shape.window + 1)
    low = first // size
    held = cache[blocks[low : -(-length // size)].long()].flatten(0, 1)
    held = held[first - low * size : length - low * size].to(query.dtype)[None]
    latent, rotary = held.split((shape.rank, shape.rotary_width), -1)
    mask = module._mask(None, tokens, length - first, query.device, False)
    mixed = module.attend_materialised(query.transpose(0, 1)[None], latent, rotary, mask, first)
    return mixed[0].transpose(0, 1)
