"""The SHA-256 of every file of a model folder, in a file beside them.

`flashhead.sha256.json` holds `{"format_version": 1, "files": {name: {"bytes", "sha256"}}}`. The
card and its measurements may be written again later, so they are not in it. It finds damage and
mix-ups; it is no signature, for whoever changes a file can change the list.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from flashhead.convert.files import (
    CARD_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    MEASURED_FILE,
    model_files,
    read_config,
)
from flashhead.errors import FlashHeadError

FORMAT_VERSION = 1
UNLISTED = (MANIFEST_FILE, CARD_FILE, MEASURED_FILE)


def write_checksums(folder: Path) -> Path:
    """Write the list for the files that are there now; one that is there is replaced.

    Args:
        folder: a whole model folder.

    Returns:
        The file.

    Raises:
        FlashHeadError: the folder holds no model.
    """
    names = [name for name in model_files(folder).kept if name not in UNLISTED]
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
        for name in names
    }
    document = {"format_version": FORMAT_VERSION, "files": files}
    return write_whole(folder / MANIFEST_FILE, json.dumps(document, indent=1) + "\n")


def read_checksums(folder: Path) -> dict[str, dict[str, Any]] | None:
    """`{name: {"bytes": int, "sha256": str}}`, or None without the file.

    Raises:
        FlashHeadError: it is there and damaged, or names files outside of the folder.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format_version"] != FORMAT_VERSION:
            found = document["format_version"]
            raise FlashHeadError(f"{MANIFEST_FILE}: version {found!r}, wanted {FORMAT_VERSION}")
        files = {
            name: {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}
            for name, entry in document["files"].items()
        }
    except FlashHeadError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FlashHeadError(f"{MANIFEST_FILE}: not a list of checksums ({error})") from error
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise FlashHeadError(f"{MANIFEST_FILE}: {name!r} is outside of the folder")
    return files


def check_checksums(folder: Path) -> str:
    """Compare every file with the list, and the index with config.json.

    Returns:
        What was compared, for people.

    Raises:
        FlashHeadError: the file that is missing, of another length, or altered.
    """
    listed = read_checksums(folder)
    if listed is None:
        return f"{_check_index(folder)}; there is no {MANIFEST_FILE}, so weights are not compared"
    for name, entry in listed.items():
        path = folder / name
        if not path.is_file():
            raise FlashHeadError(f"{name}: missing, but {MANIFEST_FILE} names it")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise FlashHeadError(f"{name}: {size:,} bytes, {MANIFEST_FILE} says {entry['bytes']:,}")
        if file_sha256(path) != entry["sha256"]:
            raise FlashHeadError(f"{name}: altered, its SHA-256 is not that of {MANIFEST_FILE}")
    said = f"{len(listed)} files, {_check_index(folder)}"
    extra = set(model_files(folder).kept) - {*listed, *UNLISTED}
    return said + (f"; not in the list: {', '.join(sorted(extra))}" if extra else "")


def _check_index(folder: Path) -> str:
    section = read_config(folder).get("flashhead")
    if not isinstance(section, dict):
        return "no index"
    if file_sha256(folder / INDEX_FILE) != section.get("index_sha256"):
        raise FlashHeadError(f"{INDEX_FILE}: altered, its SHA-256 is not that of config.json")
    return "the index as config.json says"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, text: str) -> Path:
    """Write a text file under another name, then rename it, so that it is never there in part."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
