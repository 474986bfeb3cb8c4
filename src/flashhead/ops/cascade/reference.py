"""Cascade in eager torch: the specification (rules in `api`)."""

import math

import torch
from torch import Tensor

from flashhead.index.bound import SHARES
from flashhead.index.codes import BLOCK_ROWS, CodesIndex
from flashhead.ops.cascade.api import (
    BINS,
    BINS_A_NAT,
    DENSE_SHARE,
    NEAR_NATS,
    PILOTS,
    SAMPLED_BLOCKS,
    Cascade,
)
from flashhead.ops.refine import reference as refine
from flashhead.ops.rescore import reference as rescore
from flashhead.ops.scan import reference as scan
from flashhead.ops.scan.query import CodesPlan, CodesQuery, make_query

TASK_ROWS = 1024


def cascade(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: CodesIndex,
    plan: CodesPlan,
    failure_probability: float,
    kl_budget: float | None,
    margin: float,
) -> Cascade:
    """Search the codes of a head; see `api.cascade`."""
    query = make_query(hidden, index, plan, failure_probability)
    scores = scan.scan(query, index, plan, bias)
    tokens, best, uppers, read, dense, exact_rows = [], [], [], [], [], []
    for n in range(len(hidden)):
        added = None if bias is None else bias[n if len(bias) > 1 else 0]
        rows = pilots(scores[n])
        exact = rescore.rescore(hidden[n], weight, added, rows)
        survivors, counts, upper = _narrow(
            scores[n], query, n, index, plan, (rows, exact), kl_budget, margin
        )
        rows = torch.cat([survivors, rows]).unique()
        if len(rows) > DENSE_SHARE * index.vocab_size:
            rows, upper = torch.arange(index.vocab_size), -math.inf
        scores[n, rows] = rescore.rescore(hidden[n], weight, added, rows)
        winner = int(rows[scores[n, rows].argmax()])
        tokens.append(winner)
        best.append(float(scores[n, winner]))
        uppers.append(upper)
        read.append([*counts, len(rows)])
        dense.append(len(rows) == index.vocab_size)
        exact_rows.append(rows)
    return Cascade(
        scores,
        torch.tensor(tokens, dtype=torch.int64),
        torch.tensor(best, dtype=torch.float32),
        torch.tensor(uppers, dtype=torch.float32),
        torch.tensor(read, dtype=torch.int64).view(-1, plan.stages),
        torch.tensor(dense, dtype=torch.bool),
        exact_rows,
    )


def pilots(estimates: Tensor) -> Tensor:
    """Rows of the best estimate of each 1,024 rows, the 32 best of them: int64[k]."""
    parts = [part.argmax() + TASK_ROWS * i for i, part in enumerate(estimates.split(TASK_ROWS))]
    rows = torch.stack(parts)
    return rows[estimates[rows].argsort(descending=True, stable=True)[:PILOTS]]


def _narrow(
    scores: Tensor,
    query: CodesQuery,
    n: int,
    index: CodesIndex,
    plan: CodesPlan,
    pilot: tuple[Tensor, Tensor],
    budget: float | None,
    margin: float,
) -> tuple[Tensor, list[int], float]:
    """Rows to read exactly, how many read each plane, and the bound of all others; refined
    estimates go into `scores`.

    `pilot` are their rows and exact scores.
    """
    rows, threshold, peak = torch.arange(index.vocab_size), pilot[1].max() - margin, scores.max()
    variance = _squares(index, rows, query.variance[n, 0], query.floor[n])
    weight = sample_weights(scores)
    mass = (weight * torch.exp(scores.double() - peak - variance / 2)).sum()
    drawn = scores[pilot[0]].double() - variance[pilot[0]] / 2
    mass += (torch.exp(pilot[1].double() - peak) - torch.exp(drawn - peak)).sum()
    spent, upper, counts = 0.0, -math.inf, []
    for stage in range(plan.stages):
        estimates = scores[rows].double()
        variance = _squares(index, rows, query.variance[n, stage], query.floor[n])
        reach = estimates + _squares(index, rows, query.spread[n, stage], query.floor[n]).sqrt()
        taken = reach >= threshold
        if budget is not None:
            loss = torch.exp(estimates - peak) * growth(variance / 2)
            allowed = budget * SHARES[plan.stages - 1][stage] * mass - spent
            needed = mass_rule(peak - estimates, loss * weight, float(allowed))
            spent += float((loss * weight)[~needed].sum()) - float(loss[taken & ~needed].sum())
            spent, taken = max(0.0, spent), taken | needed
        upper = max(upper, float(reach[~taken].max()) if not taken.all() else -math.inf)
        rows, weight = rows[taken], torch.ones((), dtype=torch.float64)
        if stage + 1 < plan.stages:
            counts.append(len(rows))
            finer = refine.refine(query, n, index, plan, stage + 1, rows, scores[rows])
            scores[rows] = finer
    return rows, counts, upper


def sample_weights(scores: Tensor) -> Tensor:
    """How often each row counts at the base: float64[V]."""
    blocks = -(-len(scores) // BLOCK_ROWS)
    stride = min(8, max(1, blocks // SAMPLED_BLOCKS))
    padded = torch.nn.functional.pad(
        scores, (0, blocks * BLOCK_ROWS - len(scores)), value=-math.inf
    )
    highest = padded.view(blocks, BLOCK_ROWS).amax(1)
    near = scores.max() - highest <= NEAR_NATS
    drawn = (torch.arange(blocks) % stride == 0).double() * stride
    return torch.where(near, 1.0, drawn).repeat_interleave(BLOCK_ROWS)[: len(scores)]


def _squares(index: CodesIndex, rows: Tensor, coefficients: Tensor, floor: Tensor) -> Tensor:
    """sum_g scale_g^2 coefficient_g + floor of some rows: float64[k]."""
    return coefficients.double() @ index.scale[:, rows].double().square() + floor


def growth(x: Tensor) -> Tensor:
    """exp(x) - 1 by its first four terms, x at most 4: what larger errors do is not Gaussian."""
    x = x.clamp_max(4.0)
    return x * (1 + x * (1 / 2 + x * (1 / 6 + x / 24)))


def mass_rule(gap: Tensor, loss: Tensor, allowed: float) -> Tensor:
    """Rows that are needed so that the loss of the others is at most `allowed`: bool[k].

    Args:
        gap: `float32[k]`, nats below the best estimate; negative ones count as 0.
        loss: `float64[k]`.
        allowed: in the same unit; negative: all rows are needed.
    """
    bins = (gap * BINS_A_NAT).clamp(0, BINS - 1).long()
    total = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, loss)
    below = total.flip(0).cumsum(0).flip(0)  # loss of this bin and all below
    return bins < int((below > allowed).sum())
