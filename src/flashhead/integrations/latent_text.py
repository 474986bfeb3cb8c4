"""Token windows to calibrate and heal with: from files, or sampled from the model itself."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from flashhead.evaluate.text import document_tokens, read_documents, windows_of
from flashhead.integrations.calibration import generate_text

SAMPLED_TOKENS = 256
"""Tokens a sampled window."""


def file_windows(
    files: tuple[Path, ...], tokenizer: Any, tokens: int, seed: int, window_tokens: int = 512
) -> list[Tensor]:
    """At most `tokens` tokens of text files, in windows drawn from all over: int64[tokens] each.

    Raises:
        FlashHeadError: a file that cannot be read.
    """
    documents = [document for path in files for document in read_documents(path)]
    coded = list(document_tokens(documents, tokenizer))
    positions = max(1, min(tokens, sum(len(document) for document in coded)))
    bos = tokenizer.bos_token_id
    return windows_of(coded, bos, positions, window_tokens=window_tokens, seed=seed)


@torch.inference_mode()
def sample_documents(
    model: PreTrainedModel,
    tokens: int,
    seed: int,
    *,
    batch: int = 64,
    window_tokens: int = SAMPLED_TOKENS,
    progress: bool = True,
) -> list[Tensor]:
    """Text that the model samples at temperature 1, each window cut behind its first end of text.

    Args:
        model: a causal LM; its state and the global random state are left as they were.
        tokens: about how many, before cutting.
        seed: of the sampling.
        batch: windows sampled at a time.
        window_tokens: longest window.
        progress: progress bar on stderr.

    Returns:
        int64[tokens] each, on the CPU.
    """
    length = min(window_tokens, tokens)
    left, windows = -(-tokens // length), list[Tensor]()
    was_training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    bar = tqdm(total=left * length, desc="sampling", unit="token", disable=not progress)
    try:
        with torch.random.fork_rng(devices=devices), bar:
            torch.manual_seed(seed)
            while left > 0:
                rows = min(batch, left)
                windows += _cut(generate_text(model, rows, length - 1, bar).cpu(), model)
                left -= rows
    finally:
        model.train(was_training)
    return windows


def _cut(sampled: Tensor, model: PreTrainedModel) -> list[Tensor]:
    """Windows end with their first end of text; very short ones are left out."""
    ends = model.config.get_text_config().eos_token_id
    ends = torch.tensor(ends if isinstance(ends, list) else [-1 if ends is None else ends])
    made = []
    for row in sampled.clone():
        stops = torch.isin(row[1:], ends).nonzero()
        cut = row if not len(stops) else row[: int(stops[0]) + 2]
        if len(cut) >= 16:
            made.append(cut)
    return made
