"""The search of a codes index: which rows are read how finely, and which of them wins.

For one hidden state, with score = logit + bias:

1. Scan: an estimate s_v of every score, with sigma_v.
2. Pilots: the row of the best estimate of each 1,024 rows; the 32 best of these are scored exactly.
   E is the best of their exact scores: the winner's is at least that.
3. At each stage (the base, then each plane) a row goes on if it can still win,
   s_v + spread_v >= E - margin, or if the distribution needs it: what the rows left cost stays
   within the share of the KL budget that is due (`index.bound`). Rows that go on read the next
   plane, and after the last plane their bf16 row.
4. The winner is the largest exact score, the lowest row of equal ones.

Spread is z sigma (z from the failure probability) or the deterministic bound. Every row left out
was compared with an exact score, so the answer is certified by construction: `index.bound` says
what that is worth. Where more than half of the rows would be read exactly, all of them are: the
dense product in float32 ("fallback").

What a row costs. Left at an estimate with a Gaussian error, it keeps its mass p_v times exp of the
error: the normaliser grows by p_v (exp(sigma^2/2) - 1) on average, to first order the KL in nats.
p_v is exp(s_v) over a mass that is free of that growth: exp(s_v - sigma_v^2/2), and for the pilots,
which are selected for their noise, their exact scores.

The rule needs neither a sort nor a threshold guessed beforehand: rows fall into bins of 1/16 nat
below the best estimate, and whole bins are left, lowest first. In large vocabularies masses and
costs at the base are sums over a sample: all blocks of 16 rows whose best row is within 8 nats of
the best estimate, and every k-th of the others, counted k times.
"""

import dataclasses

from torch import Tensor

from flashhead.index.codes import CodesIndex
from flashhead.ops.dispatch import require_host_impl
from flashhead.ops.scan.query import CodesPlan

PILOTS = 32
BINS_A_NAT = 16
BINS = 1024
"""The last bin holds all rows 64 nats or more below the best estimate."""
SAMPLED_BLOCKS = 2048
"""k is the number of blocks over this, 1 to 8."""
NEAR_NATS, FAR_NATS = 8.0, 24.0
"""Blocks nearer than the first all count; those farther than the second by a bound, unless that
alone is too much.
"""
DENSE_SHARE = 0.5
"""Share of the rows beyond which all are scored exactly."""


@dataclasses.dataclass(frozen=True)
class Cascade:
    """What a search of n hidden states found.

    Args:
        scores: `float32[n, V]`, exact where read exactly, the finest estimate elsewhere.
        tokens: `int64[n]`, the winner.
        best: `float32[n]`, its exact score.
        upper: `float32[n]`, no row that was not read exactly has a larger score, but for the
            failure probability; -inf: none is left.
        read: `int64[n, planes + 1]`, rows read of each plane and rows read exactly.
        dense: `bool[n]`, whether all rows were scored exactly.
        exact: for each hidden state the rows read exactly, `int64[k]` ascending.
    """

    scores: Tensor
    tokens: Tensor
    best: Tensor
    upper: Tensor
    read: Tensor
    dense: Tensor
    exact: list[Tensor]


def cascade(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: CodesIndex,
    plan: CodesPlan,
    failure_probability: float,
    kl_budget: float | None,
    *,
    impl: str,
    margin: float = 0.0,
) -> Cascade:
    """Search the codes of a head.

    Args:
        hidden: floating `[n, d]`, finite.
        weight: bfloat16, float16 or float32 `[V, d]`, contiguous.
        bias: `float32[1, V]` or `float32[n, V]`, added to the logits, -inf: never chosen; or None.
        index: codes of `weight`.
        plan: `make_plan(index)`.
        failure_probability: of the certificate; 0: the deterministic bound.
        kl_budget: nats, or None: the winner alone counts.
        impl: "cpu" or "reference".
        margin: nats below the winner down to which all rows are to be known exactly.
    """
    arguments = (hidden, weight, bias, index, plan, failure_probability, kl_budget, margin)
    require_host_impl(impl)
    if impl == "cpu":
        from flashhead.ops.cascade import cpu

        return cpu.cascade(*arguments)
    from flashhead.ops.cascade import reference

    return reference.cascade(*arguments)
