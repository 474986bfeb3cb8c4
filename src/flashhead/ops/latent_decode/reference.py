"""Latent decode in eager torch: the specification, on any device and in any precision."""

import torch
from torch import Tensor

from flashhead.ops.latent_decode.rows import Rows


def gather(rows: Rows, table: Tensor | None, dtype: torch.dtype) -> Tensor:
    """All cached vectors of each row of the batch: `[batch, tokens, width]`."""
    if table is None:
        return rows.read(dtype)
    flat = table.clamp(0, rows.codes.shape[0] - 1).flatten().long()
    return rows.take(flat).read(dtype).unflatten(0, table.shape).flatten(1, 2)


def seen(tokens: int, lengths: Tensor, starts: Tensor | None) -> Tensor:
    """Which tokens each row attends to: bool `[batch, tokens]`."""
    place = torch.arange(tokens, device=lengths.device)
    inside = place < lengths[:, None]
    return inside if starts is None else inside & (place >= starts[:, None])


def latent_decode(
    query: Tensor,
    latent: Rows,
    rotary: Rows | None,
    lengths: Tensor,
    table: Tensor | None,
    starts: Tensor | None,
    bias: Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """As `api.latent_decode`, computed in `dtype` (float32 or float64)."""
    values = gather(latent, table, dtype)
    keys = values if rotary is None else torch.cat((values, gather(rotary, table, dtype)), -1)
    scores = query.to(dtype) @ keys.mT * scale
    return attend(scores, values, lengths, starts, bias)


def attend(
    scores: Tensor, values: Tensor, lengths: Tensor, starts: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Softmax of scores `[batch, heads, tokens]` over the tokens seen, and the mean of values
    `[batch, tokens, r]`.
    """
    inside = seen(scores.shape[-1], lengths, starts)
    if bias is not None:
        scores = scores + bias[..., : scores.shape[-1]].to(scores.dtype)
    scores = scores.masked_fill(~inside[:, None], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    # what lies beyond a row's length may be anything, NaN too
    values = values.masked_fill(~inside[..., None], 0)
    return weights @ values, lse
