"""Latent decode in eager torch: the specification, on any device and in any precision."""

import dataclasses

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


@dataclasses.dataclass(frozen=True)
class KeyUp:
    """How keys come from latents.

    Args:
        weight: floating `[kv_heads * head_dim, r]`, contiguous.
        kv_heads: how many.
        cos: `float32[indexes, pairs]`, contiguous: coordinates i and i + pairs of a key turn
            together.
        sin: likewise.
        constant: floating `[kv_heads * head_dim]`, added before they turn; None: 0.
    """

    weight: Tensor
    kv_heads: int
    cos: Tensor
    sin: Tensor
    constant: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Those that are there."""
        given = [self.weight, self.cos, self.sin, self.constant]
        return [tensor for tensor in given if tensor is not None]

    def keys(self, latent: Tensor, first_index: int) -> Tensor:
        """Keys `[batch, kv_heads, tokens, head_dim]` of latents `[batch, tokens, r]`, in their
        dtype.
        """
        keys = latent @ self.weight.to(latent.dtype).T
        if self.constant is not None:
            keys = keys + self.constant.to(latent.dtype)
        keys = keys.unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        pairs, tokens = self.cos.shape[1], latent.shape[1]
        cos, sin = (
            x[first_index : first_index + tokens].to(latent.dtype) for x in (self.cos, self.sin)
        )
        re, im, rest = keys.split((pairs, pairs, keys.shape[-1] - 2 * pairs), -1)
        return torch.cat((re * cos - im * sin, im * cos + re * sin, rest), -1)


def latent_decode_rebuilt(
    query: Tensor,
    latent: Rows,
    up: KeyUp,
    first_index: int,
    lengths: Tensor,
    table: Tensor | None,
    starts: Tensor | None,
    bias: Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """As `rebuilt.latent_decode_rebuilt`, computed in `dtype`."""
    values = gather(latent, table, dtype)
    keys = up.keys(values, first_index)
    grouped = query.to(dtype).unflatten(1, (up.kv_heads, -1))
    scores = (grouped @ keys.mT).flatten(1, 2) * scale
    return attend(scores, values, lengths, starts, bias)
