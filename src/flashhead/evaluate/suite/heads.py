"""Two heads over the hidden states of a body: float32 dense products, or a search of every row.

What is evaluated must be what is said: FlashHead as it is deployed takes the dense product for many
rows at once (prefill, batches), so scoring a text with it would measure the dense head. Here every
row is searched, for log-likelihoods too.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flashhead.evaluate.baselines import float32_logits

CHUNK_ROWS = 64
"""Rows whose complete logits exist at a time."""


@dataclasses.dataclass
class Counts:
    """What a head has counted: generated tokens, certified ones, rows scored exactly."""

    tokens: int = 0
    certified: int = 0
    candidates: int = 0


class DenseHead:
    """The model's own head, in float32.

    Args:
        head: a linear layer.
        postprocess: what the model does to its logits.
    """

    path = "float32 dense product"

    def __init__(self, head: nn.Module, postprocess: Callable[[Tensor], Tensor]) -> None:
        self.head, self.postprocess = head, postprocess

    def choose(self, hidden: Tensor) -> list[tuple[int, bool, int]]:
        """Next token, whether it is certified, rows scored exactly; of each `[n, d]`."""
        logits = self._logits(hidden)
        return [(token, False, logits.shape[1]) for token in logits.argmax(1).tolist()]

    def logits(self, hidden: Tensor) -> Tensor:
        """Complete logits: float32[n, V], on the CPU."""
        return self._logits(hidden).cpu()

    @torch.no_grad()
    def _logits(self, hidden: Tensor) -> Tensor:
        head: Any = self.head
        return self.postprocess(float32_logits(hidden, head.weight, head.bias))


class SearchedHead:
    """FlashHead, searched for every row.

    Args:
        head: a FlashHead with an index.
        postprocess: what the model does to its logits; it keeps their order.
    """

    path = "FlashHead, every row searched"

    def __init__(self, head: Any, postprocess: Callable[[Tensor], Tensor]) -> None:
        self.head, self.postprocess = head, postprocess

    def choose(self, hidden: Tensor) -> list[tuple[int, bool, int]]:
        """Next token, whether it is certified, rows scored exactly; of each `[n, d]`."""
        found = self.head.next_token(hidden)
        parts = (found.tokens, found.certified, found.candidates)
        return list(zip(*(part.tolist() for part in parts), strict=True))

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Complete logits: float32[n, V], on the CPU."""
        return self.postprocess(self.head.search(hidden).logits.float().cpu())


Head = DenseHead | SearchedHead


def token_logprobs(head: Head, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of continuations, and whether each is what greedy decoding gives.

    Args:
        head: the head.
        hidden: floating `[n, d]`.
        tokens: `int64[k, n]`, k continuations of n tokens.

    Returns:
        `float64[k]`, `bool[k]`.
    """
    values = torch.zeros(len(tokens), dtype=torch.float64)
    greedy = torch.ones(len(tokens), dtype=torch.bool)
    parts = zip(hidden.split(CHUNK_ROWS), tokens.split(CHUNK_ROWS, dim=1), strict=True)
    for states, wanted in parts:
        logits = head.logits(states)
        chosen = logits.gather(1, wanted.T).double()
        values += (chosen - torch.logsumexp(logits, 1).double()[:, None]).sum(0)
        greedy &= (logits.argmax(1) == wanted).all(1)
    return values, greedy
