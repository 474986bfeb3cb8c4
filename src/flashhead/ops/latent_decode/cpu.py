"""Latent decode on the CPU: ranges of tokens small enough to stay in the core's cache.

A range of latents is read from memory once, for its scores, and found in the cache again for its
values; codes are widened range by range, never the whole cache. The products are torch's in the
cache's dtype (oneDNN in bfloat16), the softmax is online, in float32 (arXiv 1805.02867).
"""

import torch
from torch import Tensor

from flashhead.ops.latent_decode.reference import gather
from flashhead.ops.latent_decode.rows import Rows

RANGE_BYTES = 2 * 2**20
"""Of widened latents a range. Measured from 0.25 to 4 MiB on two cores with 1 MiB of L2 cache each
(docs/log.md): smaller ranges pay for more calls, larger ones leave the cache.
"""


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
    batch, heads = query.shape[:2]
    out = query.new_zeros(batch, heads, latent.width)
    lse = query.new_full((batch, heads), -torch.inf, dtype=torch.float32)
    ends = lengths.tolist()
    begins = [0] * batch if starts is None else starts.tolist()
    for row in range(batch):
        own = None
        if bias is not None:
            own = bias[row if bias.shape[0] > 1 else 0]
        pages = None if table is None else table[row]
        parts = [_row(rows, row, pages) for rows in (latent, rotary) if rows is not None]
        found = _attend(query[row], parts, max(0, begins[row]), ends[row], own, scale)
        out[row], lse[row] = found
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
        scale = None if rows.scale is None else rows.scale[:, begin:end]
        return Rows(rows.codes[:, begin:end], rows.width, rows.kind, scale).read(dtype)[0]
    size = rows.codes.shape[1]
    first = begin // size
    held = gather(rows, pages[None, first : -(-end // size)], dtype)[0]
    return held[begin - first * size : end - first * size]


def _attend(
    query: Tensor,
    parts: list[tuple[Rows, Tensor | None]],
    begin: int,
    end: int,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One row: `[heads, r]` in float32, and lse `float32[heads]`."""
    heads, rank = len(query), parts[0][0].width
    latent = parts[0][0]
    dtype = latent.codes.dtype if latent.scale is None else torch.bfloat16
    if query.dtype == torch.float32:
        dtype = torch.float32
    element = torch.empty(0, dtype=dtype).element_size()
    step = max(16, RANGE_BYTES // (element * query.shape[1]))
    turned = (query.float() * scale).to(dtype)
    most = torch.full((heads, 1), -torch.inf)
    total = torch.zeros(heads, 1)
    sums = torch.zeros(heads, rank)
    for first in range(begin, end, step):
        last = min(first + step, end)
        tiles = [_tokens(rows, pages, first, last, dtype) for rows, pages in parts]
        scores = (turned[:, :rank] @ tiles[0].T).float()
        if len(tiles) > 1:
            scores += turned[:, rank:] @ tiles[1].T
        if bias is not None:
            scores += bias[:, first:last]
        new = torch.maximum(most, scores.amax(1, keepdim=True))
        shift = new.masked_fill(new == -torch.inf, 0)  # nothing seen yet: no inf - inf
        weights = (scores - shift).exp_()
        fade = (most - shift).exp_()
        total = total * fade + weights.sum(1, keepdim=True)
        sums = sums * fade + weights.to(dtype) @ tiles[0]
        most = new
    out = sums / total.masked_fill(total == 0, 1)
    return out, (most + total.log())[:, 0]
