"""Text to heal on: rows of equal length from files or from the teacher, kept for the next run.

Sampled text needs no data set and is what the teacher will be asked to continue. On a GPU thousands
of short texts are sampled side by side, as a decoding step costs the same for all of them.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flashhead.errors import FlashHeadError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLED_ROWS = {"cuda": 4096, "cpu": 64}
"""Texts sampled side by side."""


def pack(windows: list[Tensor], row_tokens: int) -> Tensor:
    """Texts end to end, cut into rows: int64[rows, row_tokens].

    Raises:
        FlashHeadError: less than two rows of text.
    """
    stream = torch.cat(windows)
    rows = len(stream) // row_tokens
    if rows < 2:
        raise FlashHeadError(
            f"healing text of {len(stream)} tokens: wanted {2 * row_tokens} or more"
        )
    return stream[: rows * row_tokens].view(rows, row_tokens)


def healing_rows(
    teacher: "PreTrainedModel",
    tokenizer: Any,
    files: tuple[Path, ...],
    kept: Path,
    *,
    tokens: int,
    row_tokens: int,
    seed: int,
    seconds: float | None,
    progress: bool = True,
) -> Tensor:
    """Rows of text.

    Args:
        teacher: samples, if there are no files.
        tokenizer: reads the files.
        files: .txt or .jsonl; none: sampled.
        kept: safetensors file that sampled text is kept in, and taken from if it is there.
        tokens: about how many.
        row_tokens: of a row.
        seed: of sampling and order.
        seconds: sampling stops after so long, with what there is; None: no limit.
        progress: progress bar on stderr.

    Returns:
        int64[rows, row_tokens] on the CPU.

    Raises:
        FlashHeadError: too little text, or a kept file of another model.
    """
    from flashhead.integrations.latent_text import file_windows

    if files:
        windows = file_windows(files, tokenizer, tokens, seed, row_tokens)
        return pack(windows, row_tokens)
    if kept.exists():
        stream = read_sampled(kept, teacher.config.get_text_config().vocab_size)
        if len(stream) >= tokens or seconds is not None:
            return pack([stream], row_tokens)
    windows = sample_many(teacher, tokens, seed, seconds, progress)
    write_sampled(kept, torch.cat(windows))
    return pack(windows, row_tokens)


def sample_many(
    teacher: "PreTrainedModel", tokens: int, seed: int, seconds: float | None, progress: bool
) -> list[Tensor]:
    """Batches of sampled text until there are enough tokens, or until the time is over."""
    from flashhead.integrations.latent_text import SAMPLED_TOKENS, sample_documents

    rows = SAMPLED_ROWS[teacher.device.type]
    started, windows, got, batch = time.perf_counter(), list[Tensor](), 0, 0
    while got < tokens:
        spent = time.perf_counter() - started
        # a batch that would not end in time is not begun
        if seconds is not None and batch and spent + spent / batch > seconds:
            break
        wanted = min(rows * SAMPLED_TOKENS, max(SAMPLED_TOKENS, tokens - got))
        new = sample_documents(teacher, wanted, seed + batch, batch=rows, progress=progress)
        windows += new
        got += sum(len(window) for window in new)
        batch += 1
    return windows


def write_sampled(path: Path, stream: Tensor) -> None:
    """Keep a stream of tokens."""
    partial = path.with_name(f".{path.name}.partial")
    save_file({"tokens": stream.to(torch.int32)}, partial)
    partial.replace(path)


def read_sampled(path: Path, vocabulary: int) -> Tensor:
    """The stream that `write_sampled` kept: int64[tokens].

    Raises:
        FlashHeadError: damaged, or tokens outside of the vocabulary.
    """
    try:
        with safe_open(path, "pt") as file:
            stream = file.get_tensor("tokens")
    except (OSError, SafetensorError) as error:
        raise FlashHeadError(f"{path}: not readable ({error}); remove it") from error
    inside = len(stream) and 0 <= int(stream.min()) <= int(stream.max()) < vocabulary
    if stream.dim() != 1 or not inside:
        raise FlashHeadError(f"{path}: no text of this model; remove it")
    return stream.long()
