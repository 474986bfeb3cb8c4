"""How often, and how far, a head departs from the model's own float32 logits, on real text.

The model reads the text once; the hidden states that enter its output embedding are caught there
and every method scores the same ones. With p = softmax(float32 logits of the model's weights) and
q = softmax(logits of the method):

    agreement  share of positions where the method's argmax is an argmax of p (ties: any of them)
    kl         mean of sum_v p_v (ln p_v - ln q_v), nats
    tv         mean of sum_v |p_v - q_v| / 2

Softmax and sums are float64 unless float32 is asked for (`metrics` bounds what that changes). The
truth is float32 and not the model's own bf16 product, because bf16 logits tie: on Gemma 3 270M the
two best bf16 logits are equal at one position in thirty.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from flashhead.environment import provenance
from flashhead.errors import FlashHeadError
from flashhead.evaluate.capture import Postprocess, hidden_states
from flashhead.evaluate.measure import measure
from flashhead.evaluate.methods import FAILURE_PROBABILITY, SearchHead, families
from flashhead.evaluate.text import WINDOW_TOKENS, read_documents, token_windows
from flashhead.method_names import TABLE_METHODS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate_head(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    text_file: Path,
    positions: int,
    *,
    methods: Sequence[str] = TABLE_METHODS,
    calibration: Tensor | None = None,
    seed: int = 0,
    precision: torch.dtype = torch.float64,
    failure_probability: float = FAILURE_PROBABILITY,
    progress: bool = True,
    postprocess: Postprocess | None = None,
) -> dict[str, Any]:
    """Compare FlashHead and other heads with float32 logits on a text.

    Args:
        model: whose output embedding is a FlashHead with an index.
        tokenizer: of the model.
        text_file: `.txt` or `.jsonl`.
        positions: hidden states to measure.
        methods: names of `method_names.METHODS`.
        calibration: floating `[n, d]`, hidden states sampled from the model, for methods that build
            an index of their own.
        seed: of the windows drawn from the text.
        precision: of the metrics, float64 or float32.
        failure_probability: of the method "certified".
        progress: show a bar on stderr.
        postprocess: what the model does to logits after its head, None: nothing. It is
            `integrations.transformers.logit_postprocess(model.config)`; checked on one window.

    Returns:
        JSON document: FlashHead's figures, `methods` with a row each, and where they come from;
        with the method "certified" also `failure_probability`, `certified_agreement`,
        `certified_bytes_fraction`, and its `certified_wrong` and `fallback_fraction`.

    Raises:
        FlashHeadError: no index, an unknown method, a text that cannot be used, or the wrong
            `postprocess`.
    """
    started = time.perf_counter()
    head = _search_head(model)
    windows = token_windows(
        read_documents(Path(text_file)),
        tokenizer,
        positions,
        window_tokens=window_tokens_of(model),
        seed=seed,
    )
    finish = postprocess or _identity
    measured = measure(
        head,
        families(head, methods, calibration, progress, failure_probability),
        hidden_states(model, windows, tokenizer.bos_token_id, finish),
        positions,
        finish,
        precision=precision,
        progress=progress,
    )
    rows = measured.pop("methods")
    return {
        **_without_place(rows.get("flashhead", {})),
        **_certified(rows, failure_probability),
        "model": str(getattr(model, "name_or_path", "") or type(model).__name__),
        "head": head.kind,
        "options": _options(head.index),
        "data": str(text_file),
        "positions": positions,
        "window_tokens": window_tokens_of(model),
        "seed": seed,
        "dense_bf16_ties": rows["bf16"]["ties"] if "bf16" in rows else None,
        **measured,
        "methods": rows,
        **provenance(),
        "seconds": time.perf_counter() - started,
    }


def _without_place(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("series", "point")}


def _certified(rows: dict[str, Any], failure_probability: float) -> dict[str, Any]:
    """What the certified tokens add to the document, where they were measured."""
    if "certified" not in rows:
        return {}
    row = rows["certified"]
    return {
        "failure_probability": failure_probability,
        "certified_agreement": row["agreement"],
        "certified_bytes_fraction": row["bytes_fraction"],
        "certified_wrong": row["certified_wrong"],
        "fallback_fraction": row["fallback_fraction"],
    }


def _search_head(model: "PreTrainedModel") -> SearchHead:
    head = model.get_output_embeddings()
    if getattr(head, "index", None) is None:
        raise FlashHeadError(
            f"model with a {type(head).__name__} as its head: wanted a FlashHead with an index; "
            'load it with head="codes" or head="clusters"'
        )
    return cast(SearchHead, head)


def window_tokens_of(model: "PreTrainedModel") -> int:
    """Tokens of a window of text: the usual number, or the model's context if that is shorter."""
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
        "wrong",
        "fallback",
    )
    lines = [names]
    for name, row in document["methods"].items():
        counted = row["candidates_mean"] is not None
        counts = [f"{row[f'candidates_{part}'] or 0:,.0f}" for part in ("mean", "p50", "p99")]
        lines.append(
            (
                _label(name, row, document["head"]),
                f"{row['agreement']:.2%} +- {row['agreement_stderr']:.2%}",
                "-" if row["kl"] is None else f"{row['kl']:.2e} +- {row['kl_stderr']:.0e}",
                "-" if row["tv"] is None else f"{row['tv']:.4f}",
                f"{row['bytes_fraction']:.1%}",
                " / ".join(counts) if counted else "all" if row["series"] == "dense" else "-",
                "-" if row["certified_fraction"] is None else f"{row['certified_fraction']:.1%}",
                "-" if row["certified_wrong"] is None else f"{row['certified_wrong']:,}",
                "-" if row["fallback_fraction"] is None else f"{row['fallback_fraction']:.2%}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    notes = f"{document['positions']:,} positions of {document['data']}"
    if document["dense_bf16_ties"] is not None:
        notes += f"; the two best bf16 logits tie at {document['dense_bf16_ties']:.1%}"
    return "\n".join([f"{document['model']}: against float32 logits", *table, notes])


def _label(name: str, row: dict[str, Any], kind: str) -> str:
    if name == "flashhead":
        return f"flashhead ({kind})"
    if name == "certified":
        return f"certified greedy ({row['point']})"
    return f"{name} dense" if row["series"] == "dense" else name
