"""Compare greedy decoding of two heads token by token, and explain every token that differs."""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from flashhead.integrations.transformers import Attachment


@dataclasses.dataclass(frozen=True)
class Difference:
    """A place where the heads chose different tokens after the same text.

    Args:
        prompt: number of the prompt.
        step: number of the token.
        dense: the bf16 dense head's token.
        flash: FlashHead's token.
        exact: the token that wins in float32.
        dense_gap: float32 logit of the winner less that of the dense head's token.
    """

    prompt: int
    step: int
    dense: int
    flash: int
    exact: int
    dense_gap: float

    @property
    def rounded_away(self) -> bool:
        """Whether the dense bf16 head lost the winner by rounding and FlashHead found it."""
        return self.flash == self.exact and self.dense != self.exact


class Follow(LogitsProcessor):
    """Notes the token that the logits choose, then makes `generate` take the given one instead."""

    def __init__(self, text: Tensor) -> None:
        self.text = text
        self.chosen: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Force the next token of the text: `int64[1, n]`, `float32[1, V]`."""
        self.chosen.append(int(scores[0].argmax()))
        forced = torch.full_like(scores, float("-inf"))
        forced[0, self.text[len(self.chosen) - 1]] = 0.0
        return forced


def greedy(
    model: Any, ids: Tensor, tokens: int, follow: Follow | None = None
) -> tuple[Tensor, Tensor]:
    """Greedy continuation of `int64[1, n]`, `int64[t]`, and the states that chose it, `[t, d]`."""
    states: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, arguments: states.append(arguments[0].reshape(-1, arguments[0].shape[-1])[-1])
    )
    try:
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(max_new_tokens=tokens, pad_token_id=0),  # no stop
            logits_processor=LogitsProcessorList([] if follow is None else [follow]),
        )
    finally:
        hook.remove()
    return out[0, ids.shape[1] :], torch.stack(states)


def differences(
    model: Any, attachment: Attachment, prompts: list[Tensor], tokens: int
) -> list[Difference]:
    """Every token at which `generate` with FlashHead would leave the dense head's text.

    Both decode the same text: FlashHead's choice is noted at every step, then the dense head's
    token is taken, so one rounding does not hide what follows. The hidden states must be equal to
    the bit.

    Args:
        model: with the attached FlashHead.
        attachment: its handle; FlashHead is attached again at the end.
        prompts: `int64[1, n]` each.
        tokens: to generate for each prompt.
    """
    head = attachment.head
    weight = head.weight.float()
    attachment.detach()
    wanted = [greedy(model, prompt, tokens) for prompt in prompts]
    model.set_output_embeddings(head)
    found = []
    for number, (prompt, (dense, states)) in enumerate(zip(prompts, wanted, strict=True)):
        follow = Follow(dense)
        text, same_states = greedy(model, prompt, tokens, follow)
        assert torch.equal(text, dense)
        assert torch.equal(states, same_states), "the body is not deterministic"
        for step, flash in enumerate(follow.chosen):
            if flash == dense[step]:
                continue
            logits = weight @ states[step].float()
            exact = int(logits.argmax())
            gap = float(logits[exact] - logits[dense[step]])
            found.append(Difference(number, step, int(dense[step]), flash, exact, gap))
    return found
