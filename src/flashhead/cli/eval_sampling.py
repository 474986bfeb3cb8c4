"""`flashhead eval sampling`: do draws follow the softmax of float32 logits, on real text."""

import argparse
from typing import Any

from flashhead.cli.arguments import (
    Parser,
    add_evaluation,
    command,
    integer,
    real,
    reals,
    write_document,
)


def add_parser(subparsers: Any) -> None:
    """Describe the subcommand."""
    parser: Parser = command(
        subparsers, "sampling", run, "test the sampler against the dense softmax on real text"
    )
    add_evaluation(parser, least_positions=None)
    parser.add_argument(
        "--draws", type=integer(1), default=10**6, metavar="N", help="each temperature (1000000)"
    )
    parser.add_argument(
        "--temperatures",
        type=reals("above 0", lambda t: t > 0),
        default=(0.5, 0.7, 1.0, 1.5),
        metavar="T,T",
        help="default: 0.5,0.7,1.0,1.5",
    )
    share = real("above 0 and below 1", lambda p: 0 < p < 1)
    parser.add_argument("--top-p", type=share, default=0.9, metavar="P", help="default: 0.9")
    parser.add_argument(
        "--states", type=integer(1), default=20, metavar="N", help="hidden states (default: 20)"
    )
    parser.add_argument(
        "--failure-probability",
        type=real("0 to below 1", lambda p: 0 <= p < 1),
        default=1e-6,
        metavar="P",
        help="of a draw's certificate (default: 1e-6)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Test and print the verdicts."""
    from flashhead.cli import session

    model, tokenizer = session.load_model(args, args.head)
    from flashhead.evaluate.sampling import evaluate_sampling, format_table
    from flashhead.integrations.transformers import logit_postprocess

    document = evaluate_sampling(
        model,
        tokenizer,
        args.data,
        args.draws,
        args.temperatures,
        top_p=args.top_p,
        states=args.states,
        seed=args.seed,
        failure_probability=args.failure_probability,
        postprocess=logit_postprocess(model.config),
    )
    document["model"] = args.model
    print(format_table(document))
    if args.out:
        write_document(args.out, document)
    return document
