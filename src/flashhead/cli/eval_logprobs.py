"""`flashhead eval logprobs`: log-probabilities and perplexity of a text, against float32."""

import argparse
import json
from typing import Any

from flashhead.cli.arguments import (
    Parser,
    add_head,
    add_model,
    command,
    existing_file,
    integer,
    new_file,
)


def add_parser(subparsers: Any) -> None:
    """Describe the subcommand."""
    parser: Parser = command(
        subparsers, "logprobs", run, "compare log-probabilities of a text with float32"
    )
    add_model(parser)
    add_head(parser)
    parser.add_argument(
        "--data", type=existing_file, required=True, metavar="FILE", help=".txt or .jsonl"
    )
    parser.add_argument(
        "--positions", type=integer(2), default=4096, metavar="N", help="default: 4096"
    )
    parser.add_argument("--seed", type=integer(0), default=0, metavar="N", help="of the windows")
    parser.add_argument("--out", type=new_file, metavar="FILE", help="keep the document there too")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate and print."""
    from flashhead.cli import session

    model, tokenizer = session.load_model(args, args.head)
    from flashhead.evaluate.logprobs import evaluate_logprobs, format_logprobs
    from flashhead.integrations.transformers import logit_postprocess

    document = evaluate_logprobs(
        model,
        tokenizer,
        args.data,
        args.positions,
        seed=args.seed,
        postprocess=logit_postprocess(model.config),
    )
    document["model"] = args.model
    print(format_logprobs(document))
    if args.out:
        args.out.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    return document
