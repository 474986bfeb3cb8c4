"""Refine in eager torch: the specification."""

import torch
from torch import Tensor

from flashhead.index.codes import CodesIndex
from flashhead.ops.scan.query import CodesPlan, CodesQuery
from flashhead.ops.scan.reference import unpack


def refine(
    query: CodesQuery,
    number: int,
    index: CodesIndex,
    plan: CodesPlan,
    plane: int,
    rows: Tensor,
    estimates: Tensor,
) -> Tensor:
    """Estimates of `rows` with the bits of one plane (1 or 2) added: float32[k]."""
    fields = unpack(index.refine[plane - 1, rows, :-1], 2).double()
    coordinates = query.gathered[number].transpose(1, 2).flatten().double()
    total = estimates.double()
    for g in range(len(plan.size)):
        part = slice(16 * int(plan.refine_bounds[g]), 16 * int(plan.refine_bounds[g + 1]))
        dots = fields[:, part] @ coordinates[part] * query.step[number, g].double()
        dots -= 1.5 * query.total[number, g].double()
        total = total + index.scale[g, rows].double() * dots * float(plan.step[g]) / 4.0**plane
    return total.to(torch.float32)
