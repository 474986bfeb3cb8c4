"""Two heads over the hidden states of a body: float32 dense products, or a search of every row.

What is evaluated must be what is said: FlashHead as it is deployed takes the dense product for many
rows at once (prefill, batches), so scoring a text with it would measure the dense head. Here every
row is searched, for log-likelihoods too: the logits of the tokens that are asked about are exact
and the normaliser is that of the complete logits, as `FlashHead.log_probs(..., draws=0)` gives it.
What the complete logits alone would say is kept beside it.
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

    def scored(self, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Complete logits, and exact ones of tokens `int64[n, k]`, of hidden states `[n, d]`."""
        logits = self.logits(hidden)
        return logits, logits.gather(1, tokens)

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

    @torch.no_grad()
    def scored(self, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Complete logits, and exact ones of tokens `int64[n, k]`, of hidden states `[n, d]`."""
        pairs = zip(hidden, tokens, strict=True)
        exact = torch.stack([self.head.exact_logits(*pair) for pair in pairs])
        return self.logits(hidden), self.postprocess(exact)


Head = DenseHead | SearchedHead


@dataclasses.dataclass(frozen=True)
class Continuations:
    """What a head says about k continuations of n tokens.

    Args:
        values: `float64[k]`, log-probabilities: exact logits over the normaliser of all logits.
        complete: `float64[k]`, those of the complete logits, which hold estimates.
        greedy: `bool[k]`, whether each is what greedy decoding gives.
    """

    values: Tensor
    complete: Tensor
    greedy: Tensor


def token_logprobs(head: Head, hidden: Tensor, tokens: Tensor) -> Continuations:
    """Log-probabilities of continuations.

    Args:
        head: the head.
        hidden: floating `[n, d]`.
        tokens: `int64[k, n]`, k continuations of n tokens.
    """
    values, complete = torch.zeros(2, len(tokens), dtype=torch.float64)
    greedy = torch.ones(len(tokens), dtype=torch.bool)
    parts = zip(hidden.split(CHUNK_ROWS), tokens.T.split(CHUNK_ROWS), strict=True)
    for states, wanted in parts:
        logits, exact = head.scored(states, wanted)
        normaliser = torch.logsumexp(logits.double(), 1)[:, None]
        values += (exact.double() - normaliser).sum(0)
        complete += (logits.gather(1, wanted).double() - normaliser).sum(0)
        greedy &= (logits.argmax(1)[:, None] == wanted).all(0)
    return Continuations(values, complete, greedy)
