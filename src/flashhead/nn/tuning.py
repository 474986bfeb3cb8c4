"""`tune.json` in FlashHead's cache folder: what was measured on this machine, to be measured once.

A crossover is kept under everything that decides it (`TuneKey`): another number of threads, another
GPU, index or version is another entry. The file is written whole under a temporary name and renamed
while a lock is held, so two processes lose nothing of each other. One that cannot be read, or that
holds anything out of range, counts for nothing as a whole: the next measurement writes it anew.

No torch here: `flashhead tune --list` answers at once. FLASHHEAD_TUNE_CACHE=0 turns the file off.
"""

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any, TypeVar

from flashhead.errors import FlashHeadError
from flashhead.models import cache_dir

ROW_COUNTS = (1, 2, 4, 8, 16, 32, 64)
"""Batch sizes that are timed."""
FORMAT_VERSION = 1
MOST_ENTRIES = 256
"""The oldest ones beyond it are dropped."""
MOST_BYTES = 1 << 20
LOCK_SECONDS = 10.0
SWITCH = "FLASHHEAD_TUNE_CACHE"
T = TypeVar("T", "Crossover", "TuneKey")


@dataclasses.dataclass(frozen=True)
class Crossover:
    """Largest of 1, 2, 4, ... 64 rows up to which a search beats the dense product; 0: none.

    Args:
        logits: for complete logits, `head.search`.
        token: for the certified token, `head.next_token`.
    """

    logits: int
    token: int

    def __post_init__(self) -> None:
        for name, rows in dataclasses.asdict(self).items():
            if type(rows) is not int or rows not in (0, *ROW_COUNTS):
                wanted = ", ".join(map(str, (0, *ROW_COUNTS)))
                raise FlashHeadError(f"crossover {name}={rows!r}: wanted one of {wanted}")


@dataclasses.dataclass(frozen=True)
class TuneKey:
    """What decides a crossover; `nn/crossover.py` makes it from a head.

    Args:
        device: name of the GPU, or of the CPU with its threads.
        impl: implementation that searches.
        head: "codes" or "clusters".
        vocab_size: rows V of the head.
        hidden_size: dimensions d of the head.
        dtype: of the weight.
        bias: whether the head has one.
        layout: of the index, and how it is searched.
        states: what was searched for: "model" (hidden states of the model) or "random".
        versions: of the packages that run.
    """

    device: str
    impl: str
    head: str
    vocab_size: int
    hidden_size: int
    dtype: str
    bias: bool
    layout: str
    states: str
    versions: str


@dataclasses.dataclass(frozen=True)
class Entry:
    """One crossover that was measured.

    Args:
        key: where and of what.
        crossover: the result.
        pairs: interleaved timings of search and dense product behind each median.
    """

    key: TuneKey
    crossover: Crossover
    pairs: int


def cache_is_on() -> bool:
    """Whether `tune.json` may be read and written."""
    return os.environ.get(SWITCH) != "0"


def tune_file() -> Path:
    """Where the measurements are kept.

    Raises:
        FlashHeadError: there is no home folder and `FLASHHEAD_CACHE` names no other place.
    """
    try:
        return cache_dir() / "tune.json"
    except RuntimeError as error:  # pathlib's, for a home that it cannot find
        raise FlashHeadError(f"no cache folder ({error}): FLASHHEAD_CACHE names one") from error


def read_entries() -> list[Entry]:
    """Everything that is kept, the oldest first; [] without a file.

    Raises:
        FlashHeadError: the file is not readable, or holds anything that this version did not write.
    """
    path = tune_file()
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES:,} bytes")
        return _entries_of(json.loads(text))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise FlashHeadError(f"{path} is not usable ({reason})") from error


def find_entry(key: TuneKey) -> Entry | None:
    """What was measured for exactly this key, or None.

    Raises:
        FlashHeadError: the file cannot be used.
    """
    return next((entry for entry in reversed(read_entries()) if entry.key == key), None)


def store_entry(entry: Entry) -> Path:
    """Keep an entry, in place of the one with its key, and return the file.

    Raises:
        FlashHeadError: the file cannot be written.
    """
    from filelock import FileLock

    path = tune_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=LOCK_SECONDS):
            kept = [old for old in _usable_entries() if old.key != entry.key]
            _write(path, [*kept, entry][-MOST_ENTRIES:])
    except OSError as error:
        raise FlashHeadError(
            f"{path} cannot be written ({error.strerror or error}); FLASHHEAD_CACHE moves the cache"
        ) from error
    return path


def clear_entries() -> bool:
    """Remove the file, readable or not; whether there was one.

    Raises:
        FlashHeadError: it cannot be removed.
    """
    path = tune_file()
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise FlashHeadError(f"{path} cannot be removed ({error.strerror})") from error
    return True


def _usable_entries() -> list[Entry]:
    """What a write keeps: nothing of a file that cannot be used."""
    try:
        return read_entries()
    except FlashHeadError:
        return []


def _write(path: Path, entries: list[Entry]) -> None:
    document = {
        "format_version": FORMAT_VERSION,
        "entries": [dataclasses.asdict(entry) for entry in entries],
    }
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}.partial-", delete=False, encoding="utf-8"
    ) as partial:
        name = Path(partial.name)
        try:
            partial.write(json.dumps(document, indent=1) + "\n")
            partial.close()
            name.replace(path)
        except BaseException:
            name.unlink(missing_ok=True)
            raise


def _entries_of(document: Any) -> list[Entry]:
    """The entries of a parsed file; ValueError for whatever this version did not write."""
    if not isinstance(document, dict) or not isinstance(document.get("entries"), list):
        raise ValueError("no list of entries")
    if document.get("format_version") != FORMAT_VERSION:
        found = document.get("format_version")
        raise ValueError(f"format version {found!r}, wanted {FORMAT_VERSION}")
    return [_entry_of(value) for value in document["entries"]]


def _entry_of(value: Any) -> Entry:
    if not isinstance(value, dict) or set(value) != {"key", "crossover", "pairs"}:
        raise ValueError("an entry without key, crossover and pairs")
    if type(value["pairs"]) is not int or value["pairs"] < 1:
        raise ValueError(f"pairs={value['pairs']!r}: wanted an integer, 1 or more")
    key, crossover = _fields_of(TuneKey, value["key"]), _fields_of(Crossover, value["crossover"])
    return Entry(key, crossover, value["pairs"])


def _fields_of(cls: type[T], value: Any) -> T:
    """A dataclass from JSON: these fields, of these types, and no others."""
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    if not isinstance(value, dict) or set(value) != set(fields):
        raise ValueError(f"{cls.__name__} without the fields {', '.join(fields)}")
    for name, kind in fields.items():
        if type(value[name]) is not kind:
            raise ValueError(f"{cls.__name__}: {name} is of type {type(value[name]).__name__}")
    return cls(**value)
