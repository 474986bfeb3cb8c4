"""The index of a head that vLLM has loaded: from a folder, from the cache, or built now.

An index is shaped by hidden states that the model samples from itself. vLLM cannot sample while it
loads, so a process of its own does, once, with transformers (`flashhead convert --index-only`), and
the cache keeps what it wrote. The ranks of a vocabulary-parallel head cut their rows out of it.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor

from flashhead.errors import FlashHeadError
from flashhead.index.build_codes import build_codes
from flashhead.index.codes import CodesIndex
from flashhead.index.store import load_index
from flashhead.integrations.vllm.options import PluginOptions
from flashhead.models import cache_dir
from flashhead.options import CodesOptions

SEARCH_OPTIONS = ("failure_probability", "kl_budget")
"""Options that only the search reads: they may differ from the folder's."""
_log = logging.getLogger("vllm.flashhead")


@dataclasses.dataclass(frozen=True)
class Head:
    """A head, or a rank's part of it.

    Args:
        weight: floating `[rows, d]`.
        first_row: of the part.
        vocab_size: rows of the whole head.
        model: name or folder of the checkpoint.
        revision: of a checkpoint on the hub.
        trust_remote_code: run Python code that the checkpoint brings.
    """

    weight: Tensor
    first_row: int
    vocab_size: int
    model: str
    revision: str | None
    trust_remote_code: bool

    @property
    def is_whole(self) -> bool:
        """Whether it is not a part."""
        return len(self.weight) == self.vocab_size


def find_index(head: Head, options: PluginOptions) -> tuple[CodesIndex, Tensor | None, str]:
    """The index, a sample of hidden states or None, and where it came from.

    Raises:
        FlashHeadError: the folder named has no index of this head, or none can be built.
    """
    if options.index is not None:
        return _load(Path(options.index), head, options)
    if _section(Path(head.model)) is not None:
        return _load(Path(head.model), head, options)
    if options.calibration != "none":
        folder = _cached_folder(head, options)
        with FileLock(f"{folder}.lock"):
            try:
                if not folder.exists():
                    _convert(head, options, folder)
                try:
                    return _load(folder, head, options)
                except FlashHeadError as error:
                    _log.warning("%s: built again", error)
                    shutil.rmtree(folder)
                    _convert(head, options, folder)
                    return _load(folder, head, options)
            except FlashHeadError as error:
                if options.calibration == "model":
                    raise
                reason = str(error)
        _log.warning(
            "no text could be sampled from the model (%s): the index is built without, which "
            "reads more bytes a token; flashhead convert, or calibration='model', says why",
            reason,
        )
    if not head.is_whole:
        raise FlashHeadError(
            "an index of one rank's rows alone would not match the other ranks': convert the model "
            "first (flashhead convert) and name the folder with the option index"
        )
    index = build_codes(head.weight, options.codes)
    return index, None, "built without calibration"


def _load(
    folder: Path, head: Head, options: PluginOptions
) -> tuple[CodesIndex, Tensor | None, str]:
    section = _section(folder)
    if section is None:
        raise FlashHeadError(f"{folder}: its config.json has no flashhead section")
    first = None if head.is_whole else head.first_row
    weight = head.weight.detach().cpu()
    index, sample = load_index(folder, section, weight, first)
    if not isinstance(index, CodesIndex):
        raise FlashHeadError(f"{folder}: a {section.get('index')} index: vLLM is served by codes")
    given = _given(options)
    limits = {name: given[name] for name in SEARCH_OPTIONS if name in given}
    index = dataclasses.replace(index, options=dataclasses.replace(index.options, **limits))
    return index, sample if len(sample) else None, str(folder)


def _given(options: PluginOptions) -> dict[str, Any]:
    """Options of the index that are not the defaults."""
    defaults = dataclasses.asdict(CodesOptions())
    values = dataclasses.asdict(options.codes)
    return {name: value for name, value in values.items() if value != defaults[name]}


def _section(folder: Path) -> dict[str, Any] | None:
    """The `flashhead` section of a folder's config.json."""
    try:
        section = json.loads((folder / "config.json").read_text()).get("flashhead")
    except (OSError, ValueError):
        return None
    return section if isinstance(section, dict) else None


def _cached_folder(head: Head, options: PluginOptions) -> Path:
    """Place in the cache for this checkpoint, dtype and options."""
    folder = cache_dir() / "indexes"
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Any] = []
    if Path(head.model).is_dir():
        for path in sorted(Path(head.model).glob("*.safetensors")):
            stat = path.stat()
            files.append([path.name, stat.st_size, stat.st_mtime_ns])
    named = str(Path(head.model).resolve()) if files else head.model
    shape = [head.vocab_size, head.weight.shape[1]]
    key = [named, head.revision, files, shape, dataclasses.asdict(options.codes)]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    return folder / f"{Path(head.model).name}-{digest}"


def _convert(head: Head, options: PluginOptions, folder: Path) -> None:
    """Build the index in a process of its own, whose progress goes to this one's stderr."""
    if head.revision is not None:
        raise FlashHeadError("a revision is given: convert that revision's folder first")
    command = [sys.executable, "-m", "flashhead.cli", "convert", head.model, str(folder)]
    command += ["--index-only", "--json"]
    if head.trust_remote_code:
        raise FlashHeadError("the checkpoint brings its own code: convert it first")
    for name, value in _given(options).items():
        command += ["--set", f"{name}={value}"]
    _log.info(
        "sampling text from %s to build the index of its head, once: about a minute for a small "
        "model on a CPU ...",
        head.model,
    )
    # a process as the user would start it, without the engine's threads pinned and its GPU
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OMP_", "KMP_", "GOMP_", "VLLM_"))
    }
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(
            command,
            env=kept | {"CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.DEVNULL,
            stderr=errors,
            check=False,
        )
        errors.seek(0)
        lines = errors.read().strip().splitlines()
    if done.returncode:
        raise FlashHeadError(lines[-1] if lines else f"convert ended with {done.returncode}")
