"""Edits: what changes logits before a token is chosen, and for which rows.

The search bounds the logits of all rows that it does not score, so an edit must say which rows it
touches. There are two kinds:

- **Few rows** (penalties, logit bias, sequence bias, bad words of several tokens): these rows are
  scored exactly whatever the search finds and are edited then; all others keep their bounds.
- **All rows** (allowed words, a grammar): a mask of 0 and -inf, which the search adds to the bias
  of the head, so that forbidden rows have estimate, bound and probability 0. Few allowed rows (at
  most V / 32, where gathering them reads less than a scan) are scored directly instead.

Order and float32 arithmetic are those of transformers' processors: sequence bias, repetition
penalty, masks; frequency and presence penalties, which transformers lacks, follow the repetition
penalty as in vLLM. A mask may come first, because penalties leave -inf as it is.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from flashhead.errors import FlashHeadError
from flashhead.options import Sampling

DIRECT_SHARE = 32
"""Up to V / 32 allowed rows are scored one by one: 3 % of the head's bytes."""


def penalised(
    logits: Tensor, rows: Tensor, previous: Tensor, sampling: Sampling, prompt_length: int = 0
) -> Tensor:
    """Apply the three penalties.

    Equals transformers' RepetitionPenaltyLogitsProcessor, then
    `logits - frequency_penalty * counts - presence_penalty * (counts > 0)` with counts over
    `previous[prompt_length:]`.

    Args:
        logits: `float32[k]`.
        rows: `int64[k]`, their token ids, each once.
        previous: `int64[t]`, tokens so far, prompt first.
        sampling: the penalties.
        prompt_length: tokens of the prompt, which only the repetition penalty counts.

    Returns:
        `float32[k]`.
    """
    if sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        changed = torch.where(logits < 0, logits * penalty, logits / penalty)
        logits = torch.where(torch.isin(rows, previous), changed, logits)
    if sampling.frequency_penalty != 0 or sampling.presence_penalty != 0:
        counts = occurrences(rows, previous[prompt_length:])
        logits = logits - sampling.frequency_penalty * counts
        logits = logits - sampling.presence_penalty * (counts > 0)
    return logits


def occurrences(rows: Tensor, tokens: Tensor) -> Tensor:
    """How often each of `rows` occurs in `tokens`: int64[k]."""
    kinds, counts = torch.unique(tokens, return_counts=True)
    if kinds.numel() == 0:
        return torch.zeros_like(rows)
    place = torch.searchsorted(kinds, rows).clamp(max=kinds.numel() - 1)
    return torch.where(kinds[place] == rows, counts[place], 0)


def sequence_bias(
    previous: Tensor, biases: Mapping[tuple[int, ...], float]
) -> tuple[Tensor, Tensor]:
    """Bias of the next token; equals transformers' SequenceBiasLogitsProcessor.

    A sequence biases its last token when `previous` ends with all that comes before it. A logit
    bias is a sequence of one token; a bad word is a sequence with bias -inf.

    Args:
        previous: `int64[t]`, tokens so far.
        biases: token sequence: finite bias, or -inf.

    Returns:
        Rows `int64[m]`, each once and ascending, and their summed biases `float32[m]`.

    Raises:
        FlashHeadError: an empty sequence, a negative token, or a bias that is NaN or +inf.
    """
    ending = previous.tolist()
    hits: list[tuple[int, float]] = []
    for sequence, bias in sorted(biases.items(), key=lambda item: len(item[0])):
        if not sequence or min(sequence) < 0:
            raise FlashHeadError(f"bias of sequence {sequence}: wanted one or more token ids >= 0")
        if not bias < float("inf"):
            raise FlashHeadError(f"bias {bias} of sequence {sequence}: wanted finite or -inf")
        start, last = sequence[:-1], sequence[-1]
        if not start or tuple(ending[-len(start) :]) == tuple(start):
            hits.append((last, bias))
    tokens = torch.tensor([token for token, _ in hits], dtype=torch.int64)
    values = torch.tensor([bias for _, bias in hits], dtype=torch.float32)
    rows, place = torch.unique(tokens, return_inverse=True)
    return rows, torch.zeros(rows.shape[0], dtype=torch.float32).index_add_(0, place, values)


def biased(logits: Tensor, rows: Tensor, bias_rows: Tensor, bias: Tensor) -> Tensor:
    """Add the bias of some rows: float32[k].

    Args:
        logits: `float32[k]` of `rows: int64[k]`.
        rows: token ids, each once.
        bias_rows: `int64[m]`, ascending.
        bias: `float32[m]`.
    """
    if bias_rows.numel() == 0:
        return logits
    place = torch.searchsorted(bias_rows, rows).clamp(max=bias_rows.numel() - 1)
    return torch.where(bias_rows[place] == rows, logits + bias[place], logits)


def edited_rows(
    previous: Tensor, bias_rows: Tensor, sampling: Sampling, vocab_size: int, prompt_length: int = 0
) -> Tensor:
    """Rows whose logit the edits change: int64[m] ascending. The search scores them exactly."""
    parts = [bias_rows]
    if sampling.repetition_penalty != 1:
        parts.append(previous)
    elif sampling.penalises:
        parts.append(previous[prompt_length:])
    rows = torch.unique(torch.cat(parts))
    return rows[rows < vocab_size]


def allowed_mask(vocab_size: int, rows: Tensor) -> Tensor:
    """Mask that forbids all rows but some: float32[V] of 0 and -inf."""
    return torch.full((vocab_size,), -torch.inf, dtype=torch.float32).index_fill_(0, rows, 0)


def banned_mask(vocab_size: int, rows: Tensor) -> Tensor:
    """Mask that forbids some rows: float32[V] of 0 and -inf."""
    return torch.zeros(vocab_size, dtype=torch.float32).index_fill_(0, rows, -torch.inf)


def unpack_bitmask(bitmask: Tensor, vocab_size: int) -> Tensor:
    """Mask of a grammar's packed bits, row v allowed by bit v mod 32 of word v div 32.

    Args:
        bitmask: `int32[ceil(V / 32)]`, as xgrammar and llguidance fill it.
        vocab_size: V.

    Returns:
        `float32[V]` of 0 and -inf.

    Raises:
        FlashHeadError: another type or size.
    """
    words = -(-vocab_size // 32)
    if bitmask.dtype != torch.int32 or bitmask.shape != (words,):
        got = f"{bitmask.dtype} {list(bitmask.shape)}"
        raise FlashHeadError(f"bitmask is {got}: wanted torch.int32 [{words}]")
    bits = (bitmask[:, None] >> torch.arange(32, dtype=torch.int32)) & 1
    return torch.where(bits.flatten()[:vocab_size] == 1, 0.0, -torch.inf)


def scores_directly(allowed_rows: int, vocab_size: int) -> bool:
    """Whether so few rows are allowed that scoring them one by one reads less than a search."""
    return allowed_rows * DIRECT_SHARE <= vocab_size
