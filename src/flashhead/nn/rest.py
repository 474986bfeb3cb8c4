"""The mass of the rows that were not scored exactly: an unbiased estimate with its standard error.

The estimates s_v of the rest are good proposals: m rows are drawn with probability proportional to
exp(s_v / T), by systematic sampling, and scored exactly. With S the sum of exp(s_v / T) over the
rest,

    E[ S mean_i exp((l_i - s_i) / T) ] = sum of exp(l_v / T) over the rest,

whatever the errors of the estimates and however the rest was selected (importance sampling): it is
unbiased by construction. Its relative standard error is that of the mean of m weights whose spread
is about sigma / T; taken from the sample as if the draws were independent, which overstates it.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashhead.nn.output import HeadOutput, LogProbs

if TYPE_CHECKING:
    from flashhead.nn.head import FlashHead

DRAWS = 256


def rest_of(
    head: "FlashHead",
    hidden: Tensor,
    output: HeadOutput,
    temperature: float,
    bias: Tensor | None = None,
    number: int = 0,
    seed: int = 0,
    draws: int = DRAWS,
) -> tuple[float, float]:
    """Log of the sum of exp(logit / T) over the rows that `output` did not score exactly.

    Args:
        head: that was searched.
        hidden: floating `[d]`, row `number` of what was searched.
        output: of the search, with the exact rows.
        temperature: T, above 0.
        bias: `float32[1, V]`, what the search added to the logits beyond the head's own, or None.
        number: which hidden state.
        seed: of the draws.
        draws: how many, 2 or more.

    Returns:
        The log (-inf if there is no rest) and the relative standard error of the sum.
    """
    assert output.exact is not None
    scaled = output.logits[number].double() / temperature
    scaled[output.exact[number].long()] = -math.inf
    peak = float(scaled.max())
    if peak == -math.inf:
        return -math.inf, 0.0
    heights = (scaled - peak).exp().cumsum(0)
    total = float(heights[-1])
    start = torch.rand(1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    places = (torch.arange(draws, dtype=torch.float64) + start) * (total / draws)
    rows = torch.searchsorted(heights, places, right=True).clamp_max(len(heights) - 1)
    exact = head.exact_logits(hidden, rows).double() / temperature
    if bias is not None:
        exact = exact + bias[0, rows] / temperature
    weights = (exact - scaled[rows]).exp()
    mean = float(weights.mean())
    stderr = float(weights.std()) / math.sqrt(draws)
    return peak + math.log(total) + math.log(mean), stderr / mean


def log_probs(
    head: "FlashHead", hidden: Tensor, tokens: Tensor, temperature: float, draws: int = DRAWS
) -> LogProbs:
    """Log-probabilities of given tokens; see `FlashHead.log_probs`."""
    if draws == 0:
        return _over_complete_logits(head, hidden, tokens, temperature)
    output = head.search_rows(hidden, None)
    assert output.exact is not None
    logits, log_z, stderr = torch.empty(3, len(hidden), dtype=torch.float64)
    for n, state in enumerate(hidden):
        logits[n] = head.exact_logits(state, tokens[n : n + 1])[0]
        known = output.logits[n, output.exact[n].long()].double() / temperature
        rest, error = rest_of(head, state, output, temperature, number=n, draws=draws)
        inside = torch.logsumexp(known, 0)
        log_z[n] = torch.logaddexp(inside, torch.tensor(rest, dtype=torch.float64))
        stderr[n] = error * (rest - log_z[n]).exp()
    values = (logits / temperature - log_z).float()
    return LogProbs(values, stderr.float(), logits.float(), log_z.float())


def _over_complete_logits(
    head: "FlashHead", hidden: Tensor, tokens: Tensor, temperature: float
) -> LogProbs:
    """Exact logits of given tokens over the normaliser of the complete logits."""
    log_z = torch.logsumexp(head.search(hidden).logits.double() / temperature, 1).cpu()
    found = [head.exact_logits(state, tokens[n : n + 1]) for n, state in enumerate(hidden)]
    logits = torch.cat(found) if found else torch.empty(0)
    values = (logits.double() / temperature - log_z).float()
    unknown = torch.full_like(values, math.nan)
    return LogProbs(values, unknown, logits.float(), log_z.float())
