"""`flashhead eval vllm`: what FlashHead keeps of vLLM's sampling features, as one table.

The same requests go through one engine after the other, each in a child process: with the dense
head, with FlashHead, and, where greedy tokens differ, with the dense head once more for its logits.
The engines run in their process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`), which makes batches the same
every time: requests do not arrive while the engine runs.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashhead.cli.arguments import Parser, command, integer, new_file, write_document
from flashhead.errors import FlashHeadError

if TYPE_CHECKING:
    from flashhead.evaluate.features import Feature

RUNNER = "flashhead.integrations.vllm.run_features"
ENGINE: dict[str, Any] = {
    "quantization": "flashhead",
    "max_model_len": 1024,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 128,
    "enable_chunked_prefill": True,
    "enable_prefix_caching": True,
    "enforce_eager": True,
}
"""Few rows and tokens a step: requests wait, and prompts are split."""
OPTIONS = {"crossover": 16}
"""Of FlashHead: every row of a full batch is searched, however fast the dense product is here."""
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin make a busy machine many times slower
}
"""Of the engines, unless the user says otherwise."""
OWN = ("model", "worker_extension_cls", "logprobs_mode", "seed")
LOG_LINES = 20


def add_parser(subparsers: Any) -> None:
    """Describe the subcommand."""
    parser: Parser = command(
        subparsers, "vllm", run, "compare vLLM's sampling features with the dense head's"
    )
    parser.add_argument(
        "--model", required=True, metavar="MODEL", help="gemma-3-270m, a folder or a hub id"
    )
    parser.add_argument(
        "--features", type=_names, metavar="A,B", help="names as in the table (default: all)"
    )
    parser.add_argument(
        "--tokens", type=integer(8), default=64, metavar="N", help="of an answer (default: 64)"
    )
    parser.add_argument(
        "--reference",
        choices=("checkpoint", "float32"),
        default="checkpoint",
        help="dense head to compare with: the checkpoint's (default), or its weights in float32, "
        "for the features that are searched",
    )
    parser.add_argument(
        "--extra",
        type=_extra,
        default={},
        metavar="JSON",
        help=f"arguments of the engines (default: {json.dumps(ENGINE)})",
    )
    parser.add_argument("--out", type=new_file, metavar="FILE", help="keep the document there too")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the engines, judge, print the table."""
    if importlib.util.find_spec("vllm") is None:
        raise ImportError("vllm is not installed", name="vllm")
    from flashhead.cli import session
    from flashhead.evaluate.features import all_features, choose

    features = all_features(args.tokens)
    is_float32 = args.reference == "float32"
    if is_float32:  # what FlashHead leaves to the checkpoint's head is not float32
        features = tuple(feature for feature in features if feature.head == "search")
    if args.features is not None:
        features = choose(features, args.features)
    started = time.perf_counter()
    source, engine = session.open_source(args.model), engine_arguments(args.extra)
    answers = _ask(source, engine, features, args.debug, is_float32)
    document = _judge(features, engine, answers)
    document |= {"model": args.model, "reference": args.reference}
    document["seconds"] = time.perf_counter() - started
    if args.out:
        write_document(args.out, document)
    if document["failed"]:
        wrong = ", ".join(document["failed"])
        raise FlashHeadError(f"{len(document['failed'])} of {len(features)} features fail: {wrong}")
    return document


def engine_arguments(extra: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the engines: the default ones, with those given in their place."""
    overrides = dict(extra.get("hf_overrides") or {})
    overrides["flashhead_options"] = OPTIONS | (overrides.get("flashhead_options") or {})
    return {**ENGINE, **extra, "hf_overrides": overrides}


def _ask(
    source: str,
    engine: dict[str, Any],
    features: Sequence["Feature"],
    debug: bool,
    is_float32: bool,
) -> list[dict[str, Any]]:
    """Answers of the dense head, of FlashHead, and of the dense head with its logits or {}."""
    from flashhead.evaluate.answers import with_logits

    with tempfile.TemporaryDirectory(prefix="flashhead-") as folder:
        engines = _Engines(Path(folder), source, engine, debug)
        # with equal seeds both would draw with the same noise, and the distribution test two
        # copies of one sample
        overrides = engine["hf_overrides"] | ({"head_dtype": "float32"} if is_float32 else {})
        plain = {"enabled": False, "seed": 0, "hf_overrides": overrides}
        dense = engines.answers("dense head", features, **plain)
        flash = engines.answers("FlashHead", features, enabled=True, seed=1)
        pairs = [(dense["features"][each.name], flash["features"][each.name]) for each in features]
        found = [with_logits(each, *pair) for each, pair in zip(features, pairs, strict=True)]
        again = [feature for feature in found if feature is not None]
        if not again:
            return [dense, flash, {}]
        plain["logprobs_mode"] = "raw_logits"
        return [dense, flash, engines.answers("dense logits", again, **plain)]


def _judge(
    features: Sequence["Feature"], engine: dict[str, Any], answers: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    from flashhead.environment import provenance
    from flashhead.evaluate.served import format_table, judge, with_distribution

    dense, flash, logits = answers
    names = ("crossover_rows", "token_crossover_rows")
    searchable = min((head.get(name, 0) for head in flash["heads"] for name in names), default=0)
    rows = with_distribution(
        [
            judge(
                feature,
                dense["features"][feature.name],
                flash["features"][feature.name],
                logits.get("features", {}).get(feature.name),
                all_searchable=searchable >= engine["max_num_seqs"],
                most_tokens=engine["max_num_batched_tokens"],
            )
            for feature in features
        ]
    )
    print(format_table(rows))
    if not any(row.p_values for row in rows):
        print("without the feature distribution: draws apart are not tested any further")
    failed = [row.feature for row in rows if row.failures]
    timed = ("dense_seconds", "flash_seconds", "logits_seconds")
    seconds = {name: each.get("seconds") for name, each in zip(timed, answers, strict=True)}
    return {
        "engine": engine,
        "vllm": flash["vllm"],
        "heads": flash["heads"],
        "features": [dataclasses.asdict(row) for row in rows],
        "failed": failed,
        "passed": not failed,
        **seconds,
        **provenance(),
    }


@dataclasses.dataclass(frozen=True)
class _Engines:
    """Child processes that answer, one at a time.

    Args:
        folder: for jobs, answers and logs.
        source: of the model.
        engine: arguments.
        debug: show what vLLM prints.
    """

    folder: Path
    source: str
    engine: dict[str, Any]
    debug: bool

    def answers(
        self, name: str, features: Sequence["Feature"], *, enabled: bool, **more: Any
    ) -> dict[str, Any]:
        """Run the features through an engine of its own.

        Raises:
            FlashHeadError: the engine failed; its last lines are on stderr.
        """
        from flashhead.cli.child import run_child

        job, answer, log = (
            self.folder / f"{name.replace(' ', '-')}.{kind}" for kind in ("job", "json", "log")
        )
        values = {
            "name": name,
            "model": self.source,
            "engine": {**self.engine, **more},
            "features": [dataclasses.asdict(feature) for feature in features],
            "answer": str(answer),
            "log": None if self.debug else str(log),
        }
        job.write_text(json.dumps(values), encoding="utf-8")
        unset = {key: value for key, value in ENVIRONMENT.items() if key not in os.environ}
        environment = {
            **unset,
            "FLASHHEAD_ENABLED": str(int(enabled)),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
        try:
            run_child(name, [sys.executable, "-m", RUNNER, str(job)], environment)
        except FlashHeadError:
            if log.exists():
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
                print("\n".join(lines[-LOG_LINES:]), file=sys.stderr)
            raise
        answers: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return answers


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _extra(text: str) -> dict[str, Any]:
    """Type of `--extra`."""
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise argparse.ArgumentTypeError(f"{text!r}: wanted a JSON object")
    for name in OWN:
        if name in values:
            raise argparse.ArgumentTypeError(f"{name!r} is not for --extra")
    return values
