"""Refine in eager torch: the specification."""

from torch import Tensor

from flashhead.index.codes import CodesIndex
from flashhead.ops.scan.query import CodesQuery
from flashhead.ops.scan.reference import unpack


def refine(
    query: CodesQuery, number: int, index: CodesIndex, rows: Tensor, estimates: Tensor
) -> Tensor:
    """Estimates of `rows` with the refinement bits added: float32[k]."""
    fields = unpack(index.refine[rows]).double()  # [k, 16 words]
    coordinates = query.refine[number].transpose(1, 2).flatten().double()
    dots = (
        fields @ coordinates * query.refine_scale[number].double()
        - query.refine_offset[number].double()
    )
    return (estimates.double() + index.scale[rows].double() * dots).float()
