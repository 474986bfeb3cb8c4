"""Greedy `generate` that asks the head for its winner only.

    flashhead.generate_certified(model, **inputs, max_new_tokens=64, streamer=streamer)

The certified token reads less than complete logits do. transformers' own loop runs (by its hook
`custom_generate`), so caches, batches, end tokens, stopping criteria, streamers and compiled models
are as always; for its argmax the head hands over zeros with a one at the winner. Whatever would
look at logits is refused.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation import LogitsProcessorList

from flashhead.errors import FlashHeadError
from flashhead.nn.head import FlashHead

_LOOKS = ("output_scores", "output_logits")
"""Fields of a GenerationConfig that ask for logits."""


class WinnerHead(nn.Module):
    """Stands in for a FlashHead: zeros, and a one at the token that wins.

    Args:
        head: a FlashHead. Rows beyond its crossover for tokens take its dense product.
    """

    def __init__(self, head: FlashHead) -> None:
        super().__init__()
        self.head = head
        self.train(head.training)

    @property
    def weight(self) -> Tensor:
        """The head's own."""
        return self.head.weight

    def forward(self, hidden: Tensor) -> Tensor:
        """Of hidden states `[n, t, d]`, for the last position of each: float32[n, 1, V]."""
        last = hidden[:, -1]
        marks = torch.zeros(len(last), self.head.out_features, device=hidden.device)
        return marks.scatter_(1, self._winners(last)[:, None].to(hidden.device), 1.0)[:, None]

    def _winners(self, hidden: Tensor) -> Tensor:
        head = self.head
        finite = head.device_search is not None or bool(torch.isfinite(hidden).all())
        if head.searches_tokens and len(hidden) <= head.token_crossover_rows and finite:
            return head.next_token(hidden).tokens
        head.stats.add_dense(len(hidden), head.dense_bytes)
        return head.dense(hidden).argmax(1)


def generate_certified(
    model: PreTrainedModel, inputs: Tensor | None = None, *, streamer: Any = None, **settings: Any
) -> Tensor:
    """`model.generate`, greedy, each token the winner of the float32 logits, with a certificate.

    A batch beyond the head's crossover for tokens takes the dense product, as `generate` does.

    Args:
        model: its output embedding is a FlashHead with an index of codes.
        inputs: `int64[n, t]`, or by name in `settings`.
        streamer: as `generate` takes it.
        settings: of `generate`; `do_sample` is False unless given.

    Returns:
        `int64[n, t + new]`, or what `return_dict_in_generate` asks for.

    Raises:
        FlashHeadError: the model has no such head, or the call wants more than greedy tokens.
    """

    def decode(
        model: Any, input_ids: Tensor, logits_processor: Any, generation_config: Any, **rest: Any
    ) -> Any:
        _require_greedy(model, logits_processor, generation_config)
        if streamer is not None:  # transformers hands none to a function of ours
            streamer.put(input_ids.cpu())
        with winners_only(model):
            return model._sample(
                input_ids,
                logits_processor=logits_processor,
                generation_config=generation_config,
                streamer=streamer,
                **rest,
            )

    settings.setdefault("do_sample", False)
    tokens: Tensor = model.generate(inputs, custom_generate=decode, **settings)
    return tokens


@contextlib.contextmanager
def winners_only(model: PreTrainedModel) -> Iterator[None]:
    """The model with a `WinnerHead` in place of its FlashHead."""
    head = model.get_output_embeddings()
    model.set_output_embeddings(WinnerHead(head))
    try:
        yield
    finally:
        model.set_output_embeddings(head)


def _require_greedy(model: Any, processors: LogitsProcessorList, config: Any) -> None:
    head = model.get_output_embeddings()
    if not isinstance(head, FlashHead) or not head.searches_tokens:
        kind = getattr(head, "kind", type(head).__name__)
        raise FlashHeadError(
            f"generate_certified: the output embedding is {kind}, wanted a FlashHead of codes"
        )
    if model.config.is_encoder_decoder:
        raise FlashHeadError("generate_certified: wanted a decoder-only model")
    if config.do_sample or config.num_beams != 1:
        raise FlashHeadError("generate_certified: wanted do_sample=False and num_beams=1")
    for name in _LOOKS:
        if getattr(config, name):
            raise FlashHeadError(f"generate_certified computes no logits: {name} is not supported")
    if len(processors):
        names = ", ".join(type(one).__name__ for one in processors)
        raise FlashHeadError(
            f"generate_certified computes no logits: {names} would edit them; call "
            "model.generate, or unset what asks for it (also in the model's generation_config)"
        )
