"""The tasks of `flashhead eval MODEL --against BASE`: arguments, and the two models."""

import argparse
import sys
from typing import Any

from flashhead.cli.arguments import Parser, existing_folder, integer
from flashhead.errors import FlashHeadError
from flashhead.task_names import NEEDS_DATA, TASKS

LIMIT = 200
CONTEXTS = (1024,)


def add_arguments(parser: Parser) -> None:
    """What the tasks take."""
    parser.add_argument(
        "--tasks",
        type=task_names,
        default=("perplexity",),
        metavar="A,B",
        help=f"of {', '.join(TASKS)}, or all (default: perplexity)",
    )
    parser.add_argument(
        "--data-dir",
        type=existing_folder,
        metavar="DIR",
        help="holds mmlu/*.csv, gsm8k-train.jsonl and wikitext2-valid.txt",
    )
    parser.add_argument(
        "--seed", type=integer(0), default=0, metavar="N", help="of what is drawn (default: 0)"
    )
    parser.add_argument(
        "--context",
        type=contexts,
        default=CONTEXTS,
        metavar="N,M",
        help="tokens of the documents of needle, copy, lookup and addition (default: 1024)",
    )
    parser.add_argument(
        "--head",
        choices=("searched", "dense"),
        default="searched",
        help="what answers for MODEL: FlashHead, searched for every row, or its own head in "
        "float32 (default: searched)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of MODEL's body (default: that of --base-dtype)",
    )
    parser.add_argument(
        "--base-dtype",
        choices=("float32", "bfloat16"),
        help="of BASE's body (default: float32 on a CPU, bfloat16 on a GPU)",
    )
    parser.add_argument(
        "--batch",
        type=batch_size,
        default=None,
        metavar="N",
        help="rows at a time, or auto: by free memory (default: auto)",
    )
    parser.add_argument(
        "--cache", metavar="DIR", help="keeps the answers (default: eval in FlashHead's cache)"
    )
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on with the answers that --cache holds (default)",
    )
    parser.add_argument(
        "--unsafe-code",
        action="store_true",
        help="humaneval: run what the model wrote with limits of time and memory alone",
    )


def task_names(text: str) -> tuple[str, ...]:
    """Type of a list of tasks, such as `mmlu,needle`, or `all`."""
    names = TASKS if text == "all" else tuple(text.split(","))
    for name in names:
        if name not in TASKS:
            wanted = ", ".join(("all", *TASKS))
            raise argparse.ArgumentTypeError(f"{name!r}: wanted {wanted}, with commas")
    return tuple(dict.fromkeys(names))


def contexts(text: str) -> tuple[int, ...]:
    """Type of a list of lengths."""
    return tuple(dict.fromkeys(integer(256)(part) for part in text.split(",")))


def batch_size(text: str) -> int | None:
    """Type of a number of rows, or `auto`."""
    return None if text == "auto" else integer(1, 4096)(text)


def evaluate_suite(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate and print the table."""
    from pathlib import Path

    from flashhead.models import cache_dir

    for name in args.tasks:
        if name in NEEDS_DATA and args.data_dir is None:
            raise FlashHeadError(f"--tasks {name} reads a data set: pass --data-dir DIR")
    sources = _sources(args)
    from flashhead.evaluate.suite.run import SuiteOptions, evaluate, format_table

    options = SuiteOptions(
        tasks=args.tasks,
        data_dir=args.data_dir,
        limit=args.limit or LIMIT,
        seed=args.seed,
        contexts=args.context,
        cache=Path(args.cache) if args.cache else cache_dir() / "eval",
        resume=args.resume,
        isolated=not args.unsafe_code,
    )
    base, value, tokenizer = _sides(args, sources, options)
    document = evaluate(base, value, tokenizer, options)
    print(format_table(document))
    return document


def _sources(args: argparse.Namespace) -> tuple[str, str]:
    from flashhead.cli import session

    return session.open_source(args.model), session.open_source(args.against)


def _sides(args: argparse.Namespace, sources: tuple[str, str], suite: Any) -> tuple[Any, Any, Any]:
    """Base, value and their tokenizer."""
    import torch

    from flashhead.evaluate.suite.run import require_length
    from flashhead.evaluate.suite.sides import make_side
    from flashhead.integrations import transformers

    tokenizers = [transformers.load_tokenizer(source) for source in sources]
    if tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
        raise FlashHeadError(f"--against {args.against}: its vocabulary is not {args.model}'s")
    device = torch.device(args.device)
    usual = "float32" if device.type == "cpu" else "bfloat16"
    base_dtype = args.base_dtype or usual
    dtypes = [getattr(torch, name) for name in (args.dtype or base_dtype, base_dtype)]
    print(f"loading {args.against} and {args.model} ...", file=sys.stderr, flush=True)
    base = transformers.load_dense(sources[1], dtype=dtypes[1], device=device)
    require_length(base.config, suite)  # before an index is built
    if args.head == "searched":
        # every row is searched whatever the crossover, so none is measured; both bodies unpack what
        # is packed, so that equal weights give equal hidden states
        value = transformers.load(
            sources[0], None, dtype=dtypes[0], device=device, crossover=64, packed=False
        )
    else:
        value = transformers.load_dense(sources[0], dtype=dtypes[0], packed=False, device=device)
    options = {"batch": args.batch, "progress": True}
    left = make_side(base, tokenizers[1], searched=False, **options)
    searched = args.head == "searched"
    right = make_side(value, tokenizers[1], searched=searched, like=left, **options)
    return left, right, tokenizers[1]
