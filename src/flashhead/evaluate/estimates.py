"""Estimates of a codes index beside the logits they stand for, every row at both stages.

The search refines survivors only; here every row is refined, so this is for looking, not for
speed. The truth is the float32 product.
"""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from flashhead.errors import FlashHeadError
from flashhead.evaluate.baselines import float32_logits, row_blocks
from flashhead.index.codes import CodesIndex
from flashhead.ops.dispatch import resolve_impl
from flashhead.ops.refine.api import refine
from flashhead.ops.scan.api import scan
from flashhead.ops.scan.query import CodesPlan, CodesQuery, make_plan, make_query

CHUNK_LOGITS = 2**22
"""Logits of one stage held at a time (16 MB of float32)."""
STAGES = ("base", "refined")
"""In the order of `index.error`."""


@dataclasses.dataclass(frozen=True)
class Estimates:
    """Both stages of n hidden states.

    Args:
        hidden: floating `[n, d]`.
        truth: `float32[n, V]`, logits of the dense product.
        rounding: `float32[n, 1]`, what a float32 logit may be off by: eps ||h|| max ||w||.
        estimate: `float32[2, n, V]`, by stage.
        sigma: `float32[2, n, V]`, the standard errors the index states, by stage.
    """

    hidden: Tensor
    truth: Tensor
    rounding: Tensor
    estimate: Tensor
    sigma: Tensor


def estimate_chunks(
    index: CodesIndex,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    *,
    impl: str = "auto",
) -> Iterator[Estimates]:
    """Estimates of hidden states, a few at a time.

    Args:
        index: codes of `weight`.
        weight: floating `[V, d]`.
        bias: floating `[V]` or None.
        hidden: floating `[n, d]`, finite.
        impl: "auto", "cpu" or "reference".

    Raises:
        FlashHeadError: `hidden` or `weight` has another shape than the index, or is not finite.
    """
    shape = [index.vocab_size, index.hidden_size]
    if list(weight.shape) != shape:
        raise FlashHeadError(f"weight is {list(weight.shape)}, the index is of a head {shape}")
    if hidden.dim() != 2 or hidden.shape[1] != index.hidden_size:
        raise FlashHeadError(f"hidden is {list(hidden.shape)}, wanted [n, {index.hidden_size}]")
    if not bool(torch.isfinite(hidden).all()):
        raise FlashHeadError("hidden holds NaN or infinity: it has no logits")
    plan, impl = make_plan(index), resolve_impl(impl, weight.device)
    weight, bias = weight.detach(), None if bias is None else bias.detach().float()
    unit = torch.finfo(torch.float32).eps * max(
        float(weight[block].float().norm(dim=1).max()) for block in row_blocks(*weight.shape)
    )
    for states in hidden.split(max(1, CHUNK_LOGITS // index.vocab_size)):
        query = make_query(states, index, plan, impl=impl)
        yield Estimates(
            states,
            float32_logits(states, weight, bias),
            unit * states.float().norm(dim=1, keepdim=True),
            _both_stages(query, index, plan, bias, impl),
            torch.stack([_sigma(index, query, stage) for stage in range(len(STAGES))]),
        )


def _both_stages(
    query: CodesQuery, index: CodesIndex, plan: CodesPlan, bias: Tensor | None, impl: str
) -> Tensor:
    """Scan all rows, then refine all rows: float32[2, n, V]."""
    base = scan(query, index, plan, bias, impl=impl)
    rows = torch.arange(index.vocab_size)
    refined = [refine(query, n, index, rows, base[n], impl=impl) for n in range(len(base))]
    return torch.stack([base, torch.stack(refined)])


def _sigma(index: CodesIndex, query: CodesQuery, stage: int) -> Tensor:
    """Standard errors of one stage, by the formula that `select` uses: float32[n, V]."""
    factors = (query.base_variance, query.refined_variance)[stage]
    coding = factors[:, :1] * index.error[stage].float().square()
    return (coding + factors[:, 1:] * index.scale.float().square()).sqrt_()
