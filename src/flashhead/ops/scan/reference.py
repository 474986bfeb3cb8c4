"""Scan in eager torch: the specification.

It unpacks the codes, so it is slow and needs V * D bytes.
"""

import torch
from torch import Tensor

from flashhead.index.codes import CodesIndex
from flashhead.ops.scan.query import CodesPlan, CodesQuery


def unpack(words: Tensor, width: int) -> Tensor:
    """Packed words `uint8[..., w, 4]` to fields of `width` bits `uint8[..., 32 w / width]` in the
    order of the coordinates.
    """
    mask = 2**width - 1
    return torch.stack([words >> shift & mask for shift in range(0, 8, width)], -2).flatten(-3)


def scan(query: CodesQuery, index: CodesIndex, plan: CodesPlan, bias: Tensor | None) -> Tensor:
    """Estimates of all logits: float32[n, V]."""
    rows = index.vocab_size
    words = index.base.transpose(1, 2).flatten(0, 1)[:rows]  # uint8[V, words, 4]
    scale, integers = index.scale.double(), query.integers.double()
    total = query.along[:, None].double() * index.direction.double() + query.shift[:, None].double()
    for (first, count, width, start), g, gain in zip(
        plan.runs.tolist(), plan.run_segment.tolist(), plan.run_gain.tolist(), strict=True
    ):
        fields = unpack(words[:, first : first + count], width).double()
        dots = integers[:, start : start + fields.shape[1]] @ fields.T
        total += dots * query.step[:, g, None].double() * gain * scale[g]
    offset = query.total.double() * (plan.step * plan.centre).double()
    total -= offset @ scale
    return (total if bias is None else total + bias.double()).float()


def variances(query: CodesQuery, index: CodesIndex, stage: int) -> Tensor:
    """sigma_v^2 of all rows at one stage (0: base): float32[n, V]."""
    sums = query.variance[:, stage].double() @ index.scale.double().square()
    if stage:
        sums *= index.factor[stage - 1].double()
    return (sums + query.floor[:, None].double()).float()
