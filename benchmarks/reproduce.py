"""Run the evaluation behind every figure of README, in an order that needs nothing by hand.

    make reproduce                                    # what is not there by today's code
    make reproduce ARGS="--list"                      # steps, what is there, how old
    make reproduce ARGS="--only certified-gemma-3-270m,readme"
    make reproduce ARGS="--data-dir DIR --qwen-0.5b DIR --qwen-1.5b DIR --out DIR --json"

The same command goes on after Ctrl-C or a failure. Exit codes: 0 done, 1 a step failed, 2 a mistake
in the command line, 130 Ctrl-C.
"""

import argparse
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from reproduce_plan import (
    QWEN_OPTIONS,
    RESULTS,
    Task,
    all_steps,
    minutes,
    plan,
    run_tasks,
    say,
    span,
)
from reproduce_run import ROOT, Place, command_line, prepare
from reproduce_step import Step

from flashhead.errors import FlashHeadError

VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"


def print_list(tasks: dict[str, Task], place: Place, stream: TextIO) -> None:
    """A line a step."""
    for task in tasks.values():
        own = task.step
        needs = ",".join((*own.needs, *own.models)) or "cpu"
        state = f"left out: {task.reason}" if task.state == "left out" else task.state
        there = "; ".join(filter(None, (state, age(own, place))))
        line = f"{own.name:<46} {span(minutes(own, place)):>8}  {needs:<30} {there}"
        print(line, file=stream)


def age(step: Step, place: Place) -> str:
    """How old what is there is: of the commit that a document names, else of its file."""
    paths = [place.results / name for name in step.documents]
    if not paths or not all(path.exists() for path in paths):
        return "not there" if paths else ""
    path = paths[0]
    commit = str(json.loads(path.read_text()).get("git_sha")) if path.suffix == ".json" else "None"
    line = ["git", "-C", str(ROOT), "show", "-s", "--format=%ct", commit.removesuffix("-dirty")]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    seconds = time.time() - (float(done.stdout) if done.returncode == 0 else path.stat().st_mtime)
    by = "" if commit == "None" else f", by {commit[:9]}{'-dirty' * commit.endswith('-dirty')}"
    return f"there, {seconds / 86400:.1f} days old{by}"


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="reproduce.py", description=(__doc__ or "").split("\n")[0])
    found.add_argument("--only", metavar="NAME,..", help="these steps, and what they are made from")
    found.add_argument("--list", action="store_true", help="print the steps and what is there")
    found.add_argument("--dry-run", action="store_true", help="print the commands, run none")
    found.add_argument("--again", action="store_true", help="also what is there by today's code")
    found.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="of the documents")
    found.add_argument("--work", type=Path, default=ROOT / "out" / "reproduce", metavar="DIR")
    data = Path(os.environ.get("FLASHHEAD_DATA", "data"))
    text = (
        "holds wikitext2-valid.txt, mmlu/, gsm8k-train.jsonl (default: FLASHHEAD_DATA, else data)"
    )
    found.add_argument("--data-dir", type=Path, default=data, metavar="DIR", help=text)
    for name, model in QWEN_OPTIONS.items():
        variable = f"FLASHHEAD_{name.upper().replace('-', '_').replace('.', '_')}"
        given = os.environ.get(variable)
        text = f"folder of {model} (default: {variable})"
        found.add_argument(f"--{name}", dest=model, metavar="DIR", default=given, help=text)
    found.add_argument("--vllm-python", metavar="FILE", help="a Python with vLLM and flashhead")
    found.add_argument("--json", action="store_true", help="last line of stdout: one document")
    return found


def place_of(args: argparse.Namespace) -> Place:
    """Folders and programs of the command line.

    Raises:
        FlashHeadError: a folder or program that is given is not there.
    """
    qwen = {
        model: Path(given) for model in QWEN_OPTIONS.values() if (given := getattr(args, model))
    }
    for model, folder in qwen.items():
        if not (folder / "config.json").is_file():
            raise FlashHeadError(f"{model}: {folder} holds no config.json")
    vllm = args.vllm_python
    if vllm is not None and not Path(vllm).is_file():
        raise FlashHeadError(f"--vllm-python {vllm}: no such file")
    if vllm is None and importlib.util.find_spec("vllm") is not None:
        vllm = sys.executable
    elif vllm is None and VLLM_PYTHON.exists():
        vllm = str(VLLM_PYTHON)
    return Place(args.work.resolve(), args.out.resolve(), args.data_dir, qwen, vllm)


def names_of(text: str | None, steps: tuple[Step, ...]) -> tuple[str, ...]:
    """What `--only` lists.

    Raises:
        FlashHeadError: an unknown name.
    """
    given = tuple(text.split(",")) if text else ()
    unknown = [name for name in given if name not in {own.name for own in steps}]
    if unknown:
        raise FlashHeadError(f"--only {unknown[0]}: no such step, see --list")
    return given


def reproduce(args: argparse.Namespace, steps: tuple[Step, ...]) -> tuple[int, dict[str, Any]]:
    """Plan, then list, print or run; exit code and document."""
    place, started = place_of(args), time.monotonic()
    tasks = plan(steps, place, names_of(args.only, steps), args.again)
    code = 0
    if args.list:
        print_list(tasks, place, sys.stderr if args.json else sys.stdout)
    elif args.dry_run:
        for task in tasks.values():
            if task.state == "run":
                say(shlex.join(command_line(task.step, place)))
    else:
        prepare(place)
        try:
            run_tasks(tasks, place, args.again)
        except KeyboardInterrupt:
            say("\nstopped; the same command goes on")
            code = 130
        code = code or int(any(task.state == "failed" for task in tasks.values()))
    if not args.list:
        summarise(tasks)
    seconds = round(time.monotonic() - started, 1)
    states = {
        name: {"state": task.state, "reason": task.reason, "seconds": round(task.seconds, 1)}
        for name, task in tasks.items()
    }
    return code, {"steps": states, "seconds": seconds}


def summarise(tasks: dict[str, Task]) -> None:
    """How many of each, then what was left out and why, then what failed."""
    counts: dict[str, int] = {}
    for task in tasks.values():
        counts[task.state] = counts.get(task.state, 0) + 1
    say(", ".join(f"{count} {state}" for state, count in counts.items()))
    reasons = dict.fromkeys(task.reason for task in tasks.values() if task.state == "left out")
    for reason in reasons:
        own = [name for name, task in tasks.items() if task.reason == reason]
        say(f"left out ({reason}): {', '.join(own)}")
    for name, task in tasks.items():
        if task.state in ("failed", "not run"):
            say(f"{task.state}: {name}: {task.reason}")


def main(given: list[str] | None = None, steps: tuple[Step, ...] | None = None) -> int:
    args = parser().parse_args(given)
    for heard in (signal.SIGINT, signal.SIGTERM):  # a job in the background ignores the first
        signal.signal(heard, signal.default_int_handler)
    try:
        code, document = reproduce(args, steps or all_steps(args.out))
    except FlashHeadError as error:
        say(f"reproduce.py: {error}")
        return 2
    if args.json:
        print(json.dumps(document))
    return code


if __name__ == "__main__":
    sys.exit(main())
