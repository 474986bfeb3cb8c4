"""Text files into token windows.

A `.txt` file is one document; every line of a `.jsonl` file is one, its `text` or its `question`
and `answer`. The documents are tokenised one by one, each behind the tokenizer's BOS token when it
has one, and laid end to end; the stream is cut into windows, and a window that does not start with
BOS gets one, because a model that was trained with BOS sees garbage without it. BOS itself is no
position to measure: its hidden state is the same in every window.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashhead.errors import FlashHeadError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW_TOKENS = 512


def read_documents(path: Path) -> list[str]:
    """Documents of a text file, in order, empty ones left out.

    Args:
        path: a `.txt` or `.jsonl` file in UTF-8.

    Raises:
        FlashHeadError: missing, unreadable, empty, another suffix, or a line that is no record.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise FlashHeadError(f"text file {path}: wanted a name that ends in .txt or .jsonl")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FlashHeadError(
            f"text file {path}: no such file; wanted a .txt or .jsonl file"
        ) from None
    except UnicodeDecodeError as error:
        raise FlashHeadError(
            f"text file {path}: not UTF-8 at byte {error.start}; convert it first"
        ) from error
    except OSError as error:
        raise FlashHeadError(
            f"text file {path}: cannot be read ({error.strerror}); check it"
        ) from error
    if path.suffix == ".txt":
        documents = [text]
    else:
        lines = enumerate(text.split("\n"), start=1)
        documents = [_record(path, number, line) for number, line in lines if line.strip()]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise FlashHeadError(f"text file {path}: holds no text; wanted at least one document")
    return documents


def _record(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise FlashHeadError(
            f"text file {path}, line {number}: not JSON ({error.msg}); mend the line"
        ) from error
    if isinstance(record, dict):
        if isinstance(record.get("text"), str):
            return str(record["text"])
        question, answer = record.get("question"), record.get("answer")
        if isinstance(question, str) and isinstance(answer, str):
            return f"{question}\n{answer}"
    raise FlashHeadError(
        f"text file {path}, line {number}: wanted an object with a string `text`, "
        "or strings `question` and `answer`"
    )


def token_windows(
    documents: list[str],
    tokenizer: "PreTrainedTokenizerBase",
    positions: int,
    *,
    window_tokens: int = WINDOW_TOKENS,
    seed: int = 0,
) -> list[Tensor]:
    """Windows of tokens that hold exactly `positions` tokens other than BOS.

    The windows are drawn from the whole text in an order set by `seed`; the last one is cut short.

    Args:
        documents: texts, tokenised one by one.
        tokenizer: of the model that is measured.
        positions: tokens other than BOS, in all windows together.
        window_tokens: most tokens a window, with its BOS.
        seed: of the order of the windows.

    Returns:
        `int64[tokens]` each, BOS first when the tokenizer has one.

    Raises:
        FlashHeadError: the text has fewer tokens than `positions`.
    """
    return windows_of(
        document_tokens(documents, tokenizer),
        tokenizer.bos_token_id,
        positions,
        window_tokens=window_tokens,
        seed=seed,
    )


def document_tokens(
    documents: list[str], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[list[int]]:
    """Tokens of each document, without special tokens."""
    for document in documents:
        yield tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]


def windows_of(
    documents: Iterable[list[int]],
    bos: int | None,
    positions: int,
    *,
    window_tokens: int = WINDOW_TOKENS,
    seed: int = 0,
) -> list[Tensor]:
    """As `token_windows`, of documents in tokens."""
    if positions < 1:
        raise FlashHeadError(f"positions={positions}: wanted 1 or more")
    lead = [] if bos is None else [int(bos)]
    stream: list[int] = []
    for document in documents:
        stream += lead + document
    available = sum(token != bos for token in stream)
    if available < positions:
        raise FlashHeadError(
            f"positions={positions}: the text has only {available} tokens; "
            f"ask for at most {available} or use a longer text"
        )
    windows, start = [], 0
    while start < len(stream):
        head = [] if stream[start] == bos else lead
        body = stream[start : start + window_tokens - len(head)]
        windows.append(torch.tensor(head + body, dtype=torch.int64))
        start += len(body)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed)).tolist()
    return take_positions([windows[i] for i in order], positions, bos)


def take_positions(windows: list[Tensor], positions: int, bos: int | None) -> list[Tensor]:
    """The first windows `int64[tokens]` that hold `positions` tokens other than BOS, or all of
    them; the last one is cut short.
    """
    taken, left = [], positions
    for window in windows:
        counted = torch.cumsum(scored_positions(window, bos), 0)
        if left <= 0:
            break
        if counted[-1] > left:
            window = window[: int((counted < left).sum()) + 1]
        left -= int(scored_positions(window, bos).sum())
        taken.append(window)
    return taken


def scored_positions(window: Tensor, bos: int | None) -> Tensor:
    """Positions of `window` that are measured, all but BOS: bool[tokens]."""
    if bos is None:
        return torch.ones_like(window, dtype=torch.bool)
    return window != bos
