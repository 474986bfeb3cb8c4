"""The next token, certified: greedy or drawn exactly from the dense float32 distribution.

A sample of softmax(l / T) is the argmax of l + T g with Gumbel noise g (`ops/noise`), so drawing is
searching: the noise is a bias of the rows, and the certificate is that of greedy search. Every
answer is certified by the search, else by a wider search, else by the dense product in float32:

- greedy and temperature: one search; noise and mask are its bias.
- a mask that allows at most V / 32 rows: these are scored one by one, without a search.
- penalties and biases of tokens (`Context`): the rows they touch are taken out of the search by a
  bias of -inf, scored exactly, edited, and compared with what the search found.
- top_k, top_p, min_p: all rows within a margin of the best are read exactly, then
  `nn/sampling.py` decides what the filters leave, or cannot: the margin is widened once, then the
  row is completed by the dense product ("fallback").
- typical_p alone: the dense product.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashhead.errors import FlashHeadError
from flashhead.nn.candidates import Candidates, complete
from flashhead.nn.edits import biased as add_bias
from flashhead.nn.edits import edited_rows, penalised, scores_directly, sequence_bias
from flashhead.nn.output import HeadOutput, NextToken
from flashhead.nn.rest import rest_of
from flashhead.nn.sampling import allowed, edited, greedy, sample
from flashhead.ops.noise.api import gumbel, gumbel_at
from flashhead.options import Sampling

if TYPE_CHECKING:
    from flashhead.nn.head import FlashHead

MARGINS = (6.0, 12.0)
"""Nats, times the temperature, below the best row down to which a filtered search reads exactly."""


@dataclasses.dataclass(frozen=True)
class Context:
    """What changes the logits of one hidden state before its token is chosen.

    Args:
        previous: `int64[t]`, tokens so far, prompt first; for penalties and sequence biases.
        prompt_length: how many of them are prompt.
        biases: logit bias of a token sequence's last token after the others; -inf: a bad word.
        mask: `float32[V]` of 0 and -inf, for example of a grammar (`nn.edits.allowed_mask`), or
            None.
    """

    previous: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    prompt_length: int = 0
    biases: Mapping[tuple[int, ...], float] = dataclasses.field(default_factory=dict)
    mask: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class _Edits:
    """Rows that a context touches, and their exact logits after it; the mask is not in them."""

    rows: Tensor  # int64[m]
    logits: Tensor  # float32[m]


def next_token(
    head: "FlashHead",
    hidden: Tensor,
    sampling: Sampling,
    steps: Tensor,
    contexts: list[Context] | None,
    failure_probability: float,
) -> NextToken:
    """Choose a token for each hidden state; see `FlashHead.next_token`."""
    if contexts is None:
        return _searched(head, hidden, sampling, steps, None, failure_probability)
    direct = [_scores_directly(context, head.weight.shape[0]) for context in contexts]
    columns: list[tuple[Tensor, ...]] = []
    for n, context in enumerate(contexts):
        one = slice(n, n + 1)
        if direct[n]:
            columns.append(_directly(head, hidden[n], sampling, steps[one], context))
        else:
            found = _searched(
                head, hidden[one], sampling, steps[one], [context], failure_probability
            )
            columns.append(tuple(getattr(found, f.name) for f in dataclasses.fields(found)))
    return NextToken(*(torch.cat(column) for column in zip(*columns, strict=True)))


def _searched(
    head: "FlashHead",
    hidden: Tensor,
    sampling: Sampling,
    steps: Tensor,
    contexts: list[Context] | None,
    failure_probability: float,
) -> NextToken:
    edits = [_edits_of(head, hidden[n], c, sampling) for n, c in enumerate(contexts or [])]
    if sampling.filters:
        found = [
            _filtered(head, hidden[n : n + 1], sampling, steps[n], own, failure_probability)
            for n, own in enumerate(_pairs(edits, contexts, len(hidden)))
        ]
        return NextToken(*(torch.cat(column) for column in zip(*found, strict=True)))
    bias = _bias_of(head, sampling, steps, contexts, edits, len(hidden))
    output = head.search_rows(
        hidden, bias, failure_probability=failure_probability, winner_only=True
    )
    tokens = output.tokens.clone()
    scores = output.logits.gather(1, tokens[:, None])[:, 0]
    for n, own in enumerate(edits):
        tokens[n] = _better(own, contexts[n], sampling, steps[n], tokens[n], scores[n])  # type: ignore[index]
    return NextToken(
        tokens, output.certified, output.fallback, output.candidates, output.bytes_read
    )


def _scores_directly(context: Context, vocab_size: int) -> bool:
    """Whether the mask allows so few rows that scoring them reads less than a search."""
    if context.mask is None:
        return False
    return scores_directly(int((_mask(context.mask, vocab_size) == 0).sum()), vocab_size)


def _directly(
    head: "FlashHead", hidden: Tensor, sampling: Sampling, step: Tensor, context: Context
) -> tuple[Tensor, ...]:
    """Columns of `NextToken` for a mask that allows few rows: all of them are scored."""
    assert context.mask is not None
    rows = (context.mask == 0).nonzero()[:, 0]
    biased_rows, values = sequence_bias(context.previous, context.biases)
    known = Candidates(rows, head.exact_logits(hidden, rows))
    known = edited(known, context.previous, biased_rows, values, sampling, context.prompt_length)
    if sampling.temperature == 0:
        best = greedy(known)
        assert best is not None
        token = torch.tensor([best])
    else:
        left = allowed(known, sampling)
        assert left is not None
        token = sample(left, sampling, step, impl=head.noise_impl)
    count = torch.tensor([len(rows)])
    read = count * head.weight.shape[1] * head.weight.element_size()
    return token, torch.tensor([True]), torch.tensor([False]), count, read


def _pairs(
    edits: list[_Edits], contexts: list[Context] | None, count: int
) -> list[tuple[_Edits, Context] | None]:
    return [None] * count if contexts is None else list(zip(edits, contexts, strict=True))


def _edits_of(head: "FlashHead", hidden: Tensor, context: Context, sampling: Sampling) -> _Edits:
    vocab_size = head.weight.shape[0]
    rows, values = sequence_bias(context.previous, context.biases)
    if rows.numel() and int(rows.max()) >= vocab_size:
        raise FlashHeadError(f"bias of token {int(rows.max())}: the vocabulary has {vocab_size}")
    touched = edited_rows(context.previous, rows, sampling, vocab_size, context.prompt_length)
    logits = head.exact_logits(hidden, touched)
    logits = add_bias(logits, touched, rows, values)
    logits = penalised(logits, touched, context.previous, sampling, context.prompt_length)
    return _Edits(touched, logits)


def _bias_of(
    head: "FlashHead",
    sampling: Sampling,
    steps: Tensor,
    contexts: list[Context] | None,
    edits: list[_Edits],
    count: int,
) -> Tensor | None:
    """What is added to the logits in the search: float32[n, V] or None."""
    if sampling.temperature == 0 and contexts is None:
        return None
    vocab_size = head.weight.shape[0]
    if sampling.temperature > 0:
        bias = gumbel(sampling.seed, steps, vocab_size, impl=head.noise_impl)
        bias *= sampling.temperature
    else:
        bias = torch.zeros(count, vocab_size, dtype=torch.float32)
    for n, context in enumerate(contexts or []):
        if context.mask is not None:
            bias[n] += _mask(context.mask, vocab_size)
        bias[n, edits[n].rows] = -math.inf
    return bias


def _mask(mask: Tensor, vocab_size: int) -> Tensor:
    forbidden = mask == -math.inf
    if mask.shape != (vocab_size,) or bool((~forbidden & (mask != 0)).any()):
        raise FlashHeadError(
            f"mask is {mask.dtype} {list(mask.shape)}: wanted float32 [{vocab_size}] of 0 and -inf"
        )
    return mask.float()


def _better(
    own: _Edits, context: Context, sampling: Sampling, step: Tensor, token: Tensor, score: Tensor
) -> Tensor:
    """The better of the search's winner and the best edited row; the lower row of equals."""
    logits = own.logits if context.mask is None else own.logits + context.mask[own.rows]
    if sampling.temperature > 0:
        noise = gumbel_at(sampling.seed, int(step), own.rows, impl="reference")
        logits = logits + sampling.temperature * noise
    rows, scores = torch.cat([own.rows, token[None]]), torch.cat([logits, score[None]])
    best = scores.max()
    if best == -math.inf:
        raise FlashHeadError("every token is forbidden: wanted a mask that allows one or more")
    return rows[scores == best].min()


def _filtered(
    head: "FlashHead",
    hidden: Tensor,
    sampling: Sampling,
    step: Tensor,
    own: tuple[_Edits, Context] | None,
    failure_probability: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Columns of `NextToken` for one hidden state `[1, d]`."""
    read = torch.zeros(1, dtype=torch.int64)
    for margin in (*MARGINS, math.inf):
        if margin == math.inf or not head.searches_codes:
            known, output = _complete(head, hidden, own), None
        else:
            known, output = candidates_of(
                head, hidden, sampling, margin * sampling.temperature, own, failure_probability
            )
        read = read + (head.dense_bytes if output is None else output.bytes_read)
        left = allowed(known, sampling, failure_probability)
        if left is not None:
            token = sample(left, sampling, step[None], impl=head.noise_impl)
            dense = torch.tensor([output is None])
            return token, torch.tensor([True]), dense, torch.tensor([len(known.rows)]), read
    raise AssertionError("complete candidates are always decidable")


def _complete(head: "FlashHead", hidden: Tensor, own: tuple[_Edits, Context] | None) -> Candidates:
    logits = head.exact_logits(hidden[0], None)
    if own is not None:
        logits[own[0].rows] = own[0].logits
        if own[1].mask is not None:
            logits = logits + _mask(own[1].mask, len(logits))
    return complete(logits)


def candidates_of(
    head: "FlashHead",
    hidden: Tensor,
    sampling: Sampling,
    margin: float,
    own: tuple[_Edits, Context] | None,
    failure_probability: float,
) -> tuple[Candidates, HeadOutput]:
    """Rows within `margin` nats of the best with exact logits, and what is known of the others.

    Args:
        head: with a codes index.
        hidden: floating `[1, d]`.
        sampling: its temperature above 0.
        margin: nats.
        own: edits and mask, or None.
        failure_probability: of the certificate.
    """
    bias = None
    if own is not None:
        bias = torch.zeros(1, head.weight.shape[0], dtype=torch.float32)
        if own[1].mask is not None:
            bias[0] += _mask(own[1].mask, head.weight.shape[0])
        bias[0, own[0].rows] = -math.inf
    output = head.search_rows(hidden, bias, failure_probability=failure_probability, margin=margin)
    assert output.exact is not None
    assert output.upper is not None
    rows = output.exact[0].long()
    logits = output.logits[0, rows]
    rest, stderr = -math.inf, 0.0
    if sampling.top_p is not None:
        rest, stderr = rest_of(head, hidden[0], output, sampling.temperature, bias)
    possible = logits > -math.inf
    rows, logits = rows[possible], logits[possible]
    if own is not None:
        mask = 0 if own[1].mask is None else own[1].mask[own[0].rows]
        rows = torch.cat([rows, own[0].rows])
        logits = torch.cat([logits, own[0].logits + mask])
    known = Candidates(rows, logits, float(output.upper[0]), rest)
    if stderr:
        peak = max(float(logits.max()) / sampling.temperature, rest)
        inside = float((logits.double() / sampling.temperature - peak).exp().sum())
        share = math.exp(rest - peak) / (inside + math.exp(rest - peak))
        known = dataclasses.replace(known, rest_stderr=stderr * share)
    return known, output
