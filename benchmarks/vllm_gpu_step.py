"""What does FlashHead save in a decode step of vLLM on a GPU?

    python benchmarks/vllm_gpu_step.py --json out.json      # four public shapes, made-up weights
    python benchmarks/vllm_gpu_step.py --model FOLDER --json out.json      # a model of yours
    python benchmarks/vllm_gpu_step.py --smoke                  # does it run at all?
    python benchmarks/vllm_gpu_step.py --table out.json         # the table of an earlier run

Each shape is served by three engines, each in a process of its own, with CUDA graphs: FlashHead;
dense, the same model runner with FlashHead switched off; default, dense where FlashHead is not
installed (vLLM 0.25 takes another model runner then). All start side by side and measure in turn, a
card at a time. Greedy decoding, batch 1, 8 and 32.

- step, head, sampler us: time in which the GPU works, from torch's profiler (`gpu_trace.py`)
- share: of what the head alone became faster by, how much the step did
- ms/tok: wall time a token; on a slow host the host, not the GPU, sets it
- path: of FlashHead's rows; beyond the crossover, which the engine measures before its first
  batch (as `flashhead tune` does), they are dense and nothing is saved
- parted: texts of FlashHead that part from the dense head's; each must be a tie in bfloat16

The document is saved after every engine. vLLM is needed, flashhead need not be installed:
`PYTHONPATH=src` is enough. Weights and hidden states: `vllm_gpu_models.py`.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vllm_gpu_shapes import SHAPES
from vllm_gpu_summary import add_summary, table, without_texts

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent / "src"
ENTRY_POINTS = """\
[vllm.general_plugins]
flashhead = flashhead.integrations.vllm.plugin:register

[vllm.logits_processors]
flashhead = flashhead.integrations.vllm.requests:RowNeeds
"""
"""As pyproject.toml has them; a test compares."""
ENGINES = ("dense", "flashhead", "default")
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
LOG_LINES = 60
STOP_SECONDS = 10.0
_begin = time.monotonic()


def say(text: str) -> None:
    """A line of progress."""
    print(f"[{time.monotonic() - _begin:6.1f} s] {text}", file=sys.stderr, flush=True)


def write_plugin(folder: Path) -> Path | None:
    """Metadata of flashhead for a folder on PYTHONPATH, so that vLLM finds its entry points.

    Returns:
        The folder to add; None: flashhead is installed.
    """
    if importlib.metadata.entry_points(group="vllm.general_plugins", name="flashhead"):
        return None
    version = (SOURCE / "flashhead" / "_version.py").read_text().split('"')[1]
    info = folder / f"flashhead-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flashhead\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    return folder


@dataclasses.dataclass
class Child:
    """A process that reads a job and writes a JSON file."""

    label: str
    process: subprocess.Popen[bytes]
    out: Path
    log: Path
    started: float

    def result(self) -> dict[str, Any]:
        """What it wrote; else `failed`, and the end of its log on stderr."""
        code = self.process.poll()
        say(f"{self.label}: ended with {code} after {time.monotonic() - self.started:.0f} s")
        if code == 0 and self.out.exists():
            found: dict[str, Any] = json.loads(self.out.read_text())
            return found
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        print("\n".join([f"--- {self.label}", *lines, "---"]), file=sys.stderr, flush=True)
        last = next((line for line in reversed(lines) if line.strip()), "no output")
        return {"failed": f"ended with {code}: {last.strip()[:300]}"}


class Bench:
    """All children and the document.

    Args:
        args: of the command line.
        work: folder for models, jobs and logs.
    """

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work
        self.gate = work / "gate"
        self.gate.mkdir()
        plugin = write_plugin(work / "plugin")
        paths = [str(SOURCE), *([str(plugin)] if plugin else []), os.environ.get("PYTHONPATH", "")]
        self.path = os.pathsep.join(path for path in paths if path)
        self.children: list[Child] = []
        names = [args.model.rstrip("/").rsplit("/", 1)[-1]] if args.model else args.shapes
        cards = args.gpus.split(",")
        self.cards = {name: cards[i % len(cards)] for i, name in enumerate(names)}
        self.document: dict[str, Any] = {
            "benchmark": "vllm_gpu_step",
            "finished": False,
            "arguments": {k: v for k, v in vars(args).items() if k not in ("work", "table")},
            "shapes": {},
        }
        self.texts: dict[str, dict[str, Any]] = {}

    def start(self, program: str, label: str, card: str, job: dict[str, Any], **more: str) -> Child:
        """Start a child with a job."""
        job_path, out = self.work / f"{label}.job.json", self.work / f"{label}.json"
        log = self.work / f"{label}.log"
        job_path.write_text(json.dumps(job | {"out": str(out), "label": label}))
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": self.path, **more}
        if card != "all":
            environment["CUDA_VISIBLE_DEVICES"] = card
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, str(HERE / program), str(job_path)],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        say(f"{label}: started on card {card}")
        child = Child(label, process, out, log, time.monotonic())
        self.children.append(child)
        return child

    def start_engines(self, name: str, made: dict[str, Any], kinds: list[str]) -> dict[str, Child]:
        """Engines of a shape, all on its card."""
        args, card = self.args, self.cards[name]
        job = {
            "model": made["model"],
            "options": made["options"],
            "crossover": args.crossover,
            "batches": args.batches,
            "reps": args.reps,
            "prompt_tokens": 128,
            "tokens": args.tokens,
            "profiled_tokens": min(64, args.tokens),
            "gate": str(self.gate),
            "engines": len(self.cards) * len(args.kinds),
            "lock": str(self.work / f"card-{card}.lock"),
            "arguments": args.engine_arguments,
        }
        return {
            kind: self.start(
                "vllm_gpu_engine.py",
                f"{name}.{kind}",
                card,
                job | {"engine": kind},
                FLASHHEAD_ENABLED="1" if kind == "flashhead" else "0",
            )
            for kind in kinds
        }

    def run(self) -> None:
        """Make models, start engines as soon as theirs is there, and collect what they measure."""
        makers: dict[str, Child] = {}
        for name, card in self.cards.items():
            job = {"folder": str(self.work / f"model-{name}"), "shape": name}
            job |= {"model": self.args.model} if self.args.model else {}
            makers[name] = self.start("vllm_gpu_models.py", f"{name}.make", card, job)
            self.document["shapes"][name] = {"crossover": self.args.crossover, "engines": {}}
            self.texts[name] = {}
        self.document |= _provenance()  # torch is imported while the children work
        running: dict[tuple[str, str], Child] = {}
        while makers or running:
            time.sleep(0.2)
            for name, child in list(makers.items()):
                if child.process.poll() is not None:
                    del makers[name]
                    self.document["shapes"][name]["model"] = made = child.result()
                    kinds = [kind for kind in _kinds(made) if kind in self.args.kinds]
                    for kind in self.args.kinds:
                        if kind not in kinds:
                            self.open_gate(f"{name}.{kind}")
                    if kinds:
                        engines = self.start_engines(name, made, kinds)
                        running |= {(name, kind): own for kind, own in engines.items()}
            for (name, kind), child in list(running.items()):
                if child.process.poll() is not None:
                    del running[name, kind]
                    self.open_gate(child.label)  # one that died early must not hold up the others
                    self.texts[name][kind] = child.result()
                    self.save()
        self.document["finished"] = True
        self.save()

    def open_gate(self, label: str) -> None:
        """Do not wait for this engine."""
        (self.gate / f"{label}.started").touch()

    def save(self) -> None:
        """Bring the document up to date and write it."""
        for name, engines in self.texts.items():
            shape = self.document["shapes"][name]
            shape["engines"] = engines
            add_summary(shape)
            if "failed" in shape.get("model", {}):
                shape["errors"].append(f"model: {shape['model']['failed']}")
            shape["engines"] = {kind: without_texts(own) for kind, own in engines.items()}
        self.document["seconds"] = round(time.monotonic() - _begin, 1)
        if self.args.json:
            path = Path(self.args.json)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(path.name + ".partial")
            partial.write_text(json.dumps(self.document, indent=1) + "\n")
            partial.rename(path)

    def stop(self) -> None:
        """End all children, with whatever they have started."""
        left = [child for child in self.children if child.process.poll() is None]
        for number in (signal.SIGTERM, signal.SIGKILL):
            for child in left:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.process.pid, number)
            deadline = time.monotonic() + STOP_SECONDS
            while left and time.monotonic() < deadline:
                left = [child for child in left if child.process.poll() is None]
                time.sleep(0.05)


def _provenance() -> dict[str, Any]:
    sys.path.insert(0, str(SOURCE))
    from flashhead.environment import provenance

    return provenance()


def _kinds(made: dict[str, Any]) -> list[str]:
    """Engines that a model can have: without the plugin vLLM refuses what names FlashHead."""
    if "failed" in made:
        return []
    config = json.loads((Path(made["model"]) / "config.json").read_text())
    method = config.get("quantization_config", {}).get("quant_method")
    return [kind for kind in ENGINES if kind != "default" or method != "flashhead"]


def parse(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=list(SHAPES))
    parser.add_argument("--model", metavar="FOLDER", help="a real model instead of the shapes")
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(ENGINES))
    parser.add_argument("--batches", type=_numbers, default=[1, 8, 32])
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--gpus", default="0", help="cards, as 0,1; a shape stays on one")
    parser.add_argument(
        "--crossover",
        type=lambda text: None if text == "auto" else int(text),
        metavar="ROWS",
        help="rows up to which FlashHead searches (default: auto, measured once all have started)",
    )
    parser.add_argument("--engine-arguments", type=json.loads, default={}, help="JSON, for vLLM")
    parser.add_argument("--work", help="folder for models and logs, kept (default: temporary)")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--table", metavar="FILE", help="print an earlier document's table")
    parser.add_argument("--smoke", action="store_true", help="a small shape, short texts")
    args = parser.parse_args(given)
    unknown = sorted(set(args.shapes) - set(SHAPES))
    if unknown:
        parser.error(f"--shapes {unknown[0]}: wanted some of {', '.join(SHAPES)}")
    if not {"dense", "flashhead"} <= set(args.kinds) <= set(ENGINES):
        parser.error(f"--kinds {','.join(args.kinds)}: wanted dense,flashhead, maybe default")
    if max(args.batches) > 32 or min(args.batches) < 1:
        parser.error("--batches: wanted 1 to 32")
    if args.tokens < 16:
        parser.error(f"--tokens {args.tokens}: wanted 16 or more")
    if args.work and Path(args.work).exists() and any(Path(args.work).iterdir()):
        parser.error(f"--work {args.work}: wanted an empty folder or a new one")
    if args.smoke:
        args.shapes, args.batches, args.reps, args.tokens = ["smoke"], [1, 8], 2, 48
    return args


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    args = parse()
    if args.table:
        print(table(json.loads(Path(args.table).read_text())))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with contextlib.ExitStack() as stack:
        work = Path(args.work or stack.enter_context(tempfile.TemporaryDirectory(prefix="step-")))
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(args, work.resolve())
        try:
            bench.run()
        finally:
            bench.stop()
            bench.save()
    print(table(bench.document))
    print(json.dumps({"json": args.json, "seconds": bench.document["seconds"]}))
    return 1 if any(shape["errors"] for shape in bench.document["shapes"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
