"""What is converted: found, checked before its weights are read, named, and told from another."""

import json
import shutil
from pathlib import Path
from typing import Any

from flashhead._version import __version__
from flashhead.convert.files import check_weights, read_config, weight_files
from flashhead.convert.licence import label_of
from flashhead.errors import FlashHeadError
from flashhead.models import resolve

LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "GEMMA_TERMS*")
BESIDE = ("*.json", "*.jinja", "*.txt", "*.model", "README.md", *LICENCES)
"""What a snapshot of the hub holds beside weights."""


def local_source(model: str, progress: bool = True, trust_remote_code: bool = False) -> Path:
    """Folder or `.gguf` file of a model; of a hub id, the snapshot in the hub's own cache.

    Raises:
        FlashHeadError: it is nowhere, or the hub does not give it.
    """
    source = resolve(model, progress)
    if Path(source).exists():
        return Path(source)
    from huggingface_hub import snapshot_download

    patterns = [*BESIDE, *(["*.py"] if trust_remote_code else [])]
    try:
        folder = Path(snapshot_download(source, allow_patterns=patterns))
        weights = list(_weights(folder, source))
        return Path(snapshot_download(source, allow_patterns=[*patterns, *weights]))
    except (OSError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise FlashHeadError(f"model {model!r} cannot be fetched: {line}") from error


def _weights(folder: Path, name: str) -> dict[str, set[str]]:
    """Weight files that a snapshot names: one, of the usual name, where it names none."""
    if (folder / "model.safetensors.index.json").is_file():
        return weight_files(folder)
    if not (folder / "config.json").is_file():
        raise FlashHeadError(f"model {name!r} has no config.json")
    return {"model.safetensors": set()}


def check_source(source: Path, *, quantize: str | None, index_only: bool) -> None:
    """Refuse what cannot be converted, from names, headers and config alone.

    Args:
        source: folder or `.gguf` file.
        quantize: a key of `options.QUANTIZE`, or None.
        index_only: whether weights are left out of what is written.

    Raises:
        FlashHeadError: a weight file is missing or cut short, the model has an index already, is
            quantized already, or is no causal LM.
    """
    if not source.is_dir():
        if source.suffix != ".gguf":
            raise FlashHeadError(f"model {str(source)!r}: wanted a folder or a .gguf file")
        return
    try:
        config = read_config(source)
        check_weights(source)
    except FlashHeadError as error:
        raise FlashHeadError(f"model {str(source)!r} is not whole: {error}") from error
    if "flashhead" in config and not index_only:
        raise FlashHeadError(
            f"model {str(source)!r} has an index already: convert its base, or make a new index "
            "of it with --index-only"
        )
    if quantize is not None and config.get("quantization_config") is not None:
        raise FlashHeadError("the model is quantized already: convert it without --quantize")
    if "flashhead_latent" in config:  # a kind of model of our own: its loader is strict
        if quantize is not None:
            raise FlashHeadError(
                "the model's attention is latent already: convert its base with --attention latent "
                "and --quantize at once"
            )
        return
    from flashhead.integrations.skeleton import require_causal

    require_causal(source)


def default_name(
    model: str, source: Path, *, head: str, quantize: str | None, index_only: bool = False
) -> Path:
    """Name by the hub's convention: `BASE-FlashHead-W4A16`, in the current directory.

    Args:
        model: as the user named it.
        source: where that is.
        head: "codes", "clusters" or "dense".
        quantize: a key of `options.QUANTIZE`, or None.
        index_only: whether weights are left out.
    """
    base = label_of(model).rpartition("/")[2]
    if source.is_dir() and "/" not in label_of(model):
        named = read_config(source).get("_name_or_path")
        if isinstance(named, str) and named and not named.startswith((".", "/", "~")):
            base = named.rpartition("/")[2]
    base = base.removesuffix(".gguf") or "model"
    parts = [base, *(["FlashHead"] if head != "dense" else [])]
    parts += [quantize.upper()] if quantize is not None else []
    return Path("-".join([*parts, *(["Index"] if index_only else [])]))


def fingerprint(source: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What makes two runs write the same folder: source files by size and time, options, versions.

    Args:
        source: folder or `.gguf` file.
        options: JSON-able, and paths.
    """
    from importlib.metadata import PackageNotFoundError, version

    versions = {"flashhead": __version__}
    for package in ("torch", "transformers", "compressed-tensors"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = ""
    files = [p for p in sorted(source.iterdir()) if p.is_file()] if source.is_dir() else [source]
    stats = {path.name: path.stat() for path in files}
    return {
        "source": str(source.resolve()),
        "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        "options": json.loads(json.dumps(options, default=str)),
        "versions": versions,
    }


def copy_licences(source: Path, folder: Path) -> None:
    """Copy licence texts and notices of a folder, byte by byte."""
    if source.is_dir():
        for pattern in LICENCES:
            for path in source.glob(pattern):
                if path.is_file():
                    shutil.copyfile(path, folder / path.name)


def copy_checkpoint(source: Path, folder: Path) -> None:
    """A checkpoint that somebody else quantized keeps its files: the loaded model is unpacked."""
    names = {*weight_files(source), "model.safetensors.index.json"}
    for path in [*(source / name for name in names), *source.glob("*config.json")]:
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
