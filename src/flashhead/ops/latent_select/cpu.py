"""The scan on the CPU: a table of what each byte of a code adds to a score.

A byte holds 8, 4 or 2 coordinates and has 256 values, so for each of a group's bytes 256 sums per
head are made once; a token's score is then one look-up a byte. Tables of a group of 64 coordinates
in 2 bits and 3 heads take 48 KiB.
"""

import numba
import numpy as np
import torch
from torch import Tensor

from flashhead.ops import simd
from flashhead.ops.latent_select.codes import KeyCodes, rotation

_TOKENS_A_TASK = 512


@numba.njit(parallel=True, fastmath=simd.FASTMATH, cache=True)
def _scan_kernel(codes, scale, tables, scores):  # type: ignore[no-untyped-def]
    """scores[b, g, h, t] = scale[b, t, g] * sum_j tables[b, g, j, codes[b, t, g, j], h]."""
    batch, tokens, groups, width = codes.shape
    share = tables.shape[4]
    parts = (tokens + _TOKENS_A_TASK - 1) // _TOKENS_A_TASK
    for task in numba.prange(batch * groups * parts):
        row, group = task // (groups * parts), task // parts % groups
        begin = task % parts * _TOKENS_A_TASK
        for t in range(begin, min(tokens, begin + _TOKENS_A_TASK)):
            for h in range(share):
                scores[row, group, h, t] = 0
            for j in range(width):
                byte = codes[row, t, group, j]
                for h in range(share):
                    scores[row, group, h, t] += tables[row, group, j, byte, h]
            for h in range(share):
                scores[row, group, h, t] *= scale[row, t, group]


def estimate(query: Tensor, keys: KeyCodes, scale: float) -> Tensor:
    """As `reference.estimate`."""
    batch, tokens, groups, width = keys.codes.shape
    turned = query.float() @ rotation(keys.dim, query.device) * scale
    tables = _tables(turned.unflatten(1, (groups, -1)), keys.bits, width)
    scores = torch.empty(batch, groups, tables.shape[4], tokens)
    _scan_kernel(keys.codes.numpy(), keys.scale.float().numpy(), tables.numpy(), scores.numpy())
    return scores.flatten(1, 2)


def _tables(query: Tensor, bits: int, width: int) -> Tensor:
    """What each byte adds: float32 `[batch, groups, width, 256, heads of a group]`."""
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(query, (0, width * per_byte - query.shape[-1]))
    parts = padded.unflatten(-1, (width, per_byte))  # [batch, groups, heads, width, per_byte]
    return (parts @ _values(bits).T).permute(0, 1, 3, 4, 2).contiguous()


def _values(bits: int) -> Tensor:
    """Coordinates of each byte: float32 `[256, 8 / bits]`."""
    fields = np.arange(256)[:, None] >> np.arange(0, 8, bits) & (2**bits - 1)
    return torch.from_numpy((fields - (2**bits - 1) / 2).astype(np.float32))
