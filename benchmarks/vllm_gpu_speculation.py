"""EAGLE, EAGLE-3 and MTP in vLLM with FlashHead on the target's head, the draft's, or both: is the
greedy text the one without speculation, and which heads were searched?

    python benchmarks/vllm_gpu_speculation.py --json out.json
    python benchmarks/vllm_gpu_speculation.py --device cpu --shape tiny --cases eagle,eagle3

A made-up Llama (`vllm_gpu_models.py`) and drafts of it (`vllm_gpu_drafts.py`); greedy, batch 1 and
more. Each case is an engine; its texts are compared with those of a FlashHead engine without
speculation, and where two part the dense engine must have both tokens within two steps of bfloat16.
A verification of k drafts is a batch of k + 1 rows, so a bf16 body may round otherwise than alone.

Exit code 1 if a text parts otherwise, if a head was not served as the case says, or if no proposal
was accepted.
"""

import argparse
import contextlib
import dataclasses
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vllm_gpu_drafts import DRAFTS
from vllm_gpu_place import (
    WORKER,
    Workplace,
    compare_texts,
    counts,
    prompts_of,
    provenance,
    save,
)
from vllm_gpu_served import Engine, EngineError, closing
from vllm_gpu_step import say


@dataclasses.dataclass(frozen=True)
class Case:
    """One engine.

    Args:
        draft: of `DRAFTS`, or None: no speculation.
        target: the option `speculative_target`; "off": an engine without FlashHead on its target.
        draft_searched: whether the draft's own head is given the method `flashhead`.
    """

    draft: str | None
    target: str
    draft_searched: bool = False


CASES = {
    "eagle": Case("eagle", "greedy"),
    "eagle-verified-dense": Case("eagle", "dense"),
    "eagle3": Case("eagle3", "greedy", draft_searched=True),
    "eagle3-target-only": Case("eagle3", "greedy"),
    "eagle3-draft-only": Case("eagle3", "off", draft_searched=True),
    "eagle3-verified-dense": Case("eagle3", "dense", draft_searched=True),
    "mtp": Case("mtp", "greedy"),
    "mtp-verified-dense": Case("mtp", "dense"),
}
SHARED = ("eagle", "mtp")
"""Drafts that ask the target's head; EAGLE-3's is its own."""
ROWS = ("searched_rows", "dense_rows", "draft_rows")
"""Counters of a head; the last are rows of the target's head that a draft asked for."""
COUNTERS = ("spec_decode_num_drafts", "spec_decode_num_accepted_tokens")


def arguments(case: Case, target: str, drafts: dict[str, Any], args: Any) -> dict[str, Any]:
    """Arguments of `vllm.LLM`."""
    given = {"model": target, "worker_extension_cls": WORKER, "disable_log_stats": False}
    if case.target != "off":
        options: dict[str, Any] = {"speculative_target": case.target}
        if args.crossover is not None:
            options["crossover"] = args.crossover
        given |= {"quantization": "flashhead", "hf_overrides": {"flashhead_options": options}}
    if case.draft is not None:
        folder = drafts[case.draft]["model"]
        speculative = {"method": case.draft, "num_speculative_tokens": args.drafts}
        if case.draft == "mtp":  # one checkpoint; its layer predicts one token
            given["model"], speculative["num_speculative_tokens"] = folder, 1
        else:
            speculative["model"] = folder
        if case.draft_searched:
            speculative["quantization"] = "flashhead"
        given["speculative_config"] = speculative
    return given | args.engine_arguments


def served(engine: Engine) -> dict[str, dict[str, int]]:
    """Rows searched and dense, of the target's head and of the draft's own."""
    heads = [head for worker in engine.statistics() for head in worker]
    found: dict[str, dict[str, int]] = {}
    for head in heads:
        side = "draft" if head.get("draft") else "target"
        found[side] = {name: head.get(name, 0) for name in ROWS}
    return found


def errors_of(case: Case, row: dict[str, Any]) -> list[str]:
    """What a case must not show."""
    errors, heads = [], row["heads"]
    if row["divergences"]["beyond"]:
        errors.append(f"texts part where nothing ties: {row['divergences']['gaps_bf16_steps']}")
    if case.draft is not None and row["metrics"].get(COUNTERS[1], 0) == 0:
        errors.append(f"no proposal was accepted: {row['metrics']}")
    wanted = {"target": case.target in ("greedy", "search"), "draft": case.draft_searched}
    for side, searched in wanted.items():
        own = heads.get(side, {})
        found = own.get("searched_rows", 0) - own.get("draft_rows", 0)
        if searched and not found:
            errors.append(f"the head of the {side} was not searched: {heads}")
        if not searched and found:
            errors.append(f"the head of the {side} was searched: {heads}")
    if case.draft in SHARED and not heads["target"]["draft_rows"]:
        errors.append(f"the draft did not ask the target's head: {heads}")
    return errors


def measure(
    name: str, engine: Engine, judge: Engine, plain: dict[int, Any], args: Any
) -> dict[str, Any]:
    """A case, as JSON values."""
    case, found = CASES[name], {"start": engine.started(), "divergences": {}}
    total: dict[str, Any] = {"texts": 0, "parted": 0, "beyond": 0, "gaps_bf16_steps": []}
    found["seconds"] = {}
    for batch in args.batches:
        prompts = prompts_of(args.vocab_size, batch, "speculation")
        told = engine.generate(prompts, args.tokens)
        found["seconds"][batch] = told["seconds"]
        compared = compare_texts(judge, prompts, plain[batch], told["texts"])
        total = {key: total[key] + compared[key] for key in total}
    found["divergences"] = total
    found["metrics"], found["heads"] = engine.metrics(), served(engine)
    found["errors"] = errors_of(case, found)
    return found


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make the models, then the cases in turn; on a GPU their engines start side by side."""
    place = Workplace(folder, args.device)
    target = place.make({args.shape: {}}, there=args.models)[args.shape]["model"]
    config = json.loads((Path(target) / "config.json").read_text())
    args.vocab_size = config["vocab_size"]
    job = {"target": target, "kinds": list(DRAFTS), "crossover": args.crossover}
    drafts = place.make({"drafts": job}, "vllm_gpu_drafts.py")["drafts"]
    document: dict[str, Any] = {
        "benchmark": "vllm_gpu_speculation",
        "shape": args.shape,
        "crossover": "measured at load" if args.crossover is None else args.crossover,
        "cases": {},
        **provenance(),
    }
    with closing({}) as alive:

        def start(name: str, given: dict[str, Any]) -> Engine:
            alive[name] = place.engine(name, given)
            return alive[name]

        judge = start("dense", {"model": target, "logprobs_mode": "raw_logits"})
        first = start("plain", arguments(Case(None, "dense"), target, drafts, args))
        if args.device == "cuda":
            for name in args.cases:
                start(name, arguments(CASES[name], target, drafts, args))
        judge.started()
        document["vllm"] = first.started()["vllm"]
        plain = {}
        for batch in args.batches:
            prompts = prompts_of(args.vocab_size, batch, "speculation")
            plain[batch] = first.generate(prompts, args.tokens)["texts"]
        document["plain"] = {"rows_of_ranks": counts(first)}
        first.close()
        for name in args.cases:
            if name not in alive:
                start(name, arguments(CASES[name], target, drafts, args))
            try:
                row = measure(name, alive[name], judge, plain, args)
            except EngineError as error:
                print(error, file=sys.stderr, flush=True)
                row = {"errors": [_cause(str(error))]}
            alive[name].close()
            document["cases"][name] = row
            document["seconds"] = round(time.monotonic() - _begin, 1)
            say(_line(name, row))
            save(document, args.json)
    return document


def _cause(log: str) -> str:
    """The line of a log that says what went wrong."""
    lines = [line for line in log.splitlines() if "Error" in line]
    return (lines or log.splitlines())[-1].strip()[:300]


def _line(name: str, row: dict[str, Any]) -> str:
    cells = [f"{name:22s}"]
    if "heads" in row:
        for side, rows in row["heads"].items():
            cells.append(f"{side} searched/dense {rows['searched_rows']}/{rows['dense_rows']}")
            cells += [f"{rows['draft_rows']} for the draft"] if rows["draft_rows"] else []
        drafts, accepted = (row["metrics"].get(counter, 0) for counter in COUNTERS)
        cells.append(f"accepted {accepted:.0f} in {drafts:.0f} drafts")
        parted = row["divergences"]
        cells.append(f"parted {parted['parted']}/{parted['texts']}")
    return ", ".join([*cells, *(f"ERROR: {text}" for text in row["errors"])])


def table(document: dict[str, Any]) -> str:
    """The document as text."""
    return "\n".join(_line(name, row) for name, row in document["cases"].items())


def parse(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=("llama-3.2-1b", "tiny"), default="llama-3.2-1b")
    parser.add_argument("--cases", type=lambda text: text.split(","), default=list(CASES))
    parser.add_argument("--models", metavar="FOLDER", help="--work of an earlier vllm_gpu_step.py")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--batches", type=_numbers, default=[1, 4])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--drafts", type=int, default=3, help="tokens proposed a step")
    parser.add_argument("--crossover", type=int, help="of all heads; default: measured at load")
    parser.add_argument("--engine-arguments", type=json.loads, default={}, help="JSON, for vLLM")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(given)
    unknown = sorted(set(args.cases) - set(CASES))
    if unknown:
        parser.error(f"--cases {unknown[0]}: wanted some of {', '.join(CASES)}")
    return args


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


_begin = time.monotonic()


def main() -> int:
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="speculation-"))
        document = run(args, Path(folder))
    print(table(document))
    print(json.dumps({"json": args.json, "seconds": document["seconds"]}))
    return 1 if any(row["errors"] for row in document["cases"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
