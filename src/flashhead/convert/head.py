"""Convert a model: an ordinary Hugging Face folder with an index beside the weights.

The folder is made under a temporary name and renamed (`workspace`), so it exists whole or not at
all, also after Ctrl-C. Plain transformers loads it as the dense model it was. Rounding to nearest
goes file by file (`shards`); where that cannot be, the whole model is loaded, and the log says why.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashhead.convert.card import facts_of, write_card
from flashhead.convert.checksums import write_checksums
from flashhead.convert.latent_folder import convert_attention, mark_latent
from flashhead.convert.source import (
    check_source,
    copy_checkpoint,
    copy_licences,
    default_name,
    fingerprint,
    local_source,
)
from flashhead.convert.workspace import Workspace, require_disk, require_new, told_if_full
from flashhead.errors import FlashHeadError
from flashhead.index.store import save_index
from flashhead.options import CALIBRATION_TOKENS, QUANTIZE
from flashhead.options_latent import LatentOptions

if TYPE_CHECKING:
    from flashhead.index.choose import Expectation

HEADS = ("codes", "clusters", "dense")
ROUNDING_TOKENS = 65_536
"""Of calibration text, at most; in windows of 512."""
_log = logging.getLogger("flashhead")


@dataclasses.dataclass(frozen=True)
class Job:
    """What is asked for; arguments of `convert`, checked."""

    source: Path
    head: str
    progress: bool
    trust_remote_code: bool
    index_only: bool
    quantize: str | None
    attention: LatentOptions | None
    calibration: tuple[Path, ...]
    options: dict[str, Any]


def convert(
    model: str,
    out: str | Path | None = None,
    *,
    head: str = "codes",
    progress: bool = True,
    trust_remote_code: bool = False,
    index_only: bool = False,
    quantize: str | None = None,
    attention: LatentOptions | None = None,
    calibration: Sequence[Path] = (),
    **options: Any,
) -> dict[str, Any]:
    """Write a folder that holds the model, its tokenizer and an index of its head.

    transformers and `flashhead.load` take it as they take any folder, and so does vLLM where this
    package is installed: `quantization_config` in its config.json names FlashHead.

    Args:
        model: embedded name, hub id, local folder or local `.gguf` file.
        out: the folder to make; it must not exist. None: by the hub's convention, here.
        head: "codes" or "clusters"; "dense": no index, for a quantized body of a plain checkpoint.
        progress: progress bars on stderr.
        trust_remote_code: run Python code that the model's folder brings.
        index_only: write the index and its `flashhead` section alone, without weights.
        quantize: a layout for the linear layers (`options.QUANTIZE`), or None; the head stays.
        calibration: text files to round with (GPTQ); none: to nearest.
        attention: make attention latent (`convert.latent`) before all else; None: leave it.
        options: fields of `CodesOptions` or `ClustersOptions`.

    Returns:
        What was written: `out`, `head`, `index_bytes`, `head_bytes`, `model_bytes` (as loaded),
        `folder_bytes`, `latent`, `quantize`, `by_shards`, `seconds`, `parameters`; and for codes
        `expectation`: what was chosen and why (`index.choose`).

    Raises:
        FlashHeadError: `out` exists or cannot be written, the disk is or becomes full, or the model
            is not whole, of no supported kind, or converted already.
    """
    start = time.perf_counter()
    _require_consistent(head, quantize, index_only, attention, options)
    if out is not None:
        require_new(Path(out))
    source = local_source(model, progress, trust_remote_code)
    check_source(source, quantize=quantize, index_only=index_only)
    if out is None:
        out = default_name(model, source, head=head, quantize=quantize, index_only=index_only)
    out = Path(out)
    files = tuple(Path(file) for file in calibration)
    if files and quantize is None:
        raise FlashHeadError("calibration without quantize: an index samples its own text")
    if files and source.suffix == ".gguf":
        raise FlashHeadError("calibration of a GGUF file: GPTQ wants a folder of safetensors")
    job = Job(
        source, head, progress, trust_remote_code, index_only, quantize, attention, files, options
    )
    asked = dataclasses.asdict(job)
    asked["calibration"] = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime) for f in files]
    del asked["source"], asked["progress"]
    with told_if_full(out), Workspace(out, fingerprint(source, asked), progress) as work:
        report = _by_shards(job, work) or _in_memory(job, work)
        if not index_only:
            copy_licences(source, work.folder)
            write_card(work.folder, facts_of(work.folder, str(source), report, out.name))
            write_checksums(work.folder)
        work.publish()
    written = [file for file in out.rglob("*") if file.is_file()]
    report["folder_bytes"] = sum(file.stat().st_size for file in written)
    return {"out": str(out), **report, "seconds": round(time.perf_counter() - start, 1)}


def _by_shards(job: Job, work: Workspace) -> dict[str, Any] | None:
    """Quantize file by file, then index the folder that was written; None: it cannot be."""
    from flashhead.convert.shards import plan_shards
    from flashhead.integrations.transformers import load_dense, load_tokenizer

    if job.quantize is None or job.attention is not None or job.calibration:
        return None
    plan = plan_shards(job.source, job.quantize)
    if isinstance(plan, str):
        _log.warning("the whole model is loaded to be quantized: %s", plan)
        return None
    tokenizer = load_tokenizer(str(job.source))
    index_bytes = 0 if job.head == "dense" else plan.head_bytes
    require_disk(work.out, plan.needed_bytes(work.finished) + index_bytes)
    plan.write(work, job.progress)
    tokenizer.save_pretrained(work.folder)
    report = {
        "head": job.head,
        "head_bytes": plan.head_bytes,
        "model_bytes": plan.model_bytes,
        "latent": None,
        "quantize": plan.quantized.described(),
        "by_shards": True,
    }
    if job.head == "dense":
        return report | _no_index()
    loaded = load_dense(str(work.folder), packed=None)
    return report | _write_index(*_index(job, loaded), work.folder)


def _in_memory(job: Job, work: Workspace) -> dict[str, Any]:
    """Load the model, quantize and index it, and save it."""
    from flashhead.integrations.transformers import load_dense, load_tokenizer

    source = str(job.source)
    loaded = load_dense(source, trust_remote_code=job.trust_remote_code)
    tokenizer = None
    if not job.index_only:
        tokenizer = load_tokenizer(source, trust_remote_code=job.trust_remote_code)
    weights = sum(p.numel() * p.element_size() for p in loaded.parameters())
    require_disk(work.out, weights // 2 if job.index_only else 3 * weights // 2)
    latent = quantized = None
    if job.attention is not None:
        latent = convert_attention(loaded, tokenizer, job.attention, progress=job.progress)
    if job.quantize is not None:
        from flashhead.convert.quantize import Quantized

        # before the index is built: its hidden states are those of the model that is served
        windows = _calibration(job, tokenizer) if job.calibration else None
        quantized = Quantized(loaded, job.quantize, progress=job.progress, windows=windows)
    head = loaded.get_output_embeddings().weight
    report = {
        "head": job.head,
        "head_bytes": head.numel() * head.element_size(),
        "model_bytes": weights,
        "latent": latent,
        "quantize": None if quantized is None else _described(quantized, job),
        "by_shards": False,
    }
    built = None if job.head == "dense" else _index(job, loaded)
    if tokenizer is not None:
        if quantized is not None:
            quantized.save(work.folder)
        elif getattr(loaded.config, "quantization_config", None) is not None:
            copy_checkpoint(job.source, work.folder)
        else:
            loaded.save_pretrained(work.folder)
        tokenizer.save_pretrained(work.folder)
        mark_latent(loaded, work.folder)
    return report | (_no_index() if built is None else _write_index(*built, work.folder))


def _calibration(job: Job, tokenizer: Any) -> list[Any]:
    """Token windows of the calibration files."""
    from flashhead.integrations.latent_text import file_windows

    return file_windows(job.calibration, tokenizer, ROUNDING_TOKENS, seed=0)


def _described(quantized: Any, job: Job) -> dict[str, Any]:
    done: dict[str, Any] = quantized.described()
    if job.calibration:
        names = ", ".join(path.name for path in job.calibration)
        done["calibration"] = f"{names}, {done['calibration_tokens']:,} tokens"
    return done


def _index(job: Job, loaded: Any) -> tuple[Any, "Expectation | None"]:
    """The head with its index, taken out of the model again, and why the index is as it is."""
    from flashhead.integrations.transformers import attach

    options = {"calibration_tokens": CALIBRATION_TOKENS, **job.options}
    attachment = attach(loaded, job.head, progress=job.progress, **options)
    attachment.detach()
    return attachment.head, attachment.expectation


def _write_index(head: Any, expected: "Expectation | None", folder: Path) -> dict[str, Any]:
    """Write the index and name it in config.json."""
    path, config = folder / "config.json", {}
    if path.is_file():
        # a checkpoint's own quantization stays named; the plugin for vLLM sees our section
        config = {"quantization_config": {"quant_method": "flashhead"}}
        config |= json.loads(path.read_text())
    section = save_index(head.index, head.weight, head.sample, folder)
    path.write_text(json.dumps(config | {"flashhead": section}, indent=2) + "\n")
    return {
        "index_bytes": section["index_bytes"],
        "crossover_rows": head.crossover_rows,
        "expectation": _expectation(expected),
        "parameters": section["parameters"],
    }


def _no_index() -> dict[str, Any]:
    return {"index_bytes": 0, "crossover_rows": None, "expectation": None, "parameters": None}


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


def _require_consistent(
    head: str,
    quantize: str | None,
    index_only: bool,
    attention: LatentOptions | None,
    options: dict[str, Any],
) -> None:
    """Refuse arguments that are unknown or would be ignored."""
    if head not in HEADS:
        raise FlashHeadError(f"head={head!r}: wanted one of {', '.join(HEADS)}")
    if quantize is not None and quantize not in QUANTIZE:
        raise FlashHeadError(f"quantize={quantize!r}: wanted one of {', '.join(QUANTIZE)}")
    if quantize is not None and index_only:
        raise FlashHeadError("quantize and index_only: an index alone has no layers to quantize")
    if attention is not None and index_only:
        raise FlashHeadError("attention and index_only: latent attention changes the weights")
    if head == "dense" and quantize is None and attention is None:
        raise FlashHeadError("head='dense' without quantize: there is nothing to convert")
    if head == "dense" and options:
        raise FlashHeadError(f"head='dense' takes no options, got {next(iter(options))!r}")
