"""Log-probabilities of a text's own tokens, against float32: their error and the perplexity.

At every position the model's distribution gives the next token of the text a log-probability; what
`FlashHead.log_probs` returns is compared with the float32 softmax of the same weights. Also whether
the standard errors it states are its errors, and how far off two cheaper ways are: exact logits
over the normaliser of the complete logits (`draws=0`), and the complete logits themselves.
"""

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from flashhead.environment import provenance
from flashhead.errors import FlashHeadError
from flashhead.evaluate.baselines import float32_logits
from flashhead.evaluate.capture import Postprocess, hidden_states
from flashhead.evaluate.text import WINDOW_TOKENS, read_documents, scored_positions, token_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHUNK_LOGITS = 2**24


def evaluate_logprobs(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    text_file: Path,
    positions: int,
    *,
    seed: int = 0,
    progress: bool = True,
    postprocess: Postprocess | None = None,
) -> dict[str, Any]:
    """Compare log-probabilities and perplexity with the dense float32 head's.

    Args:
        model: whose output embedding is a FlashHead.
        tokenizer: of the model.
        text_file: `.txt` or `.jsonl`.
        positions: tokens to read; the last of each window has no next one.
        seed: of the windows drawn from the text.
        progress: show a bar on stderr.
        postprocess: what the model does to logits after its head, None: nothing; the logits
            compared are the head's own.

    Returns:
        JSON document: `mean_abs_error`, perplexities, `perplexity_change`, `standardised_std`.

    Raises:
        FlashHeadError: the head has no index, or a text that cannot be used.
    """
    started = time.perf_counter()
    head: Any = model.get_output_embeddings()
    if getattr(head, "index", None) is None:
        raise FlashHeadError("a dense head: wanted a FlashHead with an index")
    windows = token_windows(
        read_documents(Path(text_file)),
        tokenizer,
        positions,
        window_tokens=WINDOW_TOKENS,
        seed=seed,
    )
    finish = postprocess or (lambda logits: logits)
    chunk = max(1, CHUNK_LOGITS // head.weight.shape[0])
    truths, ours, stderrs, read = [], [], [], 0
    undrawn, complete = [], []
    bar = tqdm(total=positions, desc="eval logprobs", unit="pos", file=sys.stderr)
    bar.disable = not progress
    head.stats.reset()
    with bar, torch.inference_mode():
        states = hidden_states(model, windows, tokenizer.bos_token_id, finish)
        for hidden, tokens in _labelled(states, windows, tokenizer.bos_token_id):
            for part, wanted in zip(hidden.split(chunk), tokens.split(chunk), strict=True):
                truth = float32_logits(part, head.weight, head.bias)
                best = truth.gather(1, wanted[:, None])[:, 0].double()
                truths.append(best - torch.logsumexp(truth.double(), 1))
                found = head.log_probs(part, wanted)
                ours.append(found.values.double())
                stderrs.append(found.stderr.double())
                logits = head.search(part).logits.double()
                log_z = torch.logsumexp(logits, 1)
                undrawn.append(found.logits.to(log_z.device) - log_z)
                complete.append(logits.gather(1, wanted[:, None])[:, 0] - log_z)
                read += len(part)
                bar.update(len(part))
    truth = torch.cat(truths)
    return {
        "model": str(getattr(model, "name_or_path", "")),
        "head": head.kind,
        "data": str(text_file),
        "positions": read,
        "seed": seed,
        **_summary(truth, torch.cat(ours), torch.cat(stderrs)),
        "without_draws": _errors(truth, torch.cat(undrawn)),
        "complete_logits": _errors(truth, torch.cat(complete)),
        **provenance(),
        "seconds": time.perf_counter() - started,
    }


def _labelled(
    states: Iterator[Tensor], windows: list[Tensor], bos: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states and the tokens that follow them, within each window."""
    for window, hidden in zip(windows, states, strict=True):
        places = scored_positions(window, bos).nonzero()[:, 0]
        kept = places + 1 < len(window)
        if kept.any():
            yield hidden[kept], window[places[kept] + 1]


def _summary(truth: Tensor, ours: Tensor, stderr: Tensor) -> dict[str, float]:
    stated = stderr > 1e-6
    standardised = (ours - truth)[stated] / stderr[stated]
    return {
        "mean_stderr": float(stderr.mean()),
        "standardised_rms": float(standardised.square().mean().sqrt()) if stated.any() else 0.0,
        "perplexity_float32": math.exp(-float(truth.mean())),
        **_errors(truth, ours),
    }


def _errors(truth: Tensor, ours: Tensor) -> dict[str, float]:
    """Of log-probabilities, in nats, and of the perplexity."""
    error, own = ours - truth, math.exp(-float(ours.mean()))
    return {
        "mean_abs_error": float(error.abs().mean()),
        "mean_error": float(error.mean()),
        "max_abs_error": float(error.abs().max()),
        "perplexity": own,
        "perplexity_change": math.expm1(-float(error.mean())),
    }


def format_logprobs(document: dict[str, Any]) -> str:
    """A few lines for people; `document` is what `evaluate_logprobs` returned."""
    return "\n".join(
        [
            f"{document['model']}: log-probabilities of {document['positions']:,} tokens of "
            f"{document['data']}, against float32",
            f"mean absolute error  {document['mean_abs_error']:.2e} nats "
            f"(largest {document['max_abs_error']:.2e}; stated {document['mean_stderr']:.2e})",
            f"perplexity           {document['perplexity']:.4f}, float32 "
            f"{document['perplexity_float32']:.4f}: {document['perplexity_change']:+.4%}",
            *(
                f"{name:<21}mean absolute error {document[key]['mean_abs_error']:.2e} nats, "
                f"perplexity {document[key]['perplexity_change']:+.4%}"
                for name, key in (
                    ("draws=0", "without_draws"),
                    ("complete logits", "complete_logits"),
                )
            ),
        ]
    )
