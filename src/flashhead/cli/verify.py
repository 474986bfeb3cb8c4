"""`flashhead verify`: whether a converted folder is whole and says what its dense head says.

Exit code 0: every step passed; 1: one failed, and its line names the file or the figure.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from flashhead.cli.arguments import (
    MODEL_HELP,
    Parser,
    command,
    existing_file,
    existing_folder,
    integer,
)
from flashhead.cli.bench_decode import PROMPTS
from flashhead.errors import FlashHeadError


def add_parser(subparsers: Any) -> None:
    """Describe the subcommand."""
    parser: Parser = command(
        subparsers, "verify", run, "check a converted folder: files, checksums, tokens, base model"
    )
    parser.add_argument("out", type=existing_folder, metavar="OUT", help="the folder")
    parser.add_argument(
        "--against", metavar="BASE", help=f"the model that it was made from: {MODEL_HELP}"
    )
    parser.add_argument(
        "--positions", type=integer(2), default=512, metavar="N", help="default: 512"
    )
    parser.add_argument(
        "--data",
        type=existing_file,
        metavar="FILE",
        help=".txt or .jsonl (default: text that BASE, or else the folder's model, samples)",
    )
    parser.add_argument(
        "--write-card",
        action="store_true",
        help="write what was measured into the folder: verify.json, and README.md anew",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Verify, print a line a step, and set the exit code."""
    from flashhead.convert.verify import Step, VerifyOptions, verify

    against = None
    if args.against is not None:
        from flashhead.cli import session

        against = session.open_source(args.against)

    def say(step: Step) -> None:
        print(f"{'ok' if step.ok else 'FAILED':<7} {step.name}: {step.found}", flush=True)

    progress = sys.stderr.isatty()
    options = VerifyOptions(against, args.positions, args.data, PROMPTS, progress=progress)
    document = verify(args.out, options, say)
    args.exit_code = 0 if document["ok"] else 1
    if args.write_card:
        _write_card(args.out, document)
    return document


def _write_card(folder: Path, document: dict[str, Any]) -> None:
    if not document["ok"]:
        print("the card is left as it is", file=sys.stderr)
        return
    from flashhead.convert.card import write_measured

    try:
        paths = write_measured(folder, document)
    except OSError as error:
        raise FlashHeadError(f"{folder}: cannot be written ({error.strerror})") from error
    print(f"wrote {' and '.join(path.name for path in paths)}")
