"""Latent decode on the CPU: ranges of tokens small enough to stay in the core's cache.

A range of latents is read from memory once, for its scores, and found in the cache again for its
values; codes are widened range by range, never the whole cache. The products are torch's in the
cache's dtype (oneDNN in bfloat16), the softmax is online, in float32 (arXiv 1805.02867).
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from flashhead.ops.latent_decode.reference import KeyUp, gather
from flashhead.ops.latent_decode.rows import Rows

RANGE_BYTES = 2 * 2**20
"""Of widened latents a range. Measured from 0.25 to 4 MiB on two cores with 1 MiB of L2 cache each
(docs/log.md): smaller ranges pay for more calls, larger ones leave the cache.
"""

Score = Callable[[int, list[Tensor], int], Tensor]
"""Row, vectors of a range (of each kind) and its first token: scores `float32[heads, tokens]`."""


def latent_decode(
    query: Tensor,
    latent: Rows,
    rotary: Rows | None,
    lengths: Tensor,
    table: Tensor | None,
    starts: Tensor | None,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As `api.latent_decode`, whose checks have been made."""
    rank = latent.width
    dtype = _dtype(query, latent)
    turned = (query.float() * scale).to(dtype)

    def score(row: int, tiles: list[Tensor], _first: int) -> Tensor:
        scores = (turned[row, :, :rank] @ tiles[0].T).float()
        return scores if len(tiles) == 1 else scores + turned[row, :, rank:] @ tiles[1].T

    return _attend_rows(query, [latent, rotary], lengths, table, starts, bias, score)


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
) -> tuple[Tensor, Tensor]:
    """As `rebuilt.latent_decode_rebuilt`, whose checks have been made."""
    dtype = _dtype(query, latent)
    turned = (query.float() * scale).to(dtype).unflatten(1, (up.kv_heads, -1))

    def score(row: int, tiles: list[Tensor], first: int) -> Tensor:
        keys = up.keys(tiles[0][None], first_index + first)[0]
        return (turned[row] @ keys.mT).flatten(0, 1).float()

    return _attend_rows(query, [latent, None], lengths, table, starts, bias, score)


def _dtype(query: Tensor, latent: Rows) -> torch.dtype:
    """Of the products: the cache's; bfloat16 for codes; float32 for float32 queries."""
    if query.dtype == torch.float32:
        return torch.float32
    return latent.codes.dtype if latent.scale is None else torch.bfloat16


def _attend_rows(
    query: Tensor,
    rows: list[Rows | None],
    lengths: Tensor,
    table: Tensor | None,
    starts: Tensor | None,
    bias: Tensor | None,
    score: Score,
) -> tuple[Tensor, Tensor]:
    """Row by row: `score` turns a range's vectors into scores."""
    given = [part for part in rows if part is not None]
    batch, heads = query.shape[:2]
    out = query.new_zeros(batch, heads, given[0].width)
    lse = query.new_full((batch, heads), -torch.inf, dtype=torch.float32)
    ends = lengths.tolist()
    begins = [0] * batch if starts is None else starts.tolist()
    dtype = _dtype(query, given[0])
    for row in range(batch):
        own = None
        if bias is not None:
            own = bias[row if bias.shape[0] > 1 else 0]
        pages = None if table is None else table[row]
        parts = [_row(part, row, pages) for part in given]
        span = (max(0, begins[row]), ends[row])
        out[row], lse[row] = _attend(heads, parts, span, own, dtype, functools.partial(score, row))
    return out, lse


def _row(rows: Rows, row: int, pages: Tensor | None) -> tuple[Rows, Tensor | None]:
    """One row's cache: itself, or all blocks and which of them are the row's."""
    if pages is not None:
        return rows, pages
    scale = None if rows.scale is None else rows.scale[row : row + 1]
    return Rows(rows.codes[row : row + 1], rows.width, rows.kind, scale), None


def _tokens(rows: Rows, pages: Tensor | None, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """Tokens [begin, end) of a row: `[tokens, width]`."""
    if pages is None:
        return rows.between(begin, end).read(dtype)[0]
    size = rows.codes.shape[1]
    first = begin // size
    held = gather(rows, pages[None, first : -(-end // size)], dtype)[0]
    return held[begin - first * size : end - first * size]


def _attend(
    heads: int,
    parts: list[tuple[Rows, Tensor | None]],
    span: tuple[int, int],
    bias: Tensor | None,
    dtype: torch.dtype,
    score: Callable[[list[Tensor], int], Tensor],
) -> tuple[Tensor, Tensor]:
    """One row: `[heads, r]` in float32, and lse `float32[heads]`."""
    width = sum(rows.width for rows, _ in parts) * torch.empty(0, dtype=dtype).element_size()
    step = max(16, RANGE_BYTES // width)
    most = torch.full((heads, 1), -torch.inf)
    total = torch.zeros(heads, 1)
    sums = torch.zeros(heads, parts[0][0].width)
    for first in range(*span, step):
        last = min(first + step, span[1])
        tiles = [_tokens(rows, pages, first, last, dtype) for rows, pages in parts]
        scores = score(tiles, first)
        if bias is not None:
            scores = scores + bias[:, first:last]
        new = torch.maximum(most, scores.amax(1, keepdim=True))
        shift = new.masked_fill(new == -torch.inf, 0)  # nothing seen yet: no inf - inf
        weights = (scores - shift).exp_()
        fade = (most - shift).exp_()
        total = total * fade + weights.sum(1, keepdim=True)
        sums = sums * fade + weights.to(dtype) @ tiles[0]
        most = new
    out = sums / total.masked_fill(total == 0, 1)
    return out, (most + total.log())[:, 0]
