"""Better estimates of the rows that survived the scan."""

from torch import Tensor

from flashhead.index.codes import CodesIndex
from flashhead.ops.dispatch import require_host_impl
from flashhead.ops.scan.query import CodesPlan, CodesQuery


def refine(
    query: CodesQuery,
    number: int,
    index: CodesIndex,
    plan: CodesPlan,
    plane: int,
    rows: Tensor,
    estimates: Tensor,
    *,
    impl: str,
) -> Tensor:
    """Add the 2 bits a dimension of one plane to the estimates of some rows.

    Args:
        query: the prepared hidden states.
        number: which of them.
        index: the codes.
        plan: `make_plan(index)`.
        plane: 1 or 2; 2 wants estimates that have 1.
        rows: `int64[k]`, row ids.
        estimates: `float32[k]`.
        impl: "cpu" or "reference".

    Returns:
        `float32[k]`.
    """
    require_host_impl(impl)
    if impl == "cpu":
        from flashhead.ops.refine import cpu

        return cpu.refine(query, number, index, plan, plane, rows, estimates)
    from flashhead.ops.refine import reference

    return reference.refine(query, number, index, plan, plane, rows, estimates)
