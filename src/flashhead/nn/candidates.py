"""What a search knows of the logits of one hidden state."""

import dataclasses
import math

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Candidates:
    """What is known of the logits of one hidden state.

    Args:
        rows: `int64[k]`, each once.
        logits: `float32[k]`, exact; -inf where a mask forbids the row.
        upper: no other row's logit exceeds it.
        log_rest: log of the sum of exp(logit / temperature) over all other rows.
        rest_stderr: standard error of that sum, relative to the whole normaliser Z.
    """

    rows: Tensor
    logits: Tensor
    upper: float = -math.inf
    log_rest: float = -math.inf
    rest_stderr: float = 0.0

    @property
    def complete(self) -> bool:
        """Whether no other row can be chosen: all rows are known, or the others are forbidden."""
        return self.upper == -math.inf


def complete(logits: Tensor) -> Candidates:
    """Candidates of a row completed by the dense product, `float32[V]`."""
    return Candidates(torch.arange(logits.shape[0]), logits)
