"""Distances between two heads' distributions, position by position, and their means.

The specification is float64: softmax, sums and differences. A frontier of seventy heads takes
`precision=torch.float32` instead, in a fifth of the time: elementwise work is float32, every sum is
float32 over at most 512 neighbours and float64 above that, and log-sum-exps are float64. A
probability is then off by a few parts in 10^7, so

    |KL error| <= 1e-6 (1 + sum_v p_v |difference of logits_v|) nats

(roundings: one of the difference of logits, two of exp, one of the normaliser, nine of a sum of
512; each 6e-8 at most and of either sign). `tests/test_frontier.py` holds it to that. What is
compared is float32 or bf16 in both.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

METRIC_LOGITS = {torch.float64: 2**22, torch.float32: 2**19}
"""Logits turned into probabilities at a time; float32 ones stay in the second-level cache."""
SUM_WIDTH = 512


class Reference:
    """The logits that others are compared with, their softmax taken once.

    Args:
        logits: `float32[n, V]`.
        precision: of elementwise work, see the module; float64 or float32.
    """

    def __init__(self, logits: Tensor, precision: torch.dtype = torch.float64) -> None:
        self.logits, self.precision = logits, precision
        self.best = logits.amax(1)
        self.probabilities = torch.empty(logits.shape, dtype=precision)
        self.log_totals = torch.empty(len(logits), dtype=torch.float64)
        for rows in self._blocks():
            p, self.log_totals[rows] = _softmax(logits[rows], precision)
            self.probabilities[rows] = p

    def _blocks(self) -> list[slice]:
        step = max(1, METRIC_LOGITS[self.precision] // self.logits.shape[1])
        return [slice(start, start + step) for start in range(0, len(self.logits), step)]

    def agrees(self, logits: Tensor) -> Tensor:
        """Whether the argmax of `[n, V]` logits is one of the reference, ties allowed: bool[n]."""
        return self.chosen(argmax(logits))

    def chosen(self, tokens: Tensor) -> Tensor:
        """Whether `int64[n]` tokens are an argmax of the reference: bool[n]."""
        return self.logits.gather(1, tokens[:, None])[:, 0] == self.best

    def divergences(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """KL(reference||logits) in nats and total variation: float64[n], float64[n].

        Args:
            logits: floating `[n, V]`; one that is not finite makes its row's KL NaN or infinite.
        """
        kl = torch.empty(len(logits), dtype=torch.float64)
        tv = torch.empty_like(kl)
        for rows in self._blocks():
            p = self.probabilities[rows]
            q, log_q_total = _softmax(logits[rows], self.precision)
            gap = self.logits[rows].to(self.precision) - logits[rows].to(self.precision)
            kl[rows] = _sum(gap.mul_(p)) - (self.log_totals[rows] - log_q_total)
            tv[rows] = _sum(q.sub_(p).abs_()) / 2
        return kl, tv


def _softmax(logits: Tensor, precision: torch.dtype) -> tuple[Tensor, Tensor]:
    """Softmax `precision[n, V]` and log-sum-exp `float64[n]` of `[n, V]`."""
    top = logits.amax(1, keepdim=True)
    powers = (logits.to(precision) - top.to(precision)).exp_()
    total = _sum(powers)
    return powers.div_(total[:, None].to(precision)), top[:, 0].double() + total.log()


def _sum(values: Tensor) -> Tensor:
    """Sums of rows `[n, V]`: float64[n]."""
    width = math.gcd(values.shape[1], SUM_WIDTH)
    return values.view(len(values), -1, width).sum(2).sum(1, dtype=torch.float64)


def argmax(logits: Tensor) -> Tensor:
    """First of the largest of every row of `[n, V]`: int64[n].

    Equals `logits.argmax(1)`, which torch does not vectorise, in a tenth of the time.
    """
    width = math.gcd(logits.shape[1], SUM_WIDTH)
    blocks = logits.unflatten(1, (-1, width))
    block = blocks.amax(2).argmax(1)
    return block * width + blocks[torch.arange(len(logits)), block].argmax(1)


def top_ties(logits: Tensor) -> Tensor:
    """Whether the two best logits of a row are equal: bool[n]."""
    width = math.gcd(logits.shape[1], SUM_WIDTH)
    blocks = logits.unflatten(1, (-1, width))
    peaks = blocks.amax(2)
    best, block = peaks.max(1)
    inside = (blocks[torch.arange(len(logits)), block] == best[:, None]).sum(1)
    return (inside > 1) | ((peaks == best[:, None]).sum(1) > 1)


@dataclasses.dataclass
class Totals:
    """Per-position figures of one method, a tensor a chunk; one never added is null in the row.

    `agree` (0, 1, or the probability of it) and `bytes_read` every method must have.
    """

    parts: dict[str, list[Tensor]] = dataclasses.field(default_factory=dict)

    def add(self, **figures: Tensor) -> None:
        """Add one chunk, `[n]` a figure."""
        for name, figure in figures.items():
            self.parts.setdefault(name, []).append(figure.double())

    def row(self, dense_bytes: int) -> dict[str, Any]:
        """Means, standard errors and percentiles: the method's row of the table."""
        figures = {name: torch.cat(chunks) for name, chunks in self.parts.items()}
        agree, kl = figures["agree"], figures.get("kl")
        row: dict[str, Any] = {
            "agreement": agree.mean().item(),
            "agreement_stderr": _stderr(agree),
            "disagreements": round((1 - agree).sum().item()),
            "kl": None if kl is None else kl.mean().item(),
            "kl_stderr": None if kl is None else _stderr(kl),
            "tv": figures["tv"].mean().item() if "tv" in figures else None,
            "ties": figures["ties"].mean().item() if "ties" in figures else None,
            "bytes_fraction": figures["bytes_read"].mean().item() / dense_bytes,
        }
        candidates, certified = figures.get("candidates"), figures.get("certified")
        row["candidates_mean"] = None if candidates is None else candidates.mean().item()
        row["candidates_p50"] = None if candidates is None else candidates.quantile(0.5).item()
        row["candidates_p99"] = None if candidates is None else candidates.quantile(0.99).item()
        row["certified_fraction"] = None if certified is None else certified.mean().item()
        fallback = figures.get("fallback")
        row["fallback_fraction"] = None if fallback is None else fallback.mean().item()
        row["certified_wrong"] = None if certified is None else int((certified * (1 - agree)).sum())
        return row


def _stderr(figures: Tensor) -> float:
    """Standard error of the mean; 0 where all figures are alike, which is no proof of it."""
    return figures.std().item() / math.sqrt(len(figures)) if len(figures) > 1 else 0.0
