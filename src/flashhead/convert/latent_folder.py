"""Latent attention as a step of a conversion: text, statistics, modules, the folder's section."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flashhead.errors import FlashHeadError
from flashhead.options_latent import LatentOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def convert_attention(
    model: "PreTrainedModel", tokenizer: Any, options: LatentOptions, *, progress: bool = True
) -> dict[str, Any]:
    """Make a loaded model's attention latent, in place, from a text.

    Returns:
        As `convert.latent.make_latent`, and `calibration`: the files' names, or "sampled".

    Raises:
        FlashHeadError: an architecture that is not supported, a text too short, weights that are
            quantized already, no GPU where one is asked for.
    """
    from flashhead.convert.latent import make_latent
    from flashhead.integrations.latent_model import serve_latents, store_of
    from flashhead.integrations.latent_text import file_windows, sample_documents

    if options.device == "cuda" and not torch.cuda.is_available():
        raise FlashHeadError("--device cuda: torch sees no GPU")
    if getattr(model.config, "quantization_config", None) is not None:
        raise FlashHeadError("the model is quantized already: convert its attention before that")
    if options.calibration:
        windows = file_windows(
            options.calibration, tokenizer, options.calibration_tokens, options.seed
        )
        named: Any = [path.name for path in options.calibration]
    else:
        home = model.device
        windows = sample_documents(
            model.to(options.device), options.calibration_tokens, options.seed, progress=progress
        )
        model.to(home)
        named = "sampled"
    report = make_latent(model, options, windows, progress=progress)
    serve_latents(model, store_of(options.kv_dtype))
    return {**report, "calibration": named}


def mark_latent(model: "PreTrainedModel", folder: Path) -> None:
    """Write the section of a model with latent attention into its saved folder; else nothing."""
    from flashhead.integrations.latent_model import latent_modules, mark_folder, section_of

    if latent_modules(model):
        mark_folder(folder, section_of(model, model.latent_store.kind))
