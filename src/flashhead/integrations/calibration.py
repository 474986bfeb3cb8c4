"""Hidden states of text that the model samples from itself: calibration without a data set.

Sampling one token after another is slow on a CPU: each step reads all weights for few rows. The
quick way takes two passes over whole sequences: random tokens, then, at every position at once,
what the model says follows. Each token is then likely after the one before it, not after the whole
text; what shapes an index, where hidden states vary, comes out nearly alike (docs/log.md).
"""

from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

SEQUENCE_TOKENS = 64
"""Tokens a sequence: the cost is one decoding step a token whatever the batch, so sequences are
many and short."""

QUICK_TOKENS = 768
"""Of the quick way, for any model."""


class _Tick(StoppingCriteria):
    """Never stops; moves a progress bar by the tokens of a step."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # noqa: ARG002
        self.bar.update(len(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.inference_mode()
def sample_hidden_states(
    model: PreTrainedModel, tokens: int, seed: int, progress: bool = False
) -> Tensor:
    """Sample text at temperature 1 from the model and return what enters its head.

    Args:
        model: a causal LM; its state and the global random state are left as they were.
        tokens: about how many hidden states (rounded up to whole sequences); 0: none.
        seed: of the sampling.
        progress: show a progress bar on stderr.

    Returns:
        `[n, d]` in the model's dtype, in the order of sampling.
    """
    head = model.get_output_embeddings()
    if tokens == 0:
        return head.weight.new_empty(0, head.weight.shape[1])
    states: list[Tensor] = []

    def keep(_: Any, arguments: tuple[Tensor, ...]) -> None:
        states.append(arguments[0].detach().reshape(-1, arguments[0].shape[-1]).clone())

    hook = head.register_forward_pre_hook(keep)
    try:
        _sample(model, tokens, seed, progress)
    finally:
        hook.remove()
    return torch.cat(states)


@torch.inference_mode()
def quick_hidden_states(model: PreTrainedModel, seed: int) -> Tensor:
    """What enters a model's head on `QUICK_TOKENS` tokens that it samples in two passes.

    Args:
        model: a causal LM; its state and the global random state are left as they were. Its logits
            of all these tokens are in memory at once.
        seed: of the sampling.

    Returns:
        `[QUICK_TOKENS, d]` in the model's dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, head = QUICK_TOKENS // SEQUENCE_TOKENS, model.get_output_embeddings()
    vocab_size = head.weight.shape[0]
    ids = torch.randint(0, vocab_size, (rows, SEQUENCE_TOKENS), generator=generator)
    ids[:, 0] = _first_token(model)
    states: list[Tensor] = []

    def keep(_: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states.append(arguments[0].detach().reshape(-1, arguments[0].shape[-1]).clone())
        return (arguments[0][:, :1],)

    was_training = model.training
    model.eval()
    try:
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits
        for row, own in zip(ids, logits, strict=True):
            below = torch.softmax(own[:-1].float(), 1).cumsum(1)
            drawn = torch.rand(len(below), 1, generator=generator).to(below.device)
            tokens = torch.searchsorted(below, drawn * below[:, -1:])[:, 0]
            row[1:] = tokens.clamp_(max=vocab_size - 1)
        hook = head.register_forward_pre_hook(keep)
        try:
            model(input_ids=ids.to(model.device), use_cache=False)
        finally:
            hook.remove()
    finally:
        model.train(was_training)
    return states[0]


@torch.inference_mode()
def sample_windows(
    model: PreTrainedModel, tokens: int, seed: int, progress: bool = False
) -> list[Tensor]:
    """Sample text at temperature 1 from the model.

    Args:
        model: a causal LM; its state and the global random state are left as they were.
        tokens: about how many, 1 or more (rounded up to whole sequences).
        seed: of the sampling.
        progress: show a progress bar on stderr.

    Returns:
        `int64[length + 1]` a sequence, the token that a text starts with first.
    """
    return list(_sample(model, tokens, seed, progress).cpu())


def _sample(model: PreTrainedModel, tokens: int, seed: int, progress: bool) -> Tensor:
    """Sequences of sampled tokens behind their first one: `int64[batch, 1 + length]`."""
    length = min(SEQUENCE_TOKENS, tokens)
    batch = -(-tokens // length)
    was_training = model.training
    model.eval()
    bar = tqdm(
        total=batch * length, desc="sampling", unit="token", disable=not progress, leave=False
    )
    try:
        with torch.random.fork_rng(devices=[]), bar:
            torch.manual_seed(seed)
            ids = generate_text(model, batch, length, bar)
    finally:
        model.train(was_training)
    return ids


def generate_text(model: PreTrainedModel, rows: int, tokens: int, bar: Any) -> Tensor:
    """Text at temperature 1 behind the token that a text starts with: `int64[rows, 1 + tokens]`.

    Args:
        model: in eval mode; the global random state decides.
        rows: texts.
        tokens: of each; what follows an end of text is of no meaning.
        bar: a progress bar, moved by the tokens of a step.
    """
    start = torch.full((rows, 1), _first_token(model), device=model.device)
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=tokens,
        pad_token_id=0,
        use_cache=True,
    )
    ids: Tensor = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        generation_config=config,
        stopping_criteria=StoppingCriteriaList([_Tick(bar)]),
    )
    return ids


def _first_token(model: PreTrainedModel) -> int:
    """The token a text starts with: BOS, else end of text, which separates documents, else 0."""
    text = model.config.get_text_config()
    for name in ("bos_token_id", "eos_token_id"):
        value = getattr(text, name, None)
        if isinstance(value, (list, tuple)):
            value = value[0] if value else None
        if value is not None:
            return int(value)
    return 0
