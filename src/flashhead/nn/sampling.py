"""Choosing a token from candidates: filters that are certified, and the sample they leave.

What the search knows of a hidden state is a set of rows with exact logits and, of all other rows,
an upper bound and an estimate of their summed mass. A filter (top_k, top_p, min_p, typical_p)
leaves a set S of rows; here S is found from what is known, or declared *not decidable*, and then
the caller completes the row by the dense product, with which everything is decidable. S is decided

- by **top_k** when the k-th best candidate is above the bound of all others: certified;
- by **min_p** when the bound itself is improbable enough to be removed: certified;
- by **top_p** when S is the same for every normaliser Z within z standard errors of the estimate,
  z = Phi^-1(1 - delta/2), and all of S is above the bound: certified, with failure probability
  delta beside that of the bound (the error of the estimate taken as Gaussian);
- by **typical_p** when an earlier filter closed the set: its entropy is then that of known logits.
  Alone it needs the entropy of the whole distribution: not decidable, the dense product.

Filters work in float64 on exact float32 logits and equal transformers' processors run in float64.
(Of rows that tie at the edge of a nucleus, its unstable sort leaves open which stay; here the
lowest do.) The sample is the maximum over S of l_v + T g_v with the noise of the unfiltered sampler
(`ops/noise`), so a seed gives the same tokens whether or not the row was completed, and the
unfiltered token wherever S holds it.

| feature | `next_token` | complete logits in `generate()` |
| --- | --- | --- |
| greedy | certified, else dense | estimated: the winner is certified or counted as not |
| temperature | certified: perturbed argmax, else dense | estimated within `kl_budget` |
| top_k | certified, else dense | estimated |
| top_p | certified (bound and mass), else dense | estimated |
| min_p | certified, else dense | estimated |
| typical_p | certified after another filter; alone exact, by the dense product | estimated |
| repetition, frequency, presence penalty | exact edit of exact logits | exact edit of logits |
| logit bias, sequence bias, bad words | exact edit of exact logits | exact edit of logits |
| allowed words, grammar mask | certified (as a bias), few rows exact | exact mask of logits |

"Exact edit of logits": of logits that are exact for candidates and estimates for the rest; never is
a forbidden token returned, and the best of what a mask allows may be an estimate's choice.
"""

import dataclasses
import math

from torch import Tensor

from flashhead.errors import FlashHeadError
from flashhead.nn.candidates import Candidates
from flashhead.nn.edits import biased, penalised
from flashhead.nn.filters import Kept, min_p_kept, ordered, top_k_kept, top_p_kept, typical_kept
from flashhead.ops.noise.api import draw
from flashhead.options import Sampling


def edited(
    candidates: Candidates,
    previous: Tensor,
    bias_rows: Tensor,
    bias: Tensor,
    sampling: Sampling,
    prompt_length: int = 0,
) -> Candidates:
    """Candidates after bias and penalties; `edited_rows` must be among them.

    Args:
        candidates: exact logits before edits.
        previous: `int64[t]`, tokens so far, prompt first.
        bias_rows: `int64[m]`, ascending, of `sequence_bias`.
        bias: `float32[m]`.
        sampling: the penalties.
        prompt_length: tokens of the prompt, which only the repetition penalty counts.
    """
    logits = biased(candidates.logits, candidates.rows, bias_rows, bias)
    logits = penalised(logits, candidates.rows, previous, sampling, prompt_length)
    return dataclasses.replace(candidates, logits=logits)


def greedy(candidates: Candidates) -> int | None:
    """Row with the highest logit, the lowest among equals; None: another row may be as high."""
    highest = _highest(candidates)
    if not candidates.complete and not highest > candidates.upper:
        return None
    return int(candidates.rows[candidates.logits == highest].min())


def allowed(
    candidates: Candidates, sampling: Sampling, failure_probability: float = 1e-6
) -> Candidates | None:
    """Rows that the filters leave; equals transformers' processors in float64 on all logits.

    Args:
        candidates: edited logits; `log_rest` is of logits divided by the temperature.
        sampling: the filters; the temperature is above 0.
        failure_probability: that top_p is decided by a wrong estimate of the rest; 0: never decide
            by an estimate.

    Returns:
        Complete candidates in ascending order of rows; None: not decidable, complete the row.

    Raises:
        FlashHeadError: greedy sampling, a probability out of range, or every row is forbidden.
    """
    if sampling.temperature == 0:
        raise FlashHeadError("temperature=0: wanted above 0 (filters do not change the best token)")
    if not 0 <= failure_probability < 1:
        raise FlashHeadError(f"failure_probability={failure_probability}: wanted 0 to below 1")
    _highest(candidates)
    temperature, top_p, min_p = sampling.temperature, sampling.top_p, sampling.min_p
    kept: Kept | None = ordered(candidates, temperature)
    if kept is not None and sampling.top_k is not None:
        kept = top_k_kept(kept, candidates, sampling.top_k)
    if kept is not None and top_p is not None and top_p < 1:
        kept = top_p_kept(kept, candidates, temperature, top_p, failure_probability)
    if kept is not None and min_p is not None and min_p > 0:
        kept = min_p_kept(kept, candidates, temperature, min_p)
    if kept is not None and sampling.typical_p is not None and sampling.typical_p < 1:
        kept = None if kept.others else typical_kept(kept, sampling.typical_p)
    if kept is None or kept.others:
        return None
    order = kept.rows.argsort()
    return Candidates(kept.rows[order], kept.logits[order])


def sample(candidates: Candidates, sampling: Sampling, steps: Tensor, *, impl: str) -> Tensor:
    """Draw one token a step from complete candidates: int64[n].

    Equals `rows[torch.multinomial(softmax(logits / temperature), n, replacement=True)]` in
    distribution.

    Args:
        candidates: complete, as `allowed` returns them.
        sampling: temperature above 0, and seed.
        steps: `int64[n]`, 0 or more; a step gives the same token in every call.
        impl: "cpu" or "reference".
    """
    assert candidates.complete, "other rows may win"
    winners, _ = draw(
        candidates.logits, sampling.seed, steps, sampling.temperature, candidates.rows, impl=impl
    )
    return candidates.rows[winners]


def _highest(candidates: Candidates) -> float:
    """Highest logit that is known, -inf if none is."""
    highest = float(candidates.logits.max()) if candidates.logits.numel() else -math.inf
    if candidates.complete and not highest > -math.inf:
        raise FlashHeadError("every token is forbidden: wanted a mask that allows one or more")
    return highest
