"""`flashhead inspect`: where a token's bytes go, and what FlashHead saves of them.

Only headers are read, no weights, unless `--head` asks whether the vocabulary suits; with
`--config` there is no model at all.
"""

import argparse
from pathlib import Path
from typing import Any

from flashhead.cli.arguments import MODEL_HELP, Parser, command, existing_file, integer, new_file
from flashhead.errors import FlashHeadError

POSITIONS = 1024
MOST_CONTEXT = 2**30


def add_parser(subparsers: Any) -> None:
    """Describe the subcommand."""
    parser: Parser = command(
        subparsers, "inspect", run, "show what share of a token's bytes is head, KV cache and body"
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--config",
        metavar="CONFIG",
        help="no model, its config.json alone: a file, the name of a public model, or all of these",
    )
    parser.add_argument(
        "--quantize", choices=("w4a16",), help="with --config: count its linear layers in 4 bits"
    )
    parser.add_argument(
        "--out", type=new_file, metavar="FILE", help="with --config: keep the document there too"
    )
    parser.add_argument(
        "--context",
        type=integer(1, MOST_CONTEXT),
        default=2048,
        metavar="N",
        help="tokens (default: 2048)",
    )
    parser.add_argument(
        "--head",
        action="store_true",
        help="load the model, index its head in memory, and say whether it suits",
    )
    parser.add_argument(
        "--data",
        type=existing_file,
        metavar="FILE",
        help="with --head: judge by this text (.txt or .jsonl), not by the samples",
    )
    parser.add_argument(
        "--positions",
        type=integer(2),
        metavar="N",
        help=f"with --data: how much of it (default: {POSITIONS})",
    )
    parser.add_argument(
        "--clusters",
        action="store_true",
        help="with --head: also how many probes a clusters index needs",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Read headers and print the ledger; with `--head` measure the head too."""
    _require_together(args)
    if args.config is not None:
        from flashhead.cli.inspect_config import report_config

        return report_config(args)
    from flashhead.cli import session
    from flashhead.cli.inspect_ledger import ledger_document, print_ledger
    from flashhead.ledger.files import read_model
    from flashhead.ledger.index import describe_index
    from flashhead.ledger.tokens import token_bytes

    source = session.open_source(args.model)
    config, tensors = read_model(source)
    book = token_bytes(config, tensors, args.context)
    document = ledger_document(args.model, book, describe_index(Path(source), config, book))
    print_ledger(document)
    if args.head:
        from flashhead.cli.inspect_head import report

        args.positions = args.positions or POSITIONS
        document["head"] = report(args, source, config, book)
    return document


def _require_together(args: argparse.Namespace) -> None:
    """Refuse options that would be ignored."""
    if (args.model is None) == (args.config is None):
        raise FlashHeadError("wanted a MODEL or --config CONFIG, one of the two")
    if args.head and args.config is not None:
        raise FlashHeadError("--head with --config: wanted a MODEL, a config has no head to load")
    needed = {"data": "head", "clusters": "head", "positions": "data"}
    needed |= {"quantize": "config", "out": "config"}
    for name, needs in needed.items():
        if getattr(args, name) and not getattr(args, needs):
            raise FlashHeadError(f"--{name} without --{needs}: wanted both")
