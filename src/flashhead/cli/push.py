"""`flashhead push`: upload a converted folder to the hub, after a look at its files."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashhead.cli.arguments import Parser, command, existing_file, existing_folder
from flashhead.errors import FlashHeadError

if TYPE_CHECKING:
    from flashhead.convert.push import Plan


def add_parser(subparsers: Any) -> None:
    """Describe the subcommand."""
    parser: Parser = command(
        subparsers, "push", run, "upload a converted folder to the hub (HF_ENDPOINT's, if set)"
    )
    parser.add_argument("out", type=existing_folder, metavar="OUT", help="the folder")
    parser.add_argument("repo", metavar="REPO", help="owner/name; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="if the repository is made now")
    parser.add_argument("--revision", metavar="R", help="branch (default: the main one)")
    parser.add_argument(
        "--token-file", type=existing_file, metavar="F", help="token in it (default: hf's own)"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be sent, and stop")
    parser.add_argument(
        "--no-verify", action="store_true", help="skip the check of files and checksums"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Check, say what is sent, send it."""
    from flashhead.convert.push import plan_push, push

    token = None if args.token_file is None else _read_token(args.token_file)
    if not args.no_verify:
        _verify(args.out)
    plan = plan_push(args.out, args.repo, args.revision)
    _print_plan(plan, args.dry_run)
    document: dict[str, Any] = {
        "repo": plan.repo,
        "endpoint": plan.endpoint,
        "revision": plan.revision,
        "files": plan.files,
        "left_out": plan.left_out,
        "bytes": plan.total_bytes,
        "dry_run": args.dry_run,
    }
    if args.dry_run:
        return document
    sent = push(plan, private=args.private, token=token)
    print(f"sent: {sent['commit_url']}")
    return document | sent


def _read_token(path: Path) -> str:
    token = path.read_text(encoding="utf-8").strip()
    if not token or len(token.split()) != 1:
        raise FlashHeadError(f"--token-file {path}: wanted one word, the token")
    return token


def _verify(folder: Path) -> None:
    from flashhead.convert.verify import Step, check_quickly

    def say(step: Step) -> None:
        if not step.ok:
            raise FlashHeadError(f"{folder}: {step.name}: {step.found}; nothing was sent")
        print(f"ok      {step.name}: {step.found}", file=sys.stderr)

    check_quickly(folder, say)


def _print_plan(plan: "Plan", dry: bool) -> None:
    width = max(map(len, plan.files))
    for name, size in plan.files.items():
        print(f"{name:<{width}} {size:>15,} bytes")
    branch = "" if plan.revision is None else f", branch {plan.revision}"
    verb = "would be sent" if dry else "are sent"
    print(
        f"{len(plan.files)} files, {plan.total_bytes:,} bytes {verb} to "
        f"{plan.endpoint}/{plan.repo}{branch}"
    )
    for name, why in plan.left_out.items():
        print(f"left out: {name} ({why})")
    sys.stdout.flush()
