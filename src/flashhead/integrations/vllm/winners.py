"""Logits of rows of which only the winner is read: -inf, and the winner's exact score."""

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from flashhead.index.codes import CodesIndex
from flashhead.nn.head import FlashHead

if TYPE_CHECKING:
    from flashhead.nn.device import DeviceNextToken


def gives_winners(head: FlashHead) -> bool:
    """Whether a GPU searches codes, which finds winners and their exact scores alone."""
    return head.device_search is not None and isinstance(head.index, CodesIndex)


def searched_winners(head: FlashHead, states: Tensor, width: int) -> Tensor:
    """Winners of hidden states as logits; nothing waits for the device, whose kernels count.

    Args:
        head: that `gives_winners`.
        states: floating `[n, d]`, on the head's device.
        width: columns of the result, V or more.

    Returns:
        `float32[n, width]`, fresh.
    """
    assert isinstance(head.index, CodesIndex)
    probability = head.index.options.failure_probability
    found = cast("DeviceNextToken", head.next_token(states, failure_probability=probability))
    return winner_logits(found.tokens, found.scores, width)


def winner_logits(tokens: Tensor, scores: Tensor, width: int) -> Tensor:
    """Logits whose argmax is known, in two launches; equals
    `torch.full((n, width), -inf).scatter(1, tokens[:, None], scores[:, None])`.

    Args:
        tokens: `int64[n]`, each below `width`.
        scores: `float32[n]`, exact logits of the tokens.
        width: columns of the result.

    Returns:
        `float32[n, width]`, fresh.
    """
    logits = scores.new_full((len(tokens), width), -torch.inf)
    return logits.scatter_(1, tokens[:, None], scores[:, None])
