"""Better estimates of the rows that survived the scan."""

from torch import Tensor

from flashhead.index.codes import CodesIndex
from flashhead.ops.scan.query import CodesQuery


def refine(
    query: CodesQuery, number: int, index: CodesIndex, rows: Tensor, estimates: Tensor, *, impl: str
) -> Tensor:
    """Add 2 more bits a dimension to the estimates of some rows.

    Args:
        query: the prepared hidden states.
        number: which of them.
        index: the codes.
        rows: `int64[k]`, row ids.
        estimates: `float32[k]`, their estimates from the scan.
        impl: "cpu" or "reference".

    Returns:
        `float32[k]`.
    """
    if impl == "cpu":
        from flashhead.ops.refine import cpu

        return cpu.refine(query, number, index, rows, estimates)
    from flashhead.ops.refine import reference

    return reference.refine(query, number, index, rows, estimates)
