"""How far a search must look: standard errors for the certificate, nats for the distribution.

Certificate. What is random is the rotation inside each segment of the index, drawn once when it is
built, independently of head and hidden states; for a given row it makes the direction of the coding
error uniform in the complement of the row. A search compares every row left out with E, the exact logit
of a row it has scored: at each stage a row is left out if s_v + z sigma_v < E.

Let u be the winner, the row of the largest float32 logit: a fixed row, whatever the rotation. The
answer is wrong only if u itself was left out, so that s_u + z sigma_u < E <= l_u: its error must
be more than z standard errors below zero. Other rows cannot make the answer wrong, however large
their error: at worst they are scored in vain. So there is no union over the V rows, only over the
stages of the cascade, and with k stages

    P(wrong) <= k Q(z),  z = Q^-1(failure_probability / k),  Q the Gaussian tail.

The Gaussian tail is that of a uniform direction in many dimensions (whose tail is lighter). For the
stream of hidden states that one index meets, the expected share of wrong tokens is at most the
failure probability; they are not independent, as all share one rotation. The model is checked on
real hidden states (`flashhead inspect --head`), for the argmax rows too.

`failure_probability = 0` uses the Cauchy-Schwarz inequality segment by segment instead, which holds
for every rotation (`ops.scan.query`).

Distribution. Rows left at their estimate cost about p sigma^2 / 2 nats each (`ops.cascade`). A row
is cheap to take on early (a plane of codes) and expensive late (its bf16 row), but early there are
many more of them: half of the KL budget for the first stage measured best (docs/log.md).
"""

import functools
import statistics

SHARES: dict[int, tuple[float, ...]] = {1: (0.5, 1.0), 2: (0.5, 0.75, 1.0)}
"""By number of planes: share of the KL budget that may be spent by the end of each stage."""


@functools.cache
def z_score(failure_probability: float, stages: int) -> float:
    """Standard errors so that `stages` comparisons fail with at most this probability; 1 for 0,
    where the spread is the deterministic bound itself.
    """
    if failure_probability == 0:
        return 1.0
    return statistics.NormalDist().inv_cdf(1 - failure_probability / stages)
