"""Exact logits of chosen rows."""

from torch import Tensor

from flashhead.ops.dispatch import require_host_impl


def rescore(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, *, impl: str
) -> Tensor:
    """Score some rows exactly; equals `weight[rows].float() @ hidden.float() + bias[rows]`.

    Args:
        hidden: floating `[d]`.
        weight: bfloat16, float16 or float32 `[V, d]`, contiguous.
        bias: `float32[V]` or None.
        rows: `int64[k]`.
        impl: "cpu" or "reference".

    Returns:
        `float32[k]`, accumulated in float32.
    """
    require_host_impl(impl)
    if impl == "cpu":
        from flashhead.ops.rescore import cpu

        return cpu.rescore(hidden, weight, bias, rows)
    from flashhead.ops.rescore import reference

    return reference.rescore(hidden, weight, bias, rows)
