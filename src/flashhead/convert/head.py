"""Convert a model: an ordinary Hugging Face folder with an index beside the weights.

The folder is written under a temporary name and renamed, so it exists whole or not at all, also
after Ctrl-C. Plain transformers loads it as the dense model it was.
"""

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashhead.convert.latent_folder import convert_attention, mark_latent
from flashhead.errors import FlashHeadError
from flashhead.index.store import save_index
from flashhead.options_latent import LatentOptions

if TYPE_CHECKING:
    from flashhead.index.choose import Expectation


def convert(
    model: str,
    out: str | Path,
    *,
    head: str = "codes",
    progress: bool = True,
    trust_remote_code: bool = False,
    index_only: bool = False,
    quantize: str | None = None,
    attention: LatentOptions | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Write a folder that holds the model, its tokenizer and an index of its head.

    transformers and `flashhead.load` take it as they take any folder, and so does vLLM where this
    package is installed: `quantization_config` in its config.json names FlashHead.

    Args:
        model: embedded name, hub id, local folder or local `.gguf` file.
        out: the folder to make; it must not exist.
        head: "codes" or "clusters".
        progress: progress bars on stderr.
        trust_remote_code: run Python code that the model's folder brings.
        index_only: write the index and its `flashhead` section alone, without weights.
        attention: make attention latent (`convert.latent`) before all else; None: leave it.
        quantize: a layout for the linear layers (`options.QUANTIZE`), or None; the head stays.
        options: fields of `CodesOptions` or `ClustersOptions`.

    Returns:
        What was written: `out`, `head`, `index_bytes`, `head_bytes`, `model_bytes` (as loaded),
        `folder_bytes`, `latent`, `quantize`, `seconds`, `parameters`; and for codes `expectation`:
        what was chosen and why (`index.choose`).

    Raises:
        FlashHeadError: `out` exists or its parent does not, too little disk space, or the model
            does not load.
    """
    from flashhead.integrations.transformers import attach, load_dense, load_tokenizer
    from flashhead.models import resolve

    start = time.perf_counter()
    out = Path(out)
    if head not in ("codes", "clusters"):
        raise FlashHeadError(f"head={head!r}: wanted codes or clusters")
    if out.exists():
        raise FlashHeadError(f"{out} exists: nothing is written over, name another folder")
    if not out.absolute().parent.is_dir():
        raise FlashHeadError(f"{out}: its parent folder does not exist")
    if quantize is not None and index_only:
        raise FlashHeadError("quantize and index_only: an index alone has no layers to quantize")
    source = resolve(model, progress)
    loaded = load_dense(source, trust_remote_code=trust_remote_code)
    tokenizer = None
    if not index_only:
        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    weights = sum(p.numel() * p.element_size() for p in loaded.parameters())
    _require_disk(out, weights // 2 if index_only else 3 * weights // 2)
    latent = None
    if attention is not None:
        if tokenizer is None:
            raise FlashHeadError("attention and index_only: latent attention changes the weights")
        latent = convert_attention(loaded, tokenizer, attention, progress=progress)
    quantized = None
    if quantize is not None:
        from flashhead.convert.quantize import Quantized

        # before the index is built: its hidden states are those of the model that is served
        quantized = Quantized(loaded, quantize, progress=progress)
    attachment = attach(loaded, head, progress=progress, **options)
    built, sample = attachment.head.index, attachment.head.sample
    assert built is not None
    attachment.detach()
    with tempfile.TemporaryDirectory(
        dir=out.absolute().parent, prefix=f".{out.name}.partial-"
    ) as partial:
        folder = Path(partial) / "folder"
        folder.mkdir()
        if hasattr(loaded.config, "flashhead"):
            del loaded.config.flashhead
        path, config = folder / "config.json", {}
        if tokenizer is not None:
            if quantized is not None:
                quantized.save(folder)
            elif getattr(loaded.config, "quantization_config", None) is not None:
                _copy_checkpoint(source, folder)
            else:
                loaded.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            mark_latent(loaded, folder)
            # a checkpoint's own quantization stays named; the plugin for vLLM sees our section
            config = {"quantization_config": {"quant_method": "flashhead"}}
            config |= json.loads(path.read_text())
        section = save_index(built, attachment.head.weight, sample, folder)
        path.write_text(json.dumps(config | {"flashhead": section}, indent=2) + "\n")
        if out.exists():
            raise FlashHeadError(f"{out} appeared while converting: nothing is written over")
        folder.rename(out)
    return {
        "out": str(out),
        "head": head,
        "index_bytes": section["index_bytes"],
        "head_bytes": attachment.head.weight.numel() * attachment.head.weight.element_size(),
        "model_bytes": weights,
        "folder_bytes": sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
        "latent": latent,
        "quantize": None if quantized is None else quantized.described(),
        "crossover_rows": attachment.head.crossover_rows,
        "expectation": _expectation(attachment.expectation),
        "seconds": round(time.perf_counter() - start, 1),
        "parameters": section["parameters"],
    }


def _copy_checkpoint(source: str, folder: Path) -> None:
    """A checkpoint that somebody else quantized keeps its files: the loaded model is unpacked."""
    kept = Path(source)
    if not kept.is_dir():
        from huggingface_hub import snapshot_download

        kept = Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    for pattern in ("*.safetensors", "*.safetensors.index.json", "*config.json"):
        for path in kept.glob(pattern):
            shutil.copyfile(path, folder / path.name)


def _expectation(expected: "Expectation | None") -> dict[str, Any] | None:
    """JSON-able: the options chosen, their row of the table, and the table."""
    if expected is None:
        return None
    return {
        "bits": expected.options.bits,
        "planes": expected.options.planes,
        "kl_budget": expected.options.kl_budget,
        "int8_kl": expected.int8_kl,
        "chosen": expected.chosen,
        "table": expected.table,
    }


def _require_disk(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out.absolute().parent).free
    if free < needed:
        raise FlashHeadError(
            f"{out}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there"
        )
