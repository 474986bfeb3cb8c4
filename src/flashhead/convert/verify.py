"""Whether a converted folder is whole and says what its own dense head says.

Steps in order of cost: files, checksums, reload, positions, against (the model it was made from),
speed. The first step that fails ends the run: what comes after it would measure a broken model.
Nothing is written into the folder. `check_quickly` is the part that needs no model in memory.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flashhead.convert.checksums import check_checksums
from flashhead.convert.files import check_files, read_config
from flashhead.errors import FlashHeadError

DAMAGE = (ValueError, RuntimeError, OSError, KeyError, TypeError, AttributeError)
"""What a config.json that was edited makes a loader raise."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One check: its name, whether it passed, and a line on what was found."""

    name: str
    ok: bool
    found: str


@dataclasses.dataclass(frozen=True)
class VerifyOptions:
    """What is verified beside the files.

    Args:
        against: name of the model that the folder was made from, or None.
        positions: hidden states that are measured.
        data: `.txt` or `.jsonl`; None: text that the base samples, or the model without a base.
        prompts: texts that generation is timed on.
        seed: of the text that is sampled or drawn.
        progress: progress bars on stderr.
    """

    against: str | None = None
    positions: int = 512
    data: Path | None = None
    prompts: Sequence[str] = ()
    seed: int = 0
    progress: bool = True


def check_quickly(folder: Path, say: Callable[[Step], None]) -> bool:
    """Files and checksums.

    Args:
        folder: the model's.
        say: is told of each step as it ends.
    """
    return _step("files", lambda: check_files(folder), say) and _step(
        "checksums", lambda: check_checksums(folder), say
    )


def verify(folder: Path, options: VerifyOptions, say: Callable[[Step], None]) -> dict[str, Any]:
    """Run every step.

    Args:
        folder: what `flashhead convert` wrote.
        options: what to verify.
        say: is told of each step as it ends.

    Returns:
        JSON-able: `ok`, `steps`, and what was measured: `positions`, `against`, `speed` (None: not
        reached or not asked for), with `flashhead.environment` provenance.

    Raises:
        FlashHeadError: a text or base that cannot be used.
    """
    steps: list[Step] = []

    def note(step: Step) -> None:
        steps.append(step)
        say(step)

    measured: dict[str, Any] = {"positions": None, "against": None, "speed": None}
    ok = check_quickly(folder, note) and _check_model(folder, options, measured, note)
    from flashhead.environment import provenance

    section = read_config(folder).get("flashhead") if steps[0].ok else None
    return {
        "folder": folder.resolve().name,
        "ok": ok,
        "steps": [dataclasses.asdict(step) for step in steps],
        **measured,
        "index_sha256": None if section is None else section.get("index_sha256"),
        **_without_places(provenance()),
    }


def _check_model(
    folder: Path, options: VerifyOptions, into: dict[str, Any], say: Callable[[Step], None]
) -> bool:
    """Steps that need the model in memory; their figures go `into` the document."""
    from flashhead.convert.verify_model import LoadedFolder

    loaded = LoadedFolder(folder, options)
    if not _step("reload", loaded.reload, say, DAMAGE):
        return False
    loaded.prepare()
    return all(_step(name, step, say) for name, step in loaded.steps(into).items())


def _step(
    name: str,
    check: Callable[[], str],
    say: Callable[[Step], None],
    errors: tuple[type[Exception], ...] = (FlashHeadError, RuntimeError, OSError),
) -> bool:
    """Run a check; `errors` are what a damaged folder makes it raise."""
    try:
        step = Step(name, True, check())
    except errors as error:
        step = Step(name, False, " ".join(str(error).split()) or type(error).__name__)
    say(step)
    return step.ok


def _without_places(document: dict[str, Any]) -> dict[str, Any]:
    """Provenance whose command line names files and folders without where they lie."""
    argv = [Path(word).name if "/" in word else word for word in document["argv"]]
    return document | {"argv": argv}
