"""`flashhead eval sampling`: do draws follow the softmax of float32 logits, on real text."""

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
    real,
    reals,
)


def add_parser(subparsers: Any) -> None:
    """Describe the subcommand."""
    parser: Parser = command(
        subparsers, "sampling", run, "test the sampler against the dense softmax on real text"
    )
    add_model(parser)
    add_head(parser)
    parser.add_argument(
        "--data", type=existing_file, required=True, metavar="FILE", help=".txt or .jsonl"
    )
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
    parser.add_argument("--seed", type=integer(0), default=0, metavar="N", help="windows and noise")
    parser.add_argument("--out", type=new_file, metavar="FILE", help="keep the document there too")


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
        args.out.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    return document
