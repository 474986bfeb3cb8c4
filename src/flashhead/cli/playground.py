"""`flashhead playground MODEL`: a local page, dense and FlashHead side by side.

The address is bound before the model is loaded, so that a port in use costs no minute. Ctrl-C is
how the command ends.
"""

import argparse
import sys
from typing import Any

from flashhead.cli.arguments import (
    MODEL_HELP,
    Parser,
    add_crossover,
    add_head,
    command,
    integer,
)
from flashhead.playground.access import LEAST_TOKEN_CHARS
from flashhead.playground.requests import Limits


def add_parser(subparsers: Any) -> None:
    """Describe the subcommand."""
    parser: Parser = command(
        subparsers, "playground", run, "a local page: dense and FlashHead side by side"
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--host", default="127.0.0.1", metavar="HOST", help="default: 127.0.0.1")
    parser.add_argument(
        "--port", type=integer(0, 65535), default=8080, metavar="N", help="0: any (default: 8080)"
    )
    parser.add_argument(
        "--token",
        metavar="TOKEN",
        help=f"that clients must know, {LEAST_TOKEN_CHARS} characters or more; wanted wherever "
        "others can reach the address",
    )
    parser.add_argument(
        "--max-prompt-chars",
        type=integer(1, 10**6),
        default=Limits.prompt_chars,
        metavar="N",
        help=f"longest prompt (default: {Limits.prompt_chars:,})",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=integer(1),
        default=Limits.new_tokens,
        metavar="N",
        help=f"most tokens of a side (default: {Limits.new_tokens})",
    )
    add_head(parser, choices=("codes",))
    add_crossover(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Serve until Ctrl-C."""
    from flashhead.cli import session
    from flashhead.playground.server import PlaygroundServer

    limits = Limits(args.max_prompt_chars, args.max_new_tokens)
    server = PlaygroundServer(args.host, args.port, args.token, limits)
    try:
        model, tokenizer = session.load_model(args, args.head)
        from flashhead.playground.decode import SideBySide

        decoder = SideBySide(model, tokenizer, session.encode)
        server.start(decoder, args.model)
        if not decoder.searches:
            _say("the dense product was measured to be faster here: --crossover 1 searches anyway")
        more = "?token=TOKEN once" if args.token else ""
        _say(f"open {server.url}{more} (Ctrl-C ends it)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            _say("stopped")
    finally:
        server.close()
    return {"model": args.model, "url": server.url, "requests": server.turns.submitted}


def _say(line: str) -> None:
    print(f"flashhead: {line}", file=sys.stderr, flush=True)
