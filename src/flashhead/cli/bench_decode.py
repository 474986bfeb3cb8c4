"""`flashhead bench decode`: tokens per second of `generate`, dense and FlashHead interleaved; with
`--context`, decode steps over long caches (`bench_context`).
"""

import argparse
from typing import Any

from flashhead.cli import bench_context
from flashhead.cli.arguments import MODEL_HELP, Parser, add_head, command, existing_file, integer
from flashhead.errors import FlashHeadError

PROMPTS = (
    "Here is a recipe for a simple tomato soup:\n",
    "Photosynthesis is the process by which plants",
    "def quicksort(values):\n    ",
)


def add_parser(subparsers: Any) -> None:
    """Describe the subcommand."""
    parser: Parser = command(
        subparsers, "decode", run, "time generate with the dense head and with FlashHead"
    )
    parser.add_argument("--model", metavar="MODEL", help=MODEL_HELP)
    add_head(parser)
    parser.add_argument(
        "--prompts", type=existing_file, metavar="FILE", help="a prompt a line (default: three)"
    )
    parser.add_argument(
        "--new-tokens", type=integer(2), default=64, metavar="N", help="default: 64"
    )
    parser.add_argument(
        "--repeats", type=integer(1), default=5, metavar="N", help="rounds (default: 5)"
    )
    parser.add_argument(
        "--against",
        metavar="BASE",
        help="also time this model with its own dense head, and an int8 head on MODEL's body; "
        "with --context its full caches",
    )
    parser.add_argument(
        "--compile", action="store_true", help="static cache and torch.compile, for both heads"
    )
    bench_context.add_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Time and print the table."""
    bench_context.refuse_others(args)
    if args.context is not None:
        return bench_context.run(args)
    prompts = _prompts(args)
    from flashhead.cli import session

    base = None if args.against is None else session.open_source(args.against)
    model, tokenizer = session.load_model(args, args.head)
    from flashhead.bench.decode import bench_decode
    from flashhead.bench.decode_table import format_decode_table
    from flashhead.integrations.transformers import load_dense

    document = bench_decode(
        model,
        model,
        tokenizer,
        prompts,
        new_tokens=args.new_tokens,
        repeats=args.repeats,
        compile=args.compile,
        base=None if base is None else load_dense(base),
    )
    document |= {"model": args.model, "base": args.against}
    print(format_decode_table(document))
    return document


def _prompts(args: argparse.Namespace) -> tuple[str, ...]:
    if args.prompts is None:
        return PROMPTS
    lines = args.prompts.read_text(encoding="utf-8").splitlines()
    prompts = tuple(line for line in lines if line.strip())
    if not prompts:
        raise FlashHeadError(f"--prompts {args.prompts}: no prompt in it, wanted one a line")
    return prompts
