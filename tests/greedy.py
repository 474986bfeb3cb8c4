"""Compare greedy decoding of two heads token by token, and explain every token that differs."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

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
        """Whether the dense bf16 head itself lost the winner by rounding, and FlashHead found it."""
        return self.flash == self.exact and self.dense != self.exact


def greedy(model: Any, ids: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Greedy continuation of `int64[1, n]` and the hidden states that chose it: `int64[t]`, `[t, d]`."""
    states: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, arguments: states.append(arguments[0].reshape(-1, arguments[0].shape[-1])[-1])
    )
    try:
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            repetition_penalty=1.0,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            pad_token_id=0,
        )
    finally:
        hook.remove()
    return out[0, ids.shape[1] :], torch.stack(states)


def differences(
    model: Any, attachment: Attachment, prompts: list[Tensor], tokens: int
) -> list[Difference]:
    """Every place where `generate` with FlashHead leaves the dense head's text.

    After a difference the comparison goes on from the dense text, so that one rounding does not hide what follows.

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
        start = 0
        while start < tokens:
            text = torch.cat([prompt[0], dense[:start]])[None]
            flash, _ = greedy(model, text, tokens - start)
            unequal = (flash != dense[start:]).nonzero()
            if not len(unequal):
                break
            step = start + int(unequal[0])
            logits = weight @ states[step].float()
            exact = int(logits.argmax())
            gap = float(logits[exact] - logits[dense[step]])
            found.append(
                Difference(number, step, int(dense[step]), int(flash[step - start]), exact, gap)
            )
            start = step + 1
    return found
