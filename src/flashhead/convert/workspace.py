"""Where a folder is made: `.NAME.partial` beside it, renamed when it is whole.

`progress.json` in it says what is made (a fingerprint of source, options and versions) and which
weight files are finished. Ctrl-C or a kill leaves it, and the same command goes on there; any other
error removes it. The lock is on the partial folder itself; the system frees it with its process.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flashhead.convert.checksums import write_whole
from flashhead.errors import FlashHeadError

PROGRESS_FILE = "progress.json"
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Workspace:
    """A context manager; `publish` makes the folder appear.

    Args:
        out: the folder to make.
        fingerprint: JSON-able; work of another fingerprint is thrown away.
        progress: say on stderr what is taken up and what is kept.

    Raises:
        FlashHeadError: on entry: `out` exists, its parent does not or cannot be written to, or
            another process makes the same folder.
    """

    def __init__(self, out: Path, fingerprint: dict[str, Any], progress: bool = True) -> None:
        self.out, self._progress = out, progress
        self.path = out.absolute().parent / f".{out.name}.partial"
        self.folder = self.path / "folder"
        self.finished: dict[str, int] = {}
        """Bytes of the weight files that are whole, by name."""
        self.total: int | None = None
        """How many weight files there will be; None: they are not written one by one."""
        self._fingerprint: dict[str, Any] = json.loads(json.dumps(fingerprint))
        self._lock = -1

    def __enter__(self) -> "Workspace":
        require_new(self.out)
        try:
            self._lock = _locked(self.path, self.out)
            self._take_up()
        except OSError as error:
            self._release()
            raise FlashHeadError(
                f"{self.out}: cannot write to {self.path.parent} ({error.strerror})"
            ) from error
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        interrupted = kind is not None and not issubclass(kind, Exception)
        try:
            if interrupted and self.finished:
                self._say(
                    f"stopped: {self._state()} kept in {self.path.name}; the same command goes on"
                )
            else:
                shutil.rmtree(self.path)
        finally:
            self._release()

    def expect(self, total: int) -> None:
        """Say how many weight files there will be, and how many are there already."""
        self.total = total
        if self.finished:
            self._say(f"resuming: {self._state()} done")

    def finish(self, name: str) -> None:
        """Rename a weight file that was written to `unfinished(name)`, and remember it."""
        path = self.folder / name
        self.unfinished(name).replace(path)
        self.finished[name] = path.stat().st_size
        self._save()

    def unfinished(self, name: str) -> Path:
        """Where a weight file is written until it is whole."""
        return self.folder / f".{name}.partial"

    def publish(self) -> None:
        """Give the folder its name.

        Raises:
            FlashHeadError: something has that name by now.
        """
        if os.path.lexists(self.out):
            raise FlashHeadError(f"{self.out} appeared while converting: nothing is written over")
        self.folder.rename(self.out)

    def _take_up(self) -> None:
        """Keep what an earlier run of the same fingerprint finished, and nothing else."""
        found = _read_progress(self.path)
        if found is not None and found["fingerprint"] == self._fingerprint:
            for name, size in found["finished"].items():
                path = self.folder / name
                if path.is_file() and path.stat().st_size == size:
                    self.finished[name] = size
        elif found is not None:
            self._say("starting again: the source, an option or a version is another than before")
        self.folder.mkdir(exist_ok=True)
        for place in (self.path, self.folder):
            for path in place.iterdir():
                if path != self.folder and path.name not in self.finished:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._save()

    def _save(self) -> None:
        document = {"fingerprint": self._fingerprint, "finished": self.finished}
        write_whole(self.path / PROGRESS_FILE, json.dumps(document, indent=1) + "\n")

    def _state(self) -> str:
        total = len(self.finished) if self.total is None else self.total
        return f"{len(self.finished)} of {total} shards are"

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _say(self, line: str) -> None:
        if self._progress:
            print(line, file=sys.stderr, flush=True)


def require_new(out: Path) -> None:
    """Raise FlashHeadError unless `out` is a new name in a folder that exists."""
    if os.path.lexists(out):
        raise FlashHeadError(f"{out} exists: nothing is written over, name a new folder")
    if not out.absolute().parent.is_dir():
        raise FlashHeadError(f"{out}: its parent folder does not exist")


def require_disk(out: Path, needed_bytes: int) -> None:
    """Raise FlashHeadError unless so many bytes are free where `out` will be."""
    free = shutil.disk_usage(out.absolute().parent).free
    if free < needed_bytes:
        raise FlashHeadError(
            f"{out}: needs {needed_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there"
        )


@contextlib.contextmanager
def told_if_full(out: Path) -> Iterator[None]:
    """Turn a full disk, whichever library ran into it, into one line for the user."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else None
        # the writer of safetensors is not Python: its error is a text
        if number in _FULL or any(f"os error {full}" in str(error) for full in _FULL):
            raise FlashHeadError(f"{out}: the disk is full; what was written is removed") from error
        raise


def _locked(path: Path, out: Path) -> int:
    """Descriptor of the partial folder, made if need be, with its lock held."""
    while True:
        path.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor  # else its maker removed it in between
        except BlockingIOError as error:
            os.close(descriptor)
            raise FlashHeadError(
                f"{out}: another process is making it (it holds the lock of {path.name})"
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _read_progress(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((path / PROGRESS_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    known = isinstance(found, dict) and isinstance(found.get("finished"), dict)
    return found if known and "fingerprint" in found else None
