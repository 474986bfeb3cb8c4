"""Filters on what is known: rows kept by top_k, top_p, min_p and typical_p, or None.

None stands for "not decidable": rows that are not known might be kept. Everything is float64; the
formulas are those of transformers' processors, `nn/sampling.py` says what is certain.
"""

import dataclasses
import math
import statistics

import torch
from torch import Tensor

from flashhead.nn.candidates import Candidates


@dataclasses.dataclass(frozen=True)
class Kept:
    """Rows that the filters so far keep.

    Args:
        rows: `int64[m]`, in ascending order of logit, and of equals the lowest row last.
        logits: `float32[m]`.
        scaled: `float64[m]`, logits / temperature less their maximum, which is 0.
        others: whether rows that are not known are kept too.
    """

    rows: Tensor
    logits: Tensor
    scaled: Tensor
    others: bool

    def only(self, keep: Tensor) -> "Kept":
        """Keep some of the known rows, and no others."""
        return Kept(self.rows[keep], self.logits[keep], self.scaled[keep], False)


def ordered(candidates: Candidates, temperature: float) -> Kept:
    """All known rows that can be chosen."""
    possible = candidates.logits > -math.inf
    rows, order = candidates.rows[possible].sort(descending=True)
    logits, ascending = candidates.logits[possible][order].sort(stable=True)
    scaled = logits.double() / temperature
    return Kept(
        rows[ascending],
        logits,
        scaled - scaled.max() if len(scaled) else scaled,
        not candidates.complete,
    )


def _above(kept: Kept, candidates: Candidates) -> bool:
    """Whether the kept known rows are above all others."""
    return len(kept.logits) > 0 and float(kept.logits[0]) > candidates.upper


def top_k_kept(kept: Kept, candidates: Candidates, k: int) -> Kept | None:
    """The k best, and what ties with the last of them."""
    if len(kept.rows) < k:
        return None if kept.others else kept
    best = kept.only(kept.logits >= kept.logits[-k])
    return best if not kept.others or _above(best, candidates) else None


def top_p_kept(
    kept: Kept,
    candidates: Candidates,
    temperature: float,
    top_p: float,
    failure_probability: float,
) -> Kept | None:
    """The fewest best rows that have top_p of the mass, whatever the error of the rest."""
    tails = kept.scaled.exp().cumsum(0)
    if not kept.others:
        return kept.only(_nucleus(tails, 0.0, top_p))
    if not len(tails):
        return None
    peak = float(kept.logits[-1]) / temperature
    rest = math.exp(min(candidates.log_rest - peak, 700.0))
    known = float(tails[-1])
    spread = _deviations(failure_probability, candidates.rest_stderr) * (known + rest)
    most = rest + spread
    if not most <= (1 - top_p) * (known + most) < math.inf:
        return None  # the nucleus may reach rows that are not known
    best = kept.only(_nucleus(tails, most, top_p))
    fewest = _nucleus(tails, max(0.0, rest - spread), top_p)
    same = len(best.rows) == int(fewest.sum())
    return best if same and _above(best, candidates) else None


def _deviations(failure_probability: float, stderr: float) -> float:
    """Half-width of the two-sided interval around an estimate with this standard error."""
    if stderr == 0:
        return 0.0
    if failure_probability == 0:
        return math.inf
    return stderr * statistics.NormalDist().inv_cdf(1 - failure_probability / 2)


def _nucleus(tails: Tensor, rest: float, top_p: float) -> Tensor:
    """Known rows that top_p keeps, by mask, when the rows that are not known have the mass `rest`.

    A row goes if it and all rows below it have at most 1 - top_p of the mass.

    Args:
        tails: `float64[m]`, masses summed from the lowest known row up.
        rest: mass in the same unit.
        top_p: 0 to 1.
    """
    keep = (tails + rest) / (tails[-1] + rest) > 1 - top_p
    keep[-1] = True  # also where the share of the best is lost in rounding
    return keep


def min_p_kept(kept: Kept, candidates: Candidates, temperature: float, min_p: float) -> Kept | None:
    """Rows at least min_p times as probable as the best."""
    best = kept.only(kept.scaled.exp() >= min_p)
    if not kept.others:
        return best
    if not _above(best, candidates):
        return None
    gap = (candidates.upper - float(best.logits[-1])) / temperature
    return best if math.exp(gap) < min_p else None


def typical_kept(kept: Kept, mass: float) -> Kept:
    """Rows with the most typical information, -log p closest to the entropy, up to a mass."""
    log_p = kept.scaled.log_softmax(0)
    distance, order = (-log_p + (log_p * log_p.exp()).sum()).abs().sort(stable=True)
    last = int((log_p[order].exp().cumsum(0) < mass).sum().clamp(max=len(order) - 1))
    keep = torch.zeros(len(order), dtype=torch.bool)
    keep[order[distance <= distance[last]]] = True
    keep[order[0]] = True
    return kept.only(keep)
