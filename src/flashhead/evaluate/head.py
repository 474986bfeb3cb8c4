"""How often, and how far, a head departs from the model's own float32 logits, on real text.

The model reads the text once; the hidden states that enter its output embedding are caught there
and every method scores the same ones. With p = softmax(float32 logits of the model's weights) and
q = softmax(logits of the method):

    agreement  share of positions where the method's argmax is an argmax of p (ties: any of them)
    kl         mean of sum_v p_v (ln p_v - ln q_v), nats
    tv         mean of sum_v |p_v - q_v| / 2

Softmax and sums are float64. The truth is float32 and not the model's own bf16 product, because
bf16 logits tie: on Gemma 3 270M the two best bf16 logits are equal at one position in thirty.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor
from tqdm import tqdm

from flashhead.environment import provenance
from flashhead.errors import FlashHeadError
from flashhead.evaluate.baselines import QuantizedHead, float32_logits, quantize_head
from flashhead.evaluate.capture import Postprocess, hidden_states
from flashhead.evaluate.metrics import Reference, Totals, top_ties
from flashhead.evaluate.text import WINDOW_TOKENS, read_documents, token_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from flashhead.nn.output import HeadOutput

CHUNK_LOGITS = 2**25
"""Logits of one method held at a time (128 MB of float32)."""


class SearchHead(Protocol):
    """What is asked of a head: `flashhead.nn.head.FlashHead` is one."""

    weight: Tensor
    bias: Tensor | None
    kind: str
    index: Any

    def search(self, hidden: Tensor) -> "HeadOutput":
        """Logits of `bf16/f32[n, d]` through the index, and what was counted."""

    def dense(self, hidden: Tensor) -> Tensor:
        """Logits of `bf16/f32[n, d]` in the dtype of the weight."""


@dataclasses.dataclass
class _Scores:
    """Logits of one method for n rows, and what it counted (None: all of the head is read)."""

    logits: Tensor
    bytes_read: Tensor
    candidates: Tensor | None = None
    certified: Tensor | None = None


def evaluate_head(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    text_file: Path,
    positions: int,
    *,
    seed: int = 0,
    progress: bool = True,
    postprocess: Postprocess | None = None,
) -> dict[str, Any]:
    """Compare FlashHead, and the bf16, int8 and int4 dense heads, with float32 logits on a text.

    Args:
        model: whose output embedding is a FlashHead with an index.
        tokenizer: of the model.
        text_file: `.txt` or `.jsonl`.
        positions: hidden states to measure.
        seed: of the windows drawn from the text.
        progress: show a bar on stderr.
        postprocess: what the model does to logits after its head, None: nothing. It is
            `integrations.transformers.logit_postprocess(model.config)`; checked on one window.

    Returns:
        JSON document: FlashHead's figures, `methods` with a row each, and where they come from.

    Raises:
        FlashHeadError: no index, a text that cannot be used, or the wrong `postprocess`.
    """
    started = time.perf_counter()
    head = _search_head(model)
    windows = token_windows(
        read_documents(Path(text_file)),
        tokenizer,
        positions,
        window_tokens=_window_tokens(model),
        seed=seed,
    )
    finish = postprocess or _identity
    methods = _methods(head)
    totals = {name: Totals() for name in methods}
    truth_ties = 0
    chunk_rows = max(1, CHUNK_LOGITS // head.weight.shape[0])
    bar = tqdm(total=positions, desc="eval head", unit="pos", file=sys.stderr, disable=not progress)
    with bar, torch.inference_mode():
        for hidden in hidden_states(model, windows, tokenizer.bos_token_id, finish):
            for chunk in hidden.split(chunk_rows):
                truth_ties += _measure_chunk(head, methods, totals, chunk, finish)
                bar.update(len(chunk))
    rows = {name: total.row(_dense_bytes(head)) for name, total in totals.items()}
    return {
        **rows["flashhead"],
        "model": str(getattr(model, "name_or_path", "") or type(model).__name__),
        "head": head.kind,
        "options": _options(head.index),
        "data": str(text_file),
        "positions": positions,
        "window_tokens": _window_tokens(model),
        "seed": seed,
        "dense_bf16_ties": rows["bf16"]["ties"],
        "truth_ties": truth_ties / positions,
        "methods": rows,
        **provenance(),
        "seconds": time.perf_counter() - started,
    }


def _search_head(model: "PreTrainedModel") -> SearchHead:
    head = model.get_output_embeddings()
    if getattr(head, "index", None) is None:
        raise FlashHeadError(
            f"model with a {type(head).__name__} as its head: wanted a FlashHead with an index; "
            'load it with head="codes" or head="clusters"'
        )
    return cast(SearchHead, head)


def _window_tokens(model: "PreTrainedModel") -> int:
    return min(
        WINDOW_TOKENS, getattr(model.config, "max_position_embeddings", None) or WINDOW_TOKENS
    )


def _options(index: Any) -> dict[str, Any]:
    options = getattr(index, "options", None)
    return (
        dataclasses.asdict(options)
        if dataclasses.is_dataclass(options) and not isinstance(options, type)
        else {}
    )


def _identity(logits: Tensor) -> Tensor:
    return logits


def _dense_bytes(head: SearchHead) -> int:
    bias = 0 if head.bias is None else head.bias.numel()
    return 2 * (head.weight.numel() + bias)


def _methods(head: SearchHead) -> dict[str, Callable[[Tensor], _Scores]]:
    """Every row of the table as a function of `bf16/f32[n, d]` hidden states."""

    def flashhead(hidden: Tensor) -> _Scores:
        output = head.search(hidden)
        return _Scores(output.logits, output.bytes_read, output.candidates, output.certified)

    def bf16(hidden: Tensor) -> _Scores:
        return _Scores(head.dense(hidden), torch.full((len(hidden),), _dense_bytes(head)))

    def quantized(rounded: QuantizedHead) -> Callable[[Tensor], _Scores]:
        return lambda hidden: _Scores(
            rounded.logits(hidden), torch.full((len(hidden),), rounded.bytes_read)
        )

    return {
        "flashhead": flashhead,
        "bf16": bf16,
        "int8": quantized(quantize_head(head.weight, 8, bias=head.bias)),
        "int4": quantized(quantize_head(head.weight, 4, 32, bias=head.bias)),
    }


def _measure_chunk(
    head: SearchHead,
    methods: dict[str, Callable[[Tensor], _Scores]],
    totals: dict[str, Totals],
    hidden: Tensor,
    postprocess: Postprocess,
) -> int:
    """Add one chunk of every method; returns the rows whose two best float32 logits tie."""
    truth = Reference(postprocess(float32_logits(hidden, head.weight, head.bias)))
    for name, method in methods.items():
        scores = method(hidden)
        _measure(name, totals[name], truth, postprocess(scores.logits), scores)
    return int(top_ties(truth.logits).sum())


def _measure(name: str, totals: Totals, truth: Reference, logits: Tensor, scores: _Scores) -> None:
    """Add one chunk of one method; `logits: [n, V]` are its scores as the sampler sees them."""
    if logits.shape != truth.logits.shape:
        wanted = tuple(truth.logits.shape)
        raise RuntimeError(f"{name}: logits of shape {tuple(logits.shape)}, wanted {wanted}")
    kl, tv = truth.divergences(logits)
    if not bool(torch.isfinite(kl).all()):
        raise RuntimeError(
            f"{name}: a logit is NaN or infinite; every token must have a finite one"
        )
    totals.add(agree=truth.agrees(logits), kl=kl, tv=tv, ties=top_ties(logits))
    totals.add(bytes_read=scores.bytes_read)
    if scores.candidates is not None:
        totals.add(candidates=scores.candidates)
    if scores.certified is not None:
        totals.add(certified=scores.certified)


def format_table(document: dict[str, Any]) -> str:
    """The methods side by side, for people; `document` is what `evaluate_head` returned."""
    names = (
        "method",
        "agreement",
        "KL (nats)",
        "TV",
        "bytes",
        "candidates mean/p50/p99",
        "certified",
    )
    lines = [names]
    for name, row in document["methods"].items():
        searched = row["candidates_mean"] is not None
        counts = (
            [f"{row[f'candidates_{part}']:,.0f}" for part in ("mean", "p50", "p99")]
            if searched
            else []
        )
        lines.append(
            (
                f"{name} ({document['head']})" if searched else f"{name} dense",
                f"{row['agreement']:.2%} +- {row['agreement_stderr']:.2%}",
                f"{row['kl']:.2e} +- {row['kl_stderr']:.0e}",
                f"{row['tv']:.4f}",
                f"{row['bytes_fraction']:.1%}",
                " / ".join(counts) or "all",
                f"{row['certified_fraction']:.1%}" if searched else "-",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    notes = (
        f"{document['positions']:,} positions of {document['data']}; "
        f"the two best bf16 logits tie at {document['dense_bf16_ties']:.1%}"
    )
    return "\n".join([f"{document['model']}: against float32 logits", *table, notes])
