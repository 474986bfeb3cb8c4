"""`flashhead convert`: write a model folder with its index."""

import argparse
from pathlib import Path
from typing import Any

from flashhead.cli.arguments import MODEL_HELP, Parser, add_head, command, index_options
from flashhead.errors import FlashHeadError


def add_parser(subparsers: Any) -> None:
    """Describe the subcommand."""
    parser: Parser = command(
        subparsers, "convert", run, "write a Hugging Face folder with the index of its head"
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist")
    add_head(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Convert and say what was written."""
    options = index_options(args)
    if args.out.exists():
        raise FlashHeadError(f"{args.out} exists: nothing is written over, name a new folder")
    from flashhead.cli import session
    from flashhead.convert.head import convert

    source = session.open_source(args.model)
    report = convert(source, args.out, head=args.head or "codes", **options)
    print(
        f"wrote {args.out}: {report['head']} index of {report['index_bytes'] / 1e6:.0f} MB "
        f"beside a head of {report['head_bytes'] / 1e6:.0f} MB, {report['seconds']:.0f} s"
    )
    return {**report, "model": args.model}
