"""Hidden states that a model feeds to its output embedding, found by hooks on whatever module that
is.

The hook lets the head itself score the last position only: no model computes V logits for every
position of a text.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashhead.errors import FlashHeadError
from flashhead.evaluate.text import scored_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Postprocess = Callable[[Tensor], Tensor]


def hidden_states(
    model: "PreTrainedModel", windows: list[Tensor], bos: int | None, postprocess: Postprocess
) -> Iterator[Tensor]:
    """Hidden states that enter the output embedding, BOS left out: `[positions, d]` a window."""
    for number, window in enumerate(windows):
        with _caught(model.get_output_embeddings()) as caught:
            logits = model(input_ids=window[None].to(model.device), use_cache=False).logits
        if len(caught) != 2:
            raise FlashHeadError(
                f"{type(model).__name__}: its forward does not call the output embedding once"
            )
        states, last_logits = caught
        if number == 0:
            _check_postprocess(postprocess(last_logits), logits)
        yield states[0][scored_positions(window, bos)]


@contextlib.contextmanager
def _caught(head: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Catch what enters and what leaves the head, and let it score the last position only."""
    caught: list[Tensor] = []

    def enter(_module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        caught.append(args[0])
        return (args[0][:, -1:],)

    def leave(_module: torch.nn.Module, _args: tuple[Tensor, ...], logits: Tensor) -> None:
        caught.append(logits.clone())

    handles = [head.register_forward_pre_hook(enter), head.register_forward_hook(leave)]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()


def _check_postprocess(ours: Tensor, models: Tensor) -> None:
    """The model's logits must be the head's after `postprocess`, but for their rounding."""
    eps = max(torch.finfo(ours.dtype).eps, torch.finfo(models.dtype).eps)
    ours, models = ours.float(), models.float()
    slack = 4 * eps * models.abs().max()
    if ours.shape != models.shape or not bool(((ours - models).abs() <= slack).all()):
        raise FlashHeadError(
            "postprocess: the model changes its logits after the head in another way; "
            "wanted integrations.transformers.logit_postprocess(model.config)"
        )
