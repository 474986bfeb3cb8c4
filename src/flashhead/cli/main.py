"""Entry point of `flashhead`: the parser, and what an error looks like on the screen.

A subcommand module has `add_parser(subparsers)`, which sets `run`: parsed arguments in, JSON-able
document out. Everything human is printed while it runs; the document is printed here, last.

Exit codes: 0 done, 1 a bug (with its traceback) or what `verify` found, 2 a mistake the user can
mend (one line), 130 Ctrl-C.
"""

import contextlib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from flashhead._version import __version__
from flashhead.cli import (
    bench_attention,
    bench_decode,
    bench_head,
    bench_vllm,
    chat,
    convert,
    demo,
    eval_frontier,
    eval_head,
    eval_logprobs,
    eval_model,
    eval_sampling,
    eval_vllm,
    generate,
    heal,
    inspect,
    playground,
    push,
    report,
    serve,
    tune,
    verify,
)
from flashhead.cli.arguments import Parser
from flashhead.errors import FlashHeadError

EVALUATIONS = ("head", "logprobs", "sampling", "frontier", "vllm", eval_model.NAME)
"""Subcommands of eval; any other word there is a model."""
EXTRAS = {
    "transformers": "transformers",
    "accelerate": "gguf",
    "gguf": "gguf",
    "huggingface_hub": "transformers",
    "numba": "cpu",
    "matplotlib": "plots",
    "lm_eval": "eval",
    "jinja2": "report",
    "datasets": "eval",
    "vllm": "vllm",
}
"""Package that is missing: extra that brings it."""


def build_parser() -> Parser:
    """The parser of all subcommands."""
    parser = Parser(prog="flashhead", description="A retrieval head for language models.")
    parser.add_argument("--version", action="version", version=f"flashhead {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")
    decoding, making = (demo, generate, chat, serve, playground), (convert, heal, verify, push)
    for module in (*decoding, *making, inspect, tune, report):
        module.add_parser(subparsers)
    evaluations = _group(subparsers, "eval", "measure quality on text")
    eval_head.add_parser(evaluations)
    eval_logprobs.add_parser(evaluations)
    eval_sampling.add_parser(evaluations)
    eval_frontier.add_parser(evaluations)
    eval_vllm.add_parser(evaluations)
    eval_model.add_parser(evaluations)
    benchmarks = _group(subparsers, "bench", "measure speed")
    bench_head.add_parser(benchmarks)
    bench_decode.add_parser(benchmarks)
    bench_attention.add_parser(benchmarks)
    bench_vllm.add_parser(benchmarks)
    return parser


def _group(subparsers: Any, name: str, summary: str) -> Any:
    group = subparsers.add_parser(name, help=summary, description=summary)
    return group.add_subparsers(metavar="WHAT", required=True, dest="what")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code."""
    parser = build_parser()
    given = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(eval_model.with_name(given, EVALUATIONS))
    _quieten(args.debug)
    try:
        # a library that prints must not get into the way of the document
        with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
            document = args.run(args)
        if args.json:
            print(json.dumps(document, allow_nan=False))
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has seen enough: `flashhead inspect ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (FlashHeadError, ImportError) as error:
        line = _one_line(error)
        if line is None:
            raise
        if args.debug:
            traceback.print_exc()
        print(f"flashhead: {line}", file=sys.stderr)
        return 2
    return int(args.exit_code)


def _one_line(error: FlashHeadError | ImportError) -> str | None:
    """What the user is told; None: not the user's mistake."""
    if isinstance(error, FlashHeadError):
        return " ".join(str(error).split())
    cause = error.__cause__
    name = error.name or (cause.name if isinstance(cause, ImportError) else None) or ""
    package = name.partition(".")[0]
    if package not in EXTRAS:
        return None
    return f"{package} is not installed: pip install 'flashhead[{EXTRAS[package]}]'"


def _quieten(debug: bool) -> None:
    """Keep the libraries' banners, bars and warnings off the screen; `--debug` shows them."""
    quiet: dict[str, Any] = {"HF_HUB_DISABLE_TELEMETRY": "1"}
    if not debug:
        quiet |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        quiet |= {"HF_HUB_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
        warnings.simplefilter("ignore")
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
