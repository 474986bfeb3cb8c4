"""A loaded model for the subcommands, and how long and how well it decodes."""

import argparse
import sys
from pathlib import Path
from typing import Any

from flashhead.cli.arguments import index_options
from flashhead.errors import FlashHeadError
from flashhead.models import known_names, resolve
from flashhead.options import CodesOptions

HUB_SECONDS = 10.0


def open_source(model: str) -> str:
    """Folder, `.gguf` file or hub id that is there for sure."""
    source = resolve(model)
    if not Path(source).exists():
        require_hub(source)
    return source


def load_model(args: argparse.Namespace, head: str | None) -> tuple[Any, Any]:
    """Model and tokenizer of `--model`.

    Args:
        args: with `model`, `head`, `set` and maybe `crossover`.
        head: "codes" or "clusters" (with `--set`), "dense", or None: the folder's index, or codes.
    """
    options = index_options(args) if head != "dense" else {}
    crossover = getattr(args, "crossover", None)
    source = open_source(args.model)
    print(f"loading {args.model} ...", file=sys.stderr, flush=True)
    from flashhead.integrations import transformers

    tokenizer = transformers.load_tokenizer(source)
    return transformers.load(source, head, crossover=crossover, **options), tokenizer


def calibration_states(model: Any) -> Any:
    """Hidden states that the model samples, as many as an index is built from: `[n, d]`."""
    from flashhead.integrations.calibration import sample_hidden_states

    options = CodesOptions()
    return sample_hidden_states(model, options.calibration_tokens, options.seed, progress=True)


def load_calibrated(model: str) -> tuple[Any, Any, Any]:
    """Model with a codes index of the default options, its tokenizer, and the hidden states that
    the index was built from: other indexes can be built from the same.
    """
    source = open_source(model)
    print(f"loading {model} ...", file=sys.stderr, flush=True)
    from flashhead.integrations import transformers

    tokenizer = transformers.load_tokenizer(source)
    loaded = transformers.load_dense(source)
    hidden = calibration_states(loaded)
    transformers.attach(loaded, "codes", hidden=hidden)
    return loaded, tokenizer, hidden


def counted(head: Any) -> dict[str, float]:
    """What a FlashHead's searches counted since its reset; empty if every row went to dense."""
    stats = head.stats
    searched = stats.rows - stats.dense_rows
    if searched == 0:
        return {}
    dense_bytes = head.weight.numel() * head.weight.element_size()
    return {
        "bytes_fraction": stats.bytes_read / stats.rows / dense_bytes,
        "certified_fraction": stats.certified / searched,
        "candidates_mean": stats.candidates / searched,
    }


def encode(tokenizer: Any, prompt: str, raw: bool) -> Any:
    """Token ids of a prompt, `int64[1, n]` with its mask, in the chat template if there is one."""
    if tokenizer.chat_template is None or raw:
        return tokenizer(prompt, return_tensors="pt")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )


def pad_token(tokenizer: Any) -> int | None:
    """Padding token for `generate`; a tokenizer without one pads with its end of text."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def head_share(model: Any) -> float:
    """Share of the head in the weights that one token reads (an embedding table is looked up)."""
    head = model.get_output_embeddings().weight
    table = model.get_input_embeddings().weight
    rest = sum(
        parameter.numel() * parameter.element_size()
        for parameter in model.parameters()
        if parameter is not head and parameter is not table
    )
    head_bytes = head.numel() * head.element_size()
    return float(head_bytes / (head_bytes + rest))


def require_hub(model: str) -> None:
    """Ask the hub for a model before anything slow; an absent network is one line, at once.

    Raises:
        FlashHeadError: it is not in the local cache, and the hub refuses it or does not answer.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(try_to_load_from_cache(model, "config.json"), str):
        return
    http_error: type[BaseException] = HfHubHTTPError.__bases__[0]  # of the hub's HTTP library
    try:
        HfApi().model_info(model, timeout=HUB_SECONDS)
    except (OSError, http_error) as error:
        raise FlashHeadError(
            f"model {model!r}: not on this machine, and the hub does not have it or does not "
            f"answer ({type(error).__name__}); {known_names()}"
        ) from error
