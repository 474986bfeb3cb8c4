"""`flashhead eval logprobs`: log-probabilities and perplexity of a text, against float32."""

import argparse
from typing import Any

from flashhead.cli.arguments import (
    Parser,
    add_evaluation,
    command,
    write_document,
)


def add_parser(subparsers: Any) -> None:
    """Describe the subcommand."""
    parser: Parser = command(
        subparsers, "logprobs", run, "compare log-probabilities of a text with float32"
    )
    add_evaluation(parser, least_positions=2)


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
        write_document(args.out, document)
    return document
