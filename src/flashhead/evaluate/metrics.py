"""Distances between two heads' distributions, position by position, and their means.

Softmax and sums are float64; what is compared is float32 or bf16.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

METRIC_LOGITS = 2**22
"""Logits turned into float64 probabilities at a time."""


class Reference:
    """The logits that others are compared with, their softmax taken once.

    Args:
        logits: `float32[n, V]`.
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.best = logits.amax(1)
        blocks = [_softmax(rows) for rows in logits.split(self._rows)]
        self._probabilities = torch.cat([p for p, _ in blocks])
        self._log_totals = torch.cat([total for _, total in blocks])

    @property
    def _rows(self) -> int:
        return max(1, METRIC_LOGITS // self.logits.shape[1])

    def agrees(self, logits: Tensor) -> Tensor:
        """Whether the argmax of `[n, V]` logits is one of the reference, ties allowed: bool[n]."""
        return self.logits.gather(1, logits.argmax(1, keepdim=True))[:, 0] == self.best

    def divergences(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """KL(reference||logits) in nats and total variation: float64[n], float64[n].

        Args:
            logits: floating `[n, V]`; one that is not finite makes its row's KL NaN or infinite.
        """
        kls, tvs = [], []
        for start in range(0, len(logits), self._rows):
            rows = slice(start, start + self._rows)
            p, log_p_total = self._probabilities[rows], self._log_totals[rows]
            q, log_q_total = _softmax(logits[rows])
            gap = self.logits[rows].double() - logits[rows].double()
            kls.append(torch.linalg.vecdot(p, gap) - (log_p_total - log_q_total))
            tvs.append(q.sub_(p).abs_().sum(1) / 2)
        return torch.cat(kls), torch.cat(tvs)


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax `float64[n, V]` and log-sum-exp `float64[n]` of `[n, V]`."""
    top = logits.amax(1, keepdim=True).double()
    powers = logits.double().sub_(top).exp_()
    total = powers.sum(1, keepdim=True)
    return powers.div_(total), (top + total.log())[:, 0]


def top_ties(logits: Tensor) -> Tensor:
    """Whether the two best logits of a row are equal: bool[n]."""
    if logits.shape[1] < 2:
        return torch.zeros(len(logits), dtype=torch.bool)
    best = logits.topk(2, dim=1).values
    return best[:, 0] == best[:, 1]


@dataclasses.dataclass
class Totals:
    """Per-position figures of one method, a tensor a chunk; one never added is null in the row."""

    parts: dict[str, list[Tensor]] = dataclasses.field(default_factory=dict)

    def add(self, **figures: Tensor) -> None:
        """Add one chunk, `[n]` a figure."""
        for name, figure in figures.items():
            self.parts.setdefault(name, []).append(figure.double())

    def row(self, dense_bytes: int) -> dict[str, Any]:
        """Means, standard errors and percentiles: the method's row of the table."""
        figures = {name: torch.cat(chunks) for name, chunks in self.parts.items()}
        agree, kl = figures["agree"], figures["kl"]
        row: dict[str, Any] = {
            "agreement": agree.mean().item(),
            "agreement_stderr": _stderr(agree),
            "disagreements": int((agree == 0).sum()),
            "kl": kl.mean().item(),
            "kl_stderr": _stderr(kl),
            "tv": figures["tv"].mean().item(),
            "ties": figures["ties"].mean().item(),
            "bytes_fraction": figures["bytes_read"].mean().item() / dense_bytes,
        }
        candidates, certified = figures.get("candidates"), figures.get("certified")
        row["candidates_mean"] = None if candidates is None else candidates.mean().item()
        row["candidates_p50"] = None if candidates is None else candidates.quantile(0.5).item()
        row["candidates_p99"] = None if candidates is None else candidates.quantile(0.99).item()
        row["certified_fraction"] = None if certified is None else certified.mean().item()
        row["certified_wrong"] = None if certified is None else int((certified * (1 - agree)).sum())
        return row


def _stderr(figures: Tensor) -> float:
    """Standard error of the mean; 0 where all figures are alike, which is no proof of it."""
    return figures.std().item() / math.sqrt(len(figures)) if len(figures) > 1 else 0.0
