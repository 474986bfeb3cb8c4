"""Text files that are installed on a machine."""

import hashlib
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from flashhead.errors import FlashHeadError

SUFFIXES = (".py", ".md", ".rst", ".txt")
MOST_FILE_BYTES = 1 << 20
"""Longer files are tables, not text."""
LEAST_FILES = 20


def gather(folders: tuple[str, ...], most_bytes: int, seed: int) -> list[str]:
    """Texts of the folders, no two alike, in an order set by the seed.

    Args:
        folders: searched; (): the running interpreter's library and packages.
        most_bytes: of all texts, counted in characters.
        seed: of the order.

    Raises:
        FlashHeadError: a folder that is not there, or too little text.
    """
    for folder in folders:
        if not Path(folder).is_dir():
            raise FlashHeadError(f"--corpus {folder}: no such folder")
    places = folders or tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib"))
    paths = sorted({path for folder in places for path in _text_files(Path(folder))})
    random.Random(seed).shuffle(paths)
    seen, texts, total = set(), [], 0
    for path in paths:
        text = _read(path)
        key = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if not text.strip() or key in seen:
            continue
        seen.add(key)
        texts.append(text)
        total += len(text)
        if total >= most_bytes:
            break
    if len(texts) < LEAST_FILES:
        raise FlashHeadError(
            f"--corpus: {len(texts)} different text files, wanted {LEAST_FILES} or more"
        )
    return texts


def _text_files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.suffix in SUFFIXES and path.is_file() and path.stat().st_size <= MOST_FILE_BYTES:
            yield path


def _read(path: Path) -> str:
    """A file's text; "" if it is no UTF-8 or may not be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""
