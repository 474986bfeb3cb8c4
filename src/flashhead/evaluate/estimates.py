"""Estimates of a codes index beside the logits they stand for, every row at every stage.

The stages are the base, then each plane. A search refines survivors only; here every row is
refined, so this is for looking, not for speed. The truth is the float32 product.
"""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from flashhead.errors import FlashHeadError
from flashhead.evaluate.baselines import float32_logits, row_blocks
from flashhead.index.bound import z_score
from flashhead.index.codes import CodesIndex
from flashhead.ops.dispatch import resolve_impl
from flashhead.ops.refine.api import refine
from flashhead.ops.scan.api import scan, variances
from flashhead.ops.scan.query import CodesPlan, CodesQuery, make_plan, make_query

CHUNK_LOGITS = 2**22
"""Logits of one stage held at a time (16 MB of float32)."""
USUAL_FAILURE = 1e-6
"""Failure probability whose z is looked at where the index's is 0: its bound knows no z."""


def stage_names(stages: int) -> tuple[str, ...]:
    """Names of the stages before the exact rows: "base", "plane 1" and so on."""
    return ("base", *(f"plane {plane}" for plane in range(1, stages)))


def index_z(index: CodesIndex) -> float:
    """Standard errors below E at which the search of an index leaves a row out."""
    return z_score(index.options.failure_probability or USUAL_FAILURE, index.planes + 1)


@dataclasses.dataclass(frozen=True)
class Estimates:
    """All S stages of n hidden states.

    Args:
        hidden: floating `[n, d]`.
        truth: `float32[n, V]`, logits of the dense product.
        rounding: `float32[n, 1]`, what a float32 logit may be off by: eps ||h|| max ||w||.
        estimate: `float32[S, n, V]`, by stage.
        sigma: `float32[S, n, V]`, the standard errors the index states, by stage.
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
    weight = weight.detach()
    bias = None if bias is None else bias.detach().float().view(1, -1)
    unit = torch.finfo(torch.float32).eps * max(
        float(weight[block].float().norm(dim=1).max()) for block in row_blocks(*weight.shape)
    )
    for states in hidden.split(max(1, CHUNK_LOGITS // index.vocab_size)):
        query = make_query(states, index, plan, index.options.failure_probability)
        variance = [variances(query, index, stage) for stage in range(plan.stages)]
        yield Estimates(
            states,
            float32_logits(states, weight, None if bias is None else bias[0]),
            unit * states.float().norm(dim=1, keepdim=True),
            _all_stages(query, index, plan, bias, impl),
            torch.stack(variance).sqrt_(),
        )


def _all_stages(
    query: CodesQuery, index: CodesIndex, plan: CodesPlan, bias: Tensor | None, impl: str
) -> Tensor:
    """Scan all rows, then refine all rows plane by plane: float32[S, n, V]."""
    stages, rows = [scan(query, index, plan, bias, impl=impl)], torch.arange(index.vocab_size)
    for plane in range(1, plan.stages):
        coarser = stages[-1]
        finer = [
            refine(query, n, index, plan, plane, rows, coarser[n], impl=impl)
            for n in range(len(coarser))
        ]
        stages.append(torch.stack(finer))
    return torch.stack(stages)
