"""What healing minimises.

Stage a: every latent attention, on the teacher's own hidden states, should give what the teacher's
attention gives: the mean over layers and rows of |difference|^2 / |output|^2. Layers learn alone.
Stage b: KL divergence of the student's next-token distribution from the teacher's, nats a token.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flashhead.nn.latent import LatentAttention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_TOKENS = 2048
"""Tokens whose logits exist at a time."""


def regression(
    teacher: "PreTrainedModel",
    latents: dict[str, LatentAttention],
    rows: Tensor,
    backward: float | None,
) -> float:
    """Stage a on one batch, layer by layer: one layer's graph lives at a time.

    Args:
        teacher: whose modules of the same names are the truth.
        latents: the student's, by name.
        rows: int64[rows, tokens].
        backward: add the gradients of so many times the loss; None: no gradients.
    """
    held: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
            given = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            held[name] = (given, out[0])

        return hook

    handles = [
        teacher.get_submodule(name).register_forward_hook(keep(name), with_kwargs=True)
        for name in latents
    ]
    try:
        with torch.no_grad():
            teacher.base_model(rows, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    total = 0.0
    for name, latent in latents.items():
        given, want = held.pop(name)
        with torch.set_grad_enabled(backward is not None):
            got = latent(given)[0]
            missed = (got.float() - want.float()).square().sum((1, 2))
            loss = (missed / want.float().square().sum((1, 2))).mean()
        if backward is not None:
            (loss * (backward / len(latents))).backward()
        total += float(loss.detach()) / len(latents)
    return total


def distillation(
    teacher: "PreTrainedModel",
    student: "PreTrainedModel",
    rows: Tensor,
    post: Callable[[Tensor], Tensor],
    backward: float | None,
) -> float:
    """Stage b on one batch; logits exist for `CHUNK_TOKENS` tokens at a time.

    Args:
        teacher: the truth.
        student: with a frozen head equal to the teacher's.
        rows: int64[rows, tokens].
        post: what the models do to their head's logits.
        backward: add the gradients of so many times the loss; None: no gradients.
    """
    learning = backward is not None
    with torch.no_grad():
        want = teacher.base_model(rows, use_cache=False).last_hidden_state.flatten(0, 1)
    with torch.set_grad_enabled(learning):
        out = student.base_model(rows, use_cache=False).last_hidden_state.flatten(0, 1)
    # the head is frozen: its backward stops at the hidden states, which go on as one
    states = out.detach().requires_grad_(learning)
    heads = [model.get_output_embeddings() for model in (teacher, student)]
    total = 0.0
    for start in range(0, len(want), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        with torch.no_grad():
            truth = post(heads[0](want[part].to(heads[0].weight.dtype)).float()).log_softmax(-1)
        with torch.set_grad_enabled(learning):
            found = post(heads[1](states[part]).float()).log_softmax(-1)
            loss = functional.kl_div(found, truth, reduction="sum", log_target=True) / len(want)
        if backward is not None:
            (loss * backward).backward()
        total += float(loss.detach())
    if learning:
        out.backward(states.grad)
    return total
