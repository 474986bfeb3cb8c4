"""Scan in eager torch: the specification.

It unpacks the codes, so it is slow and needs V * words * 16 bytes.
"""

import torch
from torch import Tensor

from flashhead.index.codes import CodesIndex
from flashhead.ops.scan.query import CodesPlan, CodesQuery


def unpack(words: Tensor) -> Tensor:
    """Packed words `uint8[..., w, 4]` to fields `uint8[..., 16 w]`
    in the order of the coordinates.
    """
    fields = torch.stack([words >> shift & 3 for shift in (0, 2, 4, 6)], -2)
    return fields.flatten(-3)


def scan(query: CodesQuery, index: CodesIndex, plan: CodesPlan, bias: Tensor | None) -> Tensor:
    """Estimates of all logits: float32[n, V]."""
    rows = index.vocab_size
    words = index.base.transpose(1, 2).flatten(0, 1)[:rows]  # uint8[V, words, 4]
    fields = unpack(words).double()
    total = torch.zeros(query.base.shape[0], rows, dtype=torch.float64)
    for run, (first, last) in enumerate(plan.runs.tolist()):
        part = query.base[:, first:last].flatten(1).double() @ fields[:, first * 16 : last * 16].T
        total += part * query.run_scale[:, run, None].double()
    total -= query.base_offset[:, None].double()
    total *= index.scale.double()
    total += (
        query.along[:, None].double() * index.direction.double() + query.shift[:, None].double()
    )
    if bias is not None:
        total += bias.double()
    return total.float()
