"""A model against the one it was made from: what quantizing its body changed, on the same tokens.

Both read the same windows; logits of both are float32 products of their own hidden states and
heads. With p the base's softmax and q the variant's: agreement of the argmax, KL(p||q), total
variation, and the perplexity of the text under each, exp(mean of -ln p(next token)).
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashhead.errors import FlashHeadError
from flashhead.evaluate.baselines import float32_logits
from flashhead.evaluate.capture import Postprocess, hidden_states
from flashhead.evaluate.measure import CHUNK_LOGITS, dense_bytes
from flashhead.evaluate.metrics import Reference, Totals, argmax
from flashhead.evaluate.text import scored_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def compare_models(
    model: "PreTrainedModel",
    base: "PreTrainedModel",
    windows: list[Tensor],
    bos: int | None,
    finish: tuple[Postprocess, Postprocess],
) -> dict[str, Any]:
    """Measure how far `model` departs from `base`.

    Args:
        model: the variant.
        base: what it was made from.
        windows: `int64[tokens]` each.
        bos: token that is no position, or None.
        finish: what each model does to logits after its head, the variant's first.

    Returns:
        JSON-able: `positions`, `agreement`, `kl`, `tv` with standard errors, `perplexity`,
        `base_perplexity`, `perplexity_ratio`.

    Raises:
        FlashHeadError: the vocabularies differ in size.
        RuntimeError: a logit of one of them is NaN or infinite.
    """
    heads = [m.get_output_embeddings() for m in (model, base)]
    sizes = [len(head.weight) for head in heads]
    if sizes[0] != sizes[1]:
        raise FlashHeadError(f"a vocabulary of {sizes[0]:,}, the base has {sizes[1]:,}")
    totals = Totals()
    losses: tuple[list[Tensor], list[Tensor]] = ([], [])
    for targets, both in _logits_of_both((model, base), windows, bos, finish):
        truth = Reference(both[1])
        kl, tv = truth.divergences(both[0])
        if not bool(torch.isfinite(kl).all()):
            raise RuntimeError("a logit is NaN or infinite")
        read = torch.full((len(targets),), dense_bytes(heads[0]))
        totals.add(agree=truth.chosen(argmax(both[0])), kl=kl, tv=tv, bytes_read=read)
        for kept, logits in zip(losses, both, strict=True):
            kept.append(_losses(logits, targets))
    row = totals.row(dense_bytes(heads[1]))
    names = ("agreement", "agreement_stderr", "kl", "kl_stderr", "tv")
    perplexity, base_perplexity = (float(torch.cat(kept).mean().exp()) for kept in losses)
    return {
        "positions": sum(map(len, totals.parts["kl"])),
        **{name: row[name] for name in names},
        "perplexity": perplexity,
        "base_perplexity": base_perplexity,
        "perplexity_ratio": perplexity / base_perplexity,
    }


def _logits_of_both(
    models: "tuple[PreTrainedModel, PreTrainedModel]",
    windows: list[Tensor],
    bos: int | None,
    finish: tuple[Postprocess, Postprocess],
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Next tokens `int64[n]` and each model's logits `float32[n, V]`, some positions at a time."""
    heads = [model.get_output_embeddings() for model in models]
    rows = max(1, CHUNK_LOGITS // len(heads[0].weight))
    caught = [hidden_states(m, windows, bos, f) for m, f in zip(models, finish, strict=True)]
    for window, *states in zip(windows, *caught, strict=True):
        targets = _targets(window, bos)
        for part in torch.arange(len(targets)).split(rows):
            yield (
                targets[part],
                [
                    process(float32_logits(hidden[part], head.weight, head.bias).cpu())
                    for process, hidden, head in zip(finish, states, heads, strict=True)
                ],
            )


def _targets(window: Tensor, bos: int | None) -> Tensor:
    """The token after each measured position, -1 after the last: `int64[positions]`."""
    following = torch.cat([window[1:], window.new_full((1,), -1)])
    return following[scored_positions(window, bos)]


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """-ln p(target) where there is one: `float64[at most n]`."""
    there = targets >= 0
    picked = logits[there]
    chosen = picked.gather(1, targets[there, None])[:, 0]
    return (torch.logsumexp(picked, 1) - chosen).double()
