"""The scan on the CPU: codes are widened by a table of what each byte stands for, then multiplied.

A byte holds 8, 4 or 2 coordinates; its values, in the query's dtype (float16: float32), are one to
four machine words, copied from a table of 256 entries. A range of tokens is widened at a time, so
that the product finds it in the core's cache.
"""

import numba
import numpy as np
import torch
from torch import Tensor

from flashhead.ops.latent_select.codes import KeyCodes, rotation

RANGE_BYTES = 2**20
"""Of widened codes a range."""


@numba.njit(cache=True)
def _widen_kernel(codes, table, out):  # type: ignore[no-untyped-def]
    """out[g, t, j * words : (j + 1) * words] = table[codes[t, g, j]]."""
    tokens, groups, width = codes.shape
    words = table.shape[1]
    for group in range(groups):
        for t in range(tokens):
            for j in range(width):
                byte = codes[t, group, j]
                for word in range(words):
                    out[group, t, j * words + word] = table[byte, word]


def estimate(query: Tensor, keys: KeyCodes, scale: float) -> Tensor:
    """As `reference.estimate`, with products in bfloat16 for queries in it."""
    batch, tokens, groups, width = keys.codes.shape
    dtype = torch.bfloat16 if query.dtype == torch.bfloat16 else torch.float32
    table, coordinates = _table(keys.bits, dtype), width * 8 // keys.bits
    turned = query.float() @ rotation(keys.dim, query.device) * scale
    turned = torch.nn.functional.pad(turned, (0, coordinates - keys.dim)).to(dtype)
    turned = turned.unflatten(1, (groups, -1))
    step = max(16, RANGE_BYTES // (groups * coordinates * dtype.itemsize))
    room = torch.empty(groups, min(step, tokens), coordinates, dtype=dtype)
    scores = torch.empty(batch, groups, turned.shape[2], tokens)
    codes = keys.codes.numpy()
    for row in range(batch):
        for first in range(0, tokens, step):
            last = min(first + step, tokens)
            wide = room[:, : last - first]
            _widen_kernel(codes[row, first:last], table, _words(wide, table))
            scores[row, :, :, first:last] = turned[row] @ wide.mT
    scores *= keys.scale.transpose(1, 2).unsqueeze(2)
    return scores.flatten(1, 2)


def _words(wide: Tensor, table: np.ndarray) -> np.ndarray:
    """The same memory in the table's machine words."""
    word = torch.int64 if table.dtype == np.int64 else torch.int32
    words: np.ndarray = wide.view(word).numpy()
    return words


def _table(bits: int, dtype: torch.dtype) -> np.ndarray:
    """Coordinates of each byte in machine words: `[256, 1, 2 or 4]`."""
    fields = torch.arange(256)[:, None] >> torch.arange(0, 8, bits) & (2**bits - 1)
    values = (fields - (2**bits - 1) / 2).to(dtype)
    word = torch.int64 if values[0].nbytes >= 8 else torch.int32
    table: np.ndarray = values.view(word).numpy()
    return table
