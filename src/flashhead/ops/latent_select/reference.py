"""Selection in eager torch: the specification, on any device."""

import torch
from torch import Tensor

from flashhead.ops.latent_decode.reference import seen
from flashhead.ops.latent_select.codes import KeyCodes, rotation
from flashhead.ops.latent_select.options import SelectOptions


def estimate(query: Tensor, keys: KeyCodes, scale: float) -> Tensor:
    """Estimated scores: float32 `[batch, heads, tokens]`."""
    groups = keys.codes.shape[2]
    turned = query.float() @ rotation(keys.dim, query.device) * scale
    coded = keys.read().transpose(1, 2)  # [batch, groups, tokens, dim]
    return (turned.unflatten(1, (groups, -1)) @ coded.mT).flatten(1, 2)


def choose(
    scores: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    bias: Tensor | None,
    options: SelectOptions,
) -> tuple[Tensor, Tensor]:
    """The blocks of most attention, summed over heads, and those that are always read.

    Args:
        scores: float32 `[batch, heads, tokens]`.
        lengths: as in `api.latent_select`.
        starts: likewise.
        bias: likewise.
        options: likewise.

    Returns:
        as `api.latent_select`.
    """
    tokens, block = scores.shape[-1], options.block
    if bias is not None:
        scores = scores + bias[..., :tokens]
    inside = seen(tokens, lengths, starts)
    scores = scores.masked_fill(~inside[:, None], -torch.inf)
    if block > 1:
        short = -tokens % block
        padded = torch.nn.functional.pad(scores, (0, short), value=-torch.inf)
        scores = padded.unflatten(-1, (-1, block)).logsumexp(-1)
    # a row that sees nothing has no mass, not NaN
    mass = scores.softmax(-1).nan_to_num(0).mean(1)  # [batch, blocks]
    place = torch.arange(mass.shape[1], device=mass.device)
    begin = 0 if starts is None else (starts.clamp_min(0) // block)[:, None]
    end = ((lengths + block - 1) // block)[:, None]
    forced = (place < begin + options.first_blocks) | (place >= end - options.last_blocks)
    rank = (mass + 2 * forced).masked_fill((place < begin) | (place >= end), -1)
    count = min(options.blocks, mass.shape[1])
    value, chosen = rank.topk(count, -1)
    kept = mass.gather(1, chosen).masked_fill(value < 0, 0).sum(-1)
    chosen = chosen.masked_fill(value < 0, mass.shape[1]).sort(-1).values
    index = chosen[..., None] * block + torch.arange(block, device=mass.device)
    index = index.flatten(1)
    there = inside.gather(1, index.clamp_max(tokens - 1)) & (index < tokens)
    return index.masked_fill(~there, -1).int(), kept
