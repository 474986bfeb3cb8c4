"""Rescore in eager torch: the specification."""

from torch import Tensor


def rescore(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    """Logits of `rows` with float32 products and sums: float32[k]."""
    logits = weight[rows].float() @ hidden.float()
    return logits if bias is None else logits + bias[rows]
