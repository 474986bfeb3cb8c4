"""`flashhead bench head`: the head alone, verified, then timed against other products."""

import argparse
from typing import Any

from flashhead.cli.arguments import Parser, add_head, add_model, command, integer, integers

HIDDEN_STATES = 512
"""States of the model's own text that the rounds go through."""


def add_parser(subparsers: Any) -> None:
    """Describe the subcommand."""
    parser: Parser = command(subparsers, "head", run, "verify the head, then time it alone")
    add_model(parser)
    add_head(parser)
    parser.add_argument(
        "--batches", type=integers, default=(1, 2, 4, 8), metavar="N,N", help="default: 1,2,4,8"
    )
    parser.add_argument(
        "--repeats", type=integer(1), default=50, metavar="N", help="rounds (default: 50)"
    )
    parser.add_argument(
        "--seed", type=integer(0), default=1, metavar="N", help="of the text (calibration: 0)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Time and print the table."""
    from flashhead.cli import session

    model, _ = session.load_model(args, args.head)
    from flashhead.bench.head import bench_head, format_head_table
    from flashhead.integrations.calibration import sample_hidden_states

    hidden = sample_hidden_states(model, HIDDEN_STATES, args.seed, progress=True)
    document = bench_head(
        model.get_output_embeddings(), hidden, batches=args.batches, repeats=args.repeats
    )
    document = {"model": args.model, **document}
    print(format_head_table(document))
    return document
