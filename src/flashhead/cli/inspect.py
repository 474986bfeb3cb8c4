"""`flashhead inspect`: where a token's bytes go, and what FlashHead saves of them.

Only headers are read, no weights, unless `--head` asks whether the vocabulary suits.
"""

import argparse
from pathlib import Path
from typing import Any

from flashhead.cli.arguments import MODEL_HELP, Parser, command, existing_file, integer
from flashhead.errors import FlashHeadError

POSITIONS = 1024


def add_parser(subparsers: Any) -> None:
    """Describe the subcommand."""
    parser: Parser = command(
        subparsers, "inspect", run, "show what share of a token's bytes is head, KV cache and body"
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--context", type=integer(1), default=2048, metavar="N", help="tokens (default: 2048)"
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
    from flashhead.cli import session
    from flashhead.ledger.files import read_model
    from flashhead.ledger.index import describe_index
    from flashhead.ledger.tokens import token_bytes

    source = session.open_source(args.model)
    config, tensors = read_model(source)
    book = token_bytes(config, tensors, args.context)
    index = describe_index(Path(source), config, book)
    parts = {"head": book.head_bytes, "kv": book.kv_bytes, "body": book.body_bytes}
    document = {
        "model": args.model,
        "context": args.context,
        "vocab_size": book.vocab_size,
        "hidden_size": book.hidden_size,
        "tied": book.tied,
        "bytes_per_token": {**parts, "total": book.total_bytes},
        "share": {name: part / book.total_bytes for name, part in parts.items()},
        "index": index,
        "speedup_bound": book.speedup_bound(index["bytes_fraction"]),
    }
    _print(document)
    if args.head:
        from flashhead.cli.inspect_head import report

        args.positions = args.positions or POSITIONS
        document["head"] = report(args, source, config, book)
    return document


def _require_together(args: argparse.Namespace) -> None:
    """Refuse options that would be ignored."""
    for name, needs in (("data", "head"), ("clusters", "head"), ("positions", "data")):
        if getattr(args, name) and not getattr(args, needs):
            raise FlashHeadError(f"--{name} without --{needs}: wanted both")


def _print(document: dict[str, Any]) -> None:
    tied = "tied to the input embedding" if document["tied"] else "untied"
    print(
        f"{document['model']}: head {document['vocab_size']:,} x {document['hidden_size']:,}, "
        f"{tied}"
    )
    print(f"\n{'bytes read for a token':<30}{'MB':>10}{'share':>9}")
    names = {
        "head": "head (output embedding)",
        "kv": f"KV cache at {document['context']:,} tokens",
        "body": "body weights",
    }
    for key, name in names.items():
        amount, share = document["bytes_per_token"][key], document["share"][key]
        print(f"{name:<30}{amount / 1e6:>10.1f}{share:>9.1%}")
    print(f"{'total':<30}{document['bytes_per_token']['total'] / 1e6:>10.1f}")
    _print_index(document)


def _print_index(document: dict[str, Any]) -> None:
    index = document["index"]
    head, read = document["bytes_per_token"]["head"], index["bytes_per_query"]
    what = (
        "index in this folder"
        if index["measured"]
        else f"expected at {index['bits']} bits a dimension"
    )
    more = ", and the rows that may win on top" if index["kind"] == "codes" else ""
    print(
        f"\nFlashHead, {index['kind']} ({what}): reads {read / 1e6:.1f} MB of the head's "
        f"{head / 1e6:.1f} MB ({index['bytes_fraction']:.1%}){more}.\n"
        f"Where bytes decide, a token is at most {document['speedup_bound']:.2f}x as fast."
    )
    if not index["measured"]:
        print("No index in this folder: flashhead convert MODEL OUT writes one.")
        return
    parameters = index["section"]["parameters"]
    options = ", ".join(f"{name} {value}" for name, value in parameters["options"].items())
    print(
        f"Index file: {index['file_bytes'] / 1e6:.1f} MB, format "
        f"{index['section']['format_version']}, shaped by {parameters['calibration_tokens']:,} "
        f"hidden states; {options}."
    )
