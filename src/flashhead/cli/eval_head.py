"""`flashhead eval head`: agreement, KL, bytes and certificate on real text, beside baselines."""

import argparse
from typing import Any

from flashhead.cli.arguments import (
    Parser,
    add_evaluation,
    command,
    method_names,
    real,
    write_document,
)
from flashhead.errors import FlashHeadError
from flashhead.method_names import METHODS, TABLE_METHODS


def add_parser(subparsers: Any) -> None:
    """Describe the subcommand."""
    parser: Parser = command(
        subparsers, "head", run, "compare a head with float32 dense logits on real text"
    )
    add_evaluation(parser)
    parser.add_argument(
        "--methods",
        type=method_names,
        default=TABLE_METHODS,
        metavar="A,B",
        help=f"of {','.join(METHODS)}, or all (default: {','.join(TABLE_METHODS)})",
    )
    parser.add_argument(
        "--certified",
        action="store_true",
        help="also the next token alone, certified: what `--methods certified` adds",
    )
    parser.add_argument(
        "--failure-probability",
        type=real("0 or above, below 0.5", lambda p: 0 <= p < 0.5),
        metavar="P",
        help="with --certified: that a certified token is wrong; 0: a bound that always holds "
        "(default: 1e-6)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate and print the table."""
    if args.certified and "certified" not in args.methods:
        args.methods = (*args.methods, "certified")
    if args.failure_probability is not None and "certified" not in args.methods:
        raise FlashHeadError("--failure-probability without --certified: wanted both")
    from flashhead.cli import session

    model, tokenizer = session.load_model(args, args.head)
    from flashhead.evaluate.head import evaluate_head, format_table
    from flashhead.evaluate.methods import FAILURE_PROBABILITY, wanting_calibration
    from flashhead.integrations.transformers import head_of, logit_postprocess

    wanting = wanting_calibration(head_of(model).index, args.methods)
    probability = args.failure_probability
    document = evaluate_head(
        model,
        tokenizer,
        args.data,
        args.positions,
        methods=args.methods,
        calibration=session.calibration_states(model) if wanting else None,
        seed=args.seed,
        failure_probability=FAILURE_PROBABILITY if probability is None else probability,
        postprocess=logit_postprocess(model.config),
    )
    document["model"] = args.model
    print(format_table(document))
    if args.out:
        write_document(args.out, document)
    return document
