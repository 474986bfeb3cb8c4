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
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vllm_gpu_place import (
    WORKER,
    Workplace,
    compare_texts,
    counts,
    prompts_of,
    provenance,
    save,
    spread,
)
from vllm_gpu_served import ENVIRONMENT, Engine, EngineError, closing
from vllm_gpu_shapes import SHAPES
from vllm_gpu_step import say

SHAPES_HERE = ("llama-3.2-1b", "qwen3-0.6b", "gemma-3-270m")


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
