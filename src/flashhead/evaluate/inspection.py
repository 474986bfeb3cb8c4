"""Whether a head suits a codes index, by what its search and its estimates do on some texts.

Each text is searched as `generate` would (candidates, bytes, certificate), and the texts that
count, `pooled`, are also estimated for every row: the error model and the recall curve.
"""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from flashhead.errors import FlashHeadError
from flashhead.evaluate.capture import Postprocess, hidden_states
from flashhead.evaluate.error_model import ErrorModel, ErrorTotals
from flashhead.evaluate.estimates import Estimates, estimate_chunks
from flashhead.evaluate.recall import Recall, winner_ranks
from flashhead.evaluate.samples import load_samples
from flashhead.evaluate.text import read_documents, scored_positions, token_windows
from flashhead.evaluate.vocabulary import Vocabulary, vocabulary
from flashhead.index.codes import CodesIndex

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from flashhead.nn.head import FlashHead
    from flashhead.nn.output import HeadOutput

SAMPLE_POSITIONS = 256
"""Most positions of one sample."""
DATA = "data"
"""Name of the user's own text."""


@dataclasses.dataclass(frozen=True)
class TextFigures:
    """What the search did on one text.

    Args:
        positions: hidden states searched.
        candidates_mean: rows scored exactly.
        candidates_p50: the same.
        candidates_p99: the same.
        agreement: share whose token is a float32 winner, up to the rounding of float32 products.
        certified_fraction: share that the search certified.
        certified_wrong: certified tokens that are no winner.
        fallback_fraction: share for which so many rows could win that all were scored exactly.
        bytes_fraction: bytes read, as a share of the dense head's.
    """

    positions: int
    candidates_mean: float
    candidates_p50: float
    candidates_p99: float
    agreement: float
    certified_fraction: float
    certified_wrong: int
    fallback_fraction: float
    bytes_fraction: float


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Everything measured on a head.

    Args:
        pooled: names of the texts that `whole`, `errors`, `recall` and `rows` are about.
        texts: figures by text.
        whole: figures of the pooled texts together.
        errors: check of the standard errors.
        recall: ranks of the winners.
        rows: the head's rows and the spread of the hidden states.
    """

    pooled: tuple[str, ...]
    texts: dict[str, TextFigures]
    whole: TextFigures
    errors: ErrorModel
    recall: Recall
    rows: Vocabulary

    def document(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "vocabulary": dataclasses.asdict(self.rows),
            "error_model": self.errors.document(),
            "recall": self.recall.document(),
            "texts": {name: dataclasses.asdict(row) for name, row in self.texts.items()},
            "pooled": list(self.pooled),
            "whole": dataclasses.asdict(self.whole),
        }


def text_windows(
    tokenizer: "PreTrainedTokenizerBase", data: Path | None, positions: int, window_tokens: int
) -> dict[str, list[Tensor]]:
    """Token windows of the samples, and of the user's text if there is one.

    Args:
        tokenizer: of the model.
        data: a `.txt` or `.jsonl` file, or None.
        positions: of the user's text; a sample has at most `SAMPLE_POSITIONS`.
        window_tokens: most tokens a window.

    Raises:
        FlashHeadError: the user's text cannot be read or has fewer tokens.
    """
    windows = {}
    if data is not None:
        documents = read_documents(data)
        windows[DATA] = token_windows(documents, tokenizer, positions, window_tokens=window_tokens)
    for name, text in load_samples().items():
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        own = int(scored_positions(torch.tensor(tokens), tokenizer.bos_token_id).sum())
        count = min(own, SAMPLE_POSITIONS)
        windows[name] = token_windows([text], tokenizer, count, window_tokens=window_tokens)
    return windows


def text_states(
    model: "PreTrainedModel",
    windows: dict[str, list[Tensor]],
    bos: int | None,
    postprocess: Postprocess,
) -> dict[str, Tensor]:
    """Hidden states that enter the head, `[positions, d]` by text.

    Args:
        model: a causal LM.
        windows: tokens by text.
        bos: the tokenizer's BOS token, or None.
        postprocess: `integrations.transformers.logit_postprocess(model.config)`.
    """
    with torch.inference_mode():
        return {
            name: torch.cat(list(hidden_states(model, tokens, bos, postprocess)))
            for name, tokens in windows.items()
        }


@torch.inference_mode()
def inspect_head(
    head: "FlashHead", texts: dict[str, Tensor], *, progress: bool = False
) -> Inspection:
    """Search and estimate the hidden states of some texts.

    Args:
        head: with a codes index.
        texts: floating `[n, d]` by name; if one is named `DATA`, it alone is pooled.
        progress: show a bar on stderr.

    Raises:
        FlashHeadError: another index, too few hidden states, or shapes that do not fit.
    """
    index, weight, bias = head.index, head.weight, head.bias
    if not isinstance(index, CodesIndex):
        raise FlashHeadError(f"a {head.kind} head: wanted a FlashHead with a codes index")
    pooled = (DATA,) if DATA in texts else tuple(texts)
    errors, ranks = ErrorTotals(index), []
    counts = {name: _Counts() for name in texts}
    total = sum(map(len, texts.values()))
    bar = tqdm(total=total, desc="inspect", unit="pos", file=sys.stderr, disable=not progress)
    with bar:
        for name, hidden in texts.items():
            for chunk in estimate_chunks(index, weight, bias, hidden, impl=head.impl):
                counts[name].add(head.search(chunk.hidden), chunk)
                if name in pooled:
                    errors.add(chunk)
                    ranks.append(winner_ranks(chunk))
                bar.update(len(chunk.hidden))
    dense_bytes = sum(p.numel() * p.element_size() for p in (weight, bias) if p is not None)
    states = torch.cat([texts[name] for name in pooled])
    return Inspection(
        pooled=pooled,
        texts={name: count.figures(dense_bytes) for name, count in counts.items()},
        whole=_Counts.joined([counts[name] for name in pooled]).figures(dense_bytes),
        errors=errors.result(),
        recall=Recall(torch.cat(ranks, 1)),
        rows=vocabulary(weight, index.exact[0], states),
    )


@dataclasses.dataclass
class _Counts:
    """Figures by position, a tensor a chunk."""

    candidates: list[Tensor] = dataclasses.field(default_factory=list)
    certified: list[Tensor] = dataclasses.field(default_factory=list)
    fallback: list[Tensor] = dataclasses.field(default_factory=list)
    bytes_read: list[Tensor] = dataclasses.field(default_factory=list)
    right: list[Tensor] = dataclasses.field(default_factory=list)

    @classmethod
    def joined(cls, parts: "list[_Counts]") -> "_Counts":
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*([x for part in parts for x in getattr(part, name)] for name in names))

    def add(self, output: "HeadOutput", chunk: Estimates) -> None:
        """Add what the search returned for the hidden states of a chunk."""
        chosen = chunk.truth.gather(1, output.tokens[:, None])
        regret = chunk.truth.amax(1, keepdim=True) - chosen
        self.right.append((regret <= chunk.rounding)[:, 0])
        self.candidates.append(output.candidates)
        self.certified.append(output.certified)
        self.fallback.append(output.fallback)
        self.bytes_read.append(output.bytes_read)

    def figures(self, dense_bytes: int) -> TextFigures:
        right, certified = torch.cat(self.right), torch.cat(self.certified)
        candidates = torch.cat(self.candidates).double()
        return TextFigures(
            positions=len(right),
            candidates_mean=candidates.mean().item(),
            candidates_p50=candidates.quantile(0.5).item(),
            candidates_p99=candidates.quantile(0.99).item(),
            agreement=right.double().mean().item(),
            certified_fraction=certified.double().mean().item(),
            certified_wrong=int((certified & ~right).sum()),
            fallback_fraction=torch.cat(self.fallback).double().mean().item(),
            bytes_fraction=torch.cat(self.bytes_read).double().mean().item() / dense_bytes,
        )
