"""Round with calibration text: GPTQ (arXiv 2210.17323), by the llm-compressor library.

A layer's codes are chosen one column after another, each error spread over the columns that follow
by what inputs of the text weigh them; layers are done in order, on the outputs of those already
rounded. What is written has the layout of rounding to nearest, so what reads one reads the other.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flashhead.errors import FlashHeadError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KINDS = ("w4a16", "w8a16", "w8a8-int8")
"""Integer layouts: GPTQ rounds to integers."""
LEAST_TOKENS = 1024
"""Below that the inputs of most layers span fewer dimensions than they have."""


def require_calibratable(kind: str, windows: list[Tensor]) -> None:
    """Refuse layouts that are not rounded with a text, and texts that say too little.

    Raises:
        FlashHeadError: either.
    """
    if kind not in KINDS:
        raise FlashHeadError(
            f"quantize={kind!r} with calibration: GPTQ rounds {', '.join(KINDS)}; without "
            "calibration text it is rounded to nearest"
        )
    tokens = sum(len(window) for window in windows)
    if tokens < LEAST_TOKENS:
        raise FlashHeadError(
            f"the calibration text has {tokens:,} tokens: wanted {LEAST_TOKENS:,} or more"
        )


@torch.no_grad()
def gptq(model: "PreTrainedModel", scheme: Any, ignored: list[str], windows: list[Tensor]) -> None:
    """Put the weights of a model's linear layers on their grids, in place.

    Args:
        model: in its own dtype; its layers get `quantization_scheme` and scales.
        scheme: of compressed-tensors, for all linear layers.
        ignored: names of layers that stay.
        windows: `int64[tokens]` each, calibration text.

    Raises:
        ImportError: llm-compressor is not installed; the message names the command.
        FlashHeadError: a layer was left out, or its weights are not finite afterwards.
    """
    oneshot, modifier = _library()
    batches: list[dict[str, Tensor]] = [
        {"input_ids": window, "attention_mask": torch.ones_like(window)} for window in windows
    ]
    loader: Any = torch.utils.data.DataLoader(batches, batch_size=1)  # type: ignore[arg-type]
    recipe = modifier(config_groups={"group_0": scheme}, ignore=ignored)
    with _quiet():
        oneshot(
            model=model,
            processor=model.config,  # nobody asks it: the text is tokens already
            dataset=loader,
            recipe=recipe,
            tie_word_embeddings=True,  # else a tied head gets a copy of its own
            max_seq_length=max(len(window) for window in windows),
            num_calibration_samples=len(windows),
        )
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name in ignored:
            continue
        if getattr(module, "quantization_scheme", None) is None:
            raise FlashHeadError(f"{name} was left out: its inputs were not seen")
        if not bool(torch.isfinite(module.weight).all()):
            raise FlashHeadError(f"{name}: its weights are not finite after rounding")


def _library() -> tuple[Any, Any]:
    try:
        from llmcompressor import oneshot
        from llmcompressor.modifiers.gptq import GPTQModifier
    except ImportError as error:
        raise ImportError(
            "llm-compressor is not installed: pip install 'flashhead[calibrate]'",
            name="llmcompressor",
        ) from error
    return oneshot, GPTQModifier


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The library's own lines left out, its progress bars kept."""
    from loguru import logger

    logger.disable("llmcompressor")
    try:
        yield
    finally:
        logger.enable("llmcompressor")
