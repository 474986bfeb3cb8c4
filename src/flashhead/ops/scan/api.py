"""Estimates of all logits from packed codes."""

from torch import Tensor

from flashhead.index.codes import CodesIndex
from flashhead.ops.dispatch import require_host_impl
from flashhead.ops.scan import reference
from flashhead.ops.scan.query import CodesPlan, CodesQuery


def scan(
    query: CodesQuery, index: CodesIndex, plan: CodesPlan, bias: Tensor | None, *, impl: str
) -> Tensor:
    """Estimate every logit.

    Equals, up to the coding error that the query's variance describes,

        hidden.float() @ weight.float().T + bias

    Args:
        query: n prepared hidden states.
        index: the codes.
        plan: `make_plan(index)`.
        bias: `float32[1, V]` or `float32[n, V]`, or None.
        impl: "cpu" or "reference".

    Returns:
        `float32[n, V]`.
    """
    require_host_impl(impl)
    if impl == "cpu":
        from flashhead.ops.scan import cpu

        return cpu.scan(query, index, plan, bias)
    return reference.scan(query, index, plan, bias)


def variances(query: CodesQuery, index: CodesIndex, stage: int) -> Tensor:
    """Variance of the estimates of all rows at one stage (0: base, j: with j planes).

    Returns:
        `float32[n, V]`, squared nats.
    """
    return reference.variances(query, index, stage)
