"""Dense and FlashHead engines of vLLM side by side, on one or several GPUs: tokens and times.

    python benchmarks/vllm_gpu_parallel.py --tensor-parallel 2 --json out.json
    python benchmarks/vllm_gpu_parallel.py --model FOLDER --pairs 40       # a model of yours
    python benchmarks/vllm_gpu_parallel.py --device cpu --tensor-parallel 2 --shapes tiny
    python benchmarks/vllm_gpu_parallel.py --table out.json     # the table of an earlier run

Both engines of a shape are alive on the same cards and decode the same prompts greedily in turn,
now the one and now the other first. Speeds of the host that change from second to second meet both,
so what counts is the median, over the pairs, of the two times' ratio. `--stock` adds a third
engine, dense where flashhead is not installed (vLLM 0.25 takes another model runner then).

- ms/tok: wall time a token behind the first; ratio: dense over FlashHead, above 1 FlashHead is
  faster; p10-p90 of the pairs
- path: rows searched and rows dense of the timed texts; the crossover is measured at load
- parted: texts that part from the dense engine's. At the token where two part the dense engine,
  given both texts' common start, must have the two tokens within two steps of bfloat16.

The document is saved after every shape; exit code 1 if any text parts otherwise.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vllm_gpu_served import ENVIRONMENT, ON_A_CPU, ON_A_GPU, SETTINGS, Engine, EngineError, closing
from vllm_gpu_shapes import SHAPES
from vllm_gpu_step import HERE, SOURCE, say, write_plugin
from vllm_gpu_summary import ULPS, bf16_step

WORKER = "flashhead.integrations.vllm.worker.FlashHeadWorker"
SHAPES_HERE = ("llama-3.2-1b", "qwen3-0.6b", "gemma-3-270m")
PROMPT_TOKENS = 32
TOLD_LOGITS = 20
"""Largest logits that the dense engine tells where texts part: vLLM's own limit."""


class Workplace:
    """A folder with models, logs and the plugin's metadata, and what child processes need.

    Args:
        folder: empty.
        device: "cuda" or "cpu".
    """

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        plugin = write_plugin(folder / "plugin")
        given = os.environ.get("PYTHONPATH", "")
        self.stock_path = os.pathsep.join(path for path in (str(SOURCE), given) if path)
        self.path = self.stock_path if plugin is None else f"{plugin}{os.pathsep}{self.stock_path}"
        self.is_installed = plugin is None

    def make(
        self,
        jobs: dict[str, dict[str, Any]],
        program: str = "vllm_gpu_models.py",
        there: str | None = None,
    ) -> dict[str, Any]:
        """Run a program for each job, side by side: what it told of each.

        Args:
            jobs: by the names of what is made.
            program: beside this one.
            there: `--work` of `vllm_gpu_step.py`, whose models are taken instead of new ones.
        """
        children: dict[str, Any] = {}
        made: dict[str, Any] = {}
        for name, job in jobs.items():
            kept = Path(there or self.folder) / f"{name}.make.json"
            if kept.exists():
                made[name] = json.loads(kept.read_text())
                continue
            out, path = str(self.folder / f"{name}.json"), self.folder / f"{name}.job.json"
            given = {"folder": str(self.folder / f"model-{name}"), "shape": name, "out": out}
            path.write_text(json.dumps(given | job))
            process = subprocess.Popen(
                [sys.executable, str(HERE / program), str(path)],
                env={**os.environ, "PYTHONPATH": self.path, **self._visible()},
                stdout=subprocess.DEVNULL,
            )
            children[name] = out, process
        for name, (out, child) in children.items():
            if child.wait():
                raise EngineError(f"{name}: making the model ended with {child.returncode}")
            made[name] = json.loads(Path(out).read_text())
            say(f"{name}: made")
        return made

    def engine(
        self, label: str, engine: dict[str, Any], *, stock: bool = False, **environment: str
    ) -> Engine:
        """Start an engine; `stock`: where flashhead is not installed."""
        on_cpu = self.device == "cpu"
        settings = SETTINGS | (ON_A_CPU if on_cpu else ON_A_GPU)
        path = self.stock_path if stock else self.path
        more = {"PYTHONPATH": path, **self._visible(), **environment}
        return Engine(label, settings | engine, self.folder, more, pauses=on_cpu)

    def _visible(self) -> dict[str, str]:
        return {"CUDA_VISIBLE_DEVICES": ""} if self.device == "cpu" else {}


def prompts_of(vocab_size: int, batch: int, seed: str) -> list[list[int]]:
    """Prompts of random tokens; equal seeds give every engine equal ones."""
    numbers = random.Random(f"{batch} {seed}")
    return [
        [numbers.randrange(10, vocab_size - 10) for _ in range(PROMPT_TOKENS)] for _ in range(batch)
    ]


def compare_texts(
    judge: Engine, prompts: list[list[int]], wanted: list[list[int]], found: list[list[int]]
) -> dict[str, Any]:
    """Where texts first part, and how far apart the two tokens are there.

    Args:
        judge: a dense engine with `logprobs_mode="raw_logits"`.
        prompts: of the texts.
        wanted: its texts, or another engine's.
        found: the texts compared with them.

    Returns:
        `parted`, `gaps` (of logits, in steps of bfloat16; None: not among the judge's largest) and
        `beyond`, how many are wider than `ULPS`.
    """
    parted = []
    for prompt, left, right in zip(prompts, wanted, found, strict=True):
        pairs = enumerate(zip(left, right, strict=True))
        step = next((number for number, (a, b) in pairs if a != b), None)
        if step is not None:
            parted.append((prompt + left[:step], left[step], right[step]))
    gaps: list[float | None] = []
    if parted:
        starts = [start for start, _, _ in parted]
        told = judge.generate(starts, 1, logits=TOLD_LOGITS)["logits"]
        for (_, a, b), (largest,) in zip(parted, told, strict=True):
            logits = dict(map(tuple, largest))
            known = a in logits and b in logits
            gap = abs(logits[a] - logits[b]) / bf16_step(logits[a]) if known else None
            gaps.append(None if gap is None else round(gap, 2))
    beyond = sum(gap is None or gap > ULPS for gap in gaps)
    return {"texts": len(found), "parted": len(gaps), "gaps_bf16_steps": gaps, "beyond": beyond}


def counts(engine: Engine) -> list[dict[str, int]]:
    """Rows searched and dense so far of the target's head, rank by rank."""
    heads = [[head for head in worker if not head.get("draft")] for worker in engine.statistics()]
    names = ("searched_rows", "dense_rows")
    return [{name: sum(h.get(name, 0) for h in rank) for name in names} for rank in heads]


def time_pairs(
    engines: dict[str, Engine], vocab_size: int, batch: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One batch size: interleaved times, paths and texts, as JSON values."""
    kinds, tokens = list(engines), args.tokens
    for kind in kinds:
        engines[kind].generate(prompts_of(vocab_size, batch, "warm"), tokens)
    before, seconds, texts, checks = counts(engines["flashhead"]), _empty(kinds), {}, []
    for pair in range(args.pairs):
        prompts = prompts_of(vocab_size, batch, f"pair {pair}")
        for kind in kinds[pair % len(kinds) :] + kinds[: pair % len(kinds)]:
            told = engines[kind].generate(prompts, tokens)
            seconds[kind].append(told["seconds"])
            texts[kind] = told["texts"]
        checks.append((prompts, texts["dense"], texts["flashhead"]))
    after, first = counts(engines["flashhead"]), {}
    for kind in kinds:  # the prompt's share
        ones = [engines[kind].generate(prompts, 1)["seconds"] for prompts, _, _ in checks[:5]]
        first[kind] = statistics.median(ones)
    ms = {
        kind: [1e3 * (each - first[kind]) / (tokens - 1) for each in seconds[kind]]
        for kind in kinds
    }
    row: dict[str, Any] = {"batch": batch, "pairs": args.pairs, "ms_per_token": {}, "ratio": {}}
    for kind in kinds:
        row["ms_per_token"][kind] = spread(ms[kind])
        if kind != "flashhead":
            pairs = zip(ms[kind], ms["flashhead"], strict=True)
            row["ratio"][kind] = spread([plain / searched for plain, searched in pairs])
    row["first_token_ms"] = {kind: 1e3 * value for kind, value in first.items()}
    row["rows_of_ranks"] = [
        {name: new[name] - old[name] for name in new}
        for old, new in zip(before, after, strict=True)
    ]
    flat = [list(itertools.chain(*column)) for column in zip(*checks, strict=True)]
    row["divergences"] = compare_texts(engines["dense"], *flat)
    return row


def _empty(kinds: list[str]) -> dict[str, list[float]]:
    return {kind: [] for kind in kinds}


def spread(values: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    deciles = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values
    return {"median": statistics.median(values), "p10": deciles[0], "p90": deciles[-1]}


def engines_of(
    place: Workplace, name: str, made: dict[str, Any], card: str | None, args: Any
) -> dict[str, Engine]:
    """Start a shape's engines side by side, on a card or on all that are visible."""
    plain = {"model": made["model"], "tensor_parallel_size": args.tensor_parallel}
    plain |= args.engine_arguments
    options = made["options"] | ({} if args.crossover is None else {"crossover": args.crossover})
    ours = plain | {"quantization": "flashhead", "worker_extension_cls": WORKER}
    ours["hf_overrides"] = {"flashhead_options": options}
    environment = {} if card is None else {"CUDA_VISIBLE_DEVICES": card}
    if place.device == "cpu" and args.tensor_parallel > 1:
        cores = [str(core % (os.cpu_count() or 1)) for core in range(args.tensor_parallel)]
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(cores)
    engines = {
        "dense": place.engine(
            f"{name}.dense", plain | {"logprobs_mode": "raw_logits"}, **environment
        ),
        "flashhead": place.engine(f"{name}.flashhead", ours, **environment),
    }
    if args.stock:
        engines["stock"] = place.engine(f"{name}.stock", plain, stock=True, **environment)
    return engines


def measure(engines: dict[str, Engine], made: dict[str, Any], args: Any) -> dict[str, Any]:
    """All batches of a shape."""
    found: dict[str, Any] = {"model": made, "start": {}}
    for kind, engine in engines.items():
        found["start"][kind] = engine.started()
        say(f"{engine.label}: started after {engine.start_s} s")
    config = json.loads((Path(made["model"]) / "config.json").read_text())
    vocab_size = config.get("text_config", config)["vocab_size"]
    found["rows"], found["errors"] = [], []
    for batch in args.batches:
        row = time_pairs(engines, vocab_size, batch, args)
        found["rows"].append(row)
        say(f"{engines['dense'].label.partition('.')[0]} batch {batch}: {_line(row)}")
        found["errors"] += errors_of(row)
    found["heads_of_ranks"] = heads = engines["flashhead"].statistics()
    if len(heads) != args.tensor_parallel or not all(heads):
        found["errors"].append(f"{len(heads)} ranks told of their heads: {heads}")
    return found


def errors_of(row: dict[str, Any]) -> list[str]:
    """What a batch must not show."""
    parted = row["divergences"]
    if not parted["beyond"]:
        return []
    gaps = parted["gaps_bf16_steps"]
    return [f"batch {row['batch']}: {parted['beyond']} texts part where nothing ties: {gaps}"]


def _line(row: dict[str, Any]) -> str:
    cells = []
    for kind, ms in row["ms_per_token"].items():
        cells.append(f"{kind} {ms['median']:.3f} ms/tok")
    for kind, ratio in row["ratio"].items():
        cells.append(
            f"{kind}/flashhead {ratio['median']:.3f}x ({ratio['p10']:.2f}-{ratio['p90']:.2f})"
        )
    ranks = [f"{rank['searched_rows']}/{rank['dense_rows']}" for rank in row["rows_of_ranks"]]
    parted = row["divergences"]
    cells.append(f"searched/dense {' '.join(ranks)}")
    cells.append(f"parted {parted['parted']}/{parted['texts']}, beyond a tie {parted['beyond']}")
    return ", ".join(cells)


def table(document: dict[str, Any]) -> str:
    """The document as text."""
    lines = []
    for name, shape in document["shapes"].items():
        head = f"{name} TP={document['tensor_parallel']}"
        lines += [f"{head} b={row['batch']}: {_line(row)}" for row in shape.get("rows", [])]
        lines += [f"{name}: ERROR: {text}" for text in shape.get("errors", [])]
    return "\n".join(lines)


def save(document: dict[str, Any], path: str | None) -> None:
    """Write the document whole."""
    if path is None:
        return
    out = Path(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.rename(out)


def provenance() -> dict[str, Any]:
    """Of flashhead, files by their names; torch is imported only now."""
    sys.path.insert(0, str(SOURCE))
    from flashhead.environment import provenance as found

    told = found()
    told["argv"] = [Path(given).name if given.startswith("/") else given for given in told["argv"]]
    return told


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All shapes: made side by side, all engines started side by side, measured in turn."""
    place = Workplace(folder, args.device)
    if args.stock and place.is_installed:
        raise SystemExit("--stock: flashhead is installed here, so no engine is without it")
    names = [Path(args.model).name] if args.model else args.shapes
    if args.model:
        made = {names[0]: {"model": args.model, "options": {}, "weights": "real"}}
    else:
        made = place.make({name: {} for name in names}, there=args.models)
    document: dict[str, Any] = {
        "benchmark": "vllm_gpu_parallel",
        "device": args.device,
        "tensor_parallel": args.tensor_parallel,
        "tokens": args.tokens,
        "crossover": "measured at load" if args.crossover is None else args.crossover,
        "environment": {name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()},
        "shapes": {name: {} for name in names},
        **provenance(),
    }
    with closing({}) as alive:
        groups: dict[str, dict[str, Engine]] = {}

        def start(name: str) -> None:
            card = args.gpus[names.index(name) % len(args.gpus)] if args.gpus else None
            groups[name] = engines_of(place, name, made[name], card, args)
            alive.update({engine.label: engine for engine in groups[name].values()})

        for name in names if args.device == "cuda" else []:
            start(name)
        for name in names:
            if name not in groups:  # a CPU has one shape's engines at a time
                start(name)
            try:
                document["shapes"][name] = measure(groups[name], made[name], args)
            except EngineError as error:
                print(error, file=sys.stderr, flush=True)
                document["shapes"][name] = {"errors": [str(error).splitlines()[0]]}
            for engine in groups[name].values():
                engine.close()
            document["shapes"][name]["model"] = _without_folders(made[name])
            document["seconds"] = round(time.monotonic() - _begin, 1)
            save(document, args.json)
    return document


def _without_folders(made: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in made.items() if name not in ("model", "options")}


def parse(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=list(SHAPES_HERE))
    parser.add_argument("--model", metavar="FOLDER", help="a real model instead of the shapes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="CARDS")
    parser.add_argument(
        "--gpus",
        type=lambda text: text.split(","),
        help="cards, as 0,1: a shape is on one of them (without --tensor-parallel)",
    )
    parser.add_argument("--models", metavar="FOLDER", help="--work of an earlier vllm_gpu_step.py")
    parser.add_argument("--batches", type=_numbers, default=[1, 8, 32])
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--crossover", type=int, help="default: measured at load")
    parser.add_argument("--stock", action="store_true", help="also without flashhead installed")
    parser.add_argument("--engine-arguments", type=json.loads, default={}, help="JSON, for vLLM")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--table", metavar="FILE", help="print an earlier document's table")
    args = parser.parse_args(given)
    unknown = sorted(set(args.shapes) - {*SHAPES, "smoke", "tiny"})
    if unknown:
        parser.error(f"--shapes {unknown[0]}: wanted some of {', '.join(SHAPES)}, smoke, tiny")
    if args.pairs < 1 or args.tokens < 2 or min(args.batches) < 1 or max(args.batches) > 32:
        parser.error("wanted 1 pair or more, 2 tokens or more, batches of 1 to 32")
    if args.tensor_parallel < 1 or (args.gpus and args.tensor_parallel > 1):
        parser.error(f"--tensor-parallel {args.tensor_parallel}: wanted 1 or more; 1 with --gpus")
    return args


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


_begin = time.monotonic()


def main() -> int:
    args = parse()
    if args.table:
        print(table(json.loads(Path(args.table).read_text())))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="parallel-"))
        document = run(args, Path(folder))
    print(table(document))
    print(json.dumps({"json": args.json, "seconds": document["seconds"]}))
    return 1 if any(shape["errors"] for shape in document["shapes"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
