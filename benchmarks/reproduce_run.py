"""How `make reproduce` runs a step: in a working folder, whole documents or none, once by a code.

`steps/NAME.json` in the working folder says with which code, by its SHA-256, a step was begun or
done. A document of an earlier checkout is current, too, if its commit's code is today's.
"""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from reproduce_step import FIRST_HALF, SECOND_HALF, TEXT, Step

from flashhead.errors import FlashHeadError

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("readme.py", "reproduce.py", "reproduce_*.py")
"""Scripts that measure nothing."""
SECONDS_TO_END = 30


class StepError(Exception):
    """A step ended with an error; the text is one line."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Folders and programs of a run."""

    work: Path
    results: Path
    data: Path
    qwen: Mapping[str, Path]
    vllm_python: str | None = None
    python: str = sys.executable

    def journal(self, step: Step) -> dict[str, Any]:
        path = self.work / "steps" / f"{step.name}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def note(self, step: Step, **fields: Any) -> None:
        path = self.work / "steps" / f"{step.name}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"code": code(), "command": step.command, **fields}))
        partial.replace(path)


def prepare(place: Place) -> None:
    """Make the working folder, and what its commands read."""
    for folder in (place.results, *(place.work / name for name in ("out", "steps", "logs"))):
        folder.mkdir(parents=True, exist_ok=True)
    text = place.data / TEXT
    if not text.is_file():
        raise FlashHeadError(f"--data-dir {place.data}: wanted a folder with {TEXT}")
    links = {"data": place.data, "results": place.results, TEXT: text, **place.qwen}
    for name, target in links.items():
        link = place.work / name
        link.unlink(missing_ok=True)
        link.symlink_to(target.resolve())
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    for name, half in (
        (FIRST_HALF, slice(len(lines) // 2)),
        (SECOND_HALF, slice(len(lines) // 2, None)),
    ):
        (place.work / name).write_text("".join(lines[half]), encoding="utf-8")


@functools.cache
def code() -> str:
    """SHA-256 of what measures: the package and the scripts beside this one."""
    tools = {path for pattern in TOOLS for path in (ROOT / "benchmarks").glob(pattern)}
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "src").rglob("*.json")]
    files += [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "benchmarks").glob("*.cu")]
    files += (ROOT / "examples").rglob("*.py")
    digest = hashlib.sha256()
    for path in sorted(set(files) - tools):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@functools.cache
def same_code_since(commit: str) -> bool:
    """Whether a commit's measuring code is that of the working tree; False: not a known commit."""
    tools = [f":(exclude)benchmarks/{pattern}" for pattern in TOOLS]
    paths = ("src", "examples", "benchmarks/*.py", "benchmarks/*.cu", *tools)
    command = ["git", "-C", str(ROOT), "diff", "--quiet", commit, "--", *paths]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def is_current(step: Step, place: Place) -> bool:
    """Whether what a step writes and makes is there, by today's code."""
    if not all((place.results / name).exists() for name in step.documents):
        return False
    if not all((place.work / name).exists() for name in step.makes):
        return False
    journal = place.journal(step)
    if journal.get("done") and journal["code"] == code():
        written = {name: sha256(place.results / name) for name in step.documents}
        return journal["command"] == list(step.command) and journal["documents"] == written
    if step.makes or not step.documents:
        return False
    documents = [name for name in step.documents if name.endswith(".json")]
    commits = [
        str(json.loads((place.results / name).read_text()).get("git_sha")) for name in documents
    ]
    return all(same_code_since(commit) for commit in commits)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def command_line(step: Step, place: Place) -> list[str]:
    """The program and its arguments."""
    python = place.vllm_python if "vllm" in step.needs and place.vllm_python else place.python
    program, *words = step.command
    if program == "flashhead":
        return [python, "-m", "flashhead", *words]
    folder = "examples" if (ROOT / "examples" / program).is_file() else "benchmarks"
    return [python, str(ROOT / folder / program), *words]


def run_step(step: Step, place: Place, again: bool = False) -> float:
    """Run it and keep its documents; returns its seconds.

    Raises:
        StepError: it failed, or did not write what it should.
        KeyboardInterrupt: after its program has ended.
    """
    begun = place.journal(step)
    anew = again or begun.get("done") or begun.get("code") != code()
    remove(place.work / name for name in (*step.makes, *(step.keeps if anew else ())))
    remove(place.work / "out" / name for name in step.documents)
    place.note(step, done=False)
    started = time.monotonic()
    log, printed = (place.work / "logs" / f"{step.name}.{kind}" for kind in ("log", "stdout"))
    with log.open("w") as errors, printed.open("w") as output:
        status = child(step, place, output if step.prints else errors, errors)
    if status:
        raise StepError(f"exit code {status}: {last_line(log)} ({log})")
    if step.prints:
        (place.work / "out" / step.documents[0]).write_text(last_line(printed) + "\n")
    for name in step.documents:
        keep(place.work / "out" / name, place.results / name)
    lacking = [name for name in step.makes if not (place.work / name).exists()]
    if lacking:
        raise StepError(f"did not make {lacking[0]} ({log})")
    seconds = time.monotonic() - started
    written = {name: sha256(place.results / name) for name in step.documents}
    place.note(step, done=True, seconds=round(seconds, 1), documents=written)
    return seconds


def child(step: Step, place: Place, output: IO[str], errors: IO[str]) -> int:
    """Exit status of its program. Ctrl-C is passed on, and waited for."""
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command_line(step, place),
        cwd=place.work,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=errors,
        env=environment,
        start_new_session=True,
    )
    try:
        return process.wait()
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        raise


def keep(made: Path, kept: Path) -> None:
    """Move a document to the results, whole.

    Raises:
        StepError: it is not there, or not JSON.
    """
    if not made.exists():
        raise StepError(f"did not write {made.name}")
    if made.suffix == ".json":
        try:
            json.loads(made.read_text(encoding="utf-8"))
        except ValueError as error:
            raise StepError(f"{made.name} is not JSON: {error}") from error
    partial = kept.with_name(f".{kept.name}.partial")
    shutil.copyfile(made, partial)
    partial.replace(kept)
    made.unlink()


def remove(paths: Iterable[Path]) -> None:
    """Files or folders of earlier runs, or nothing."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
