"""`flashhead eval frontier`: every method on the same hidden states, one document and one plot."""

import argparse
import re
from pathlib import Path
from typing import Any

from flashhead.cli.arguments import (
    MODEL_HELP,
    Parser,
    add_positions,
    command,
    existing_file,
    existing_folder,
    integer,
    method_names,
    write_document,
)
from flashhead.errors import FlashHeadError
from flashhead.method_names import METHODS


def add_parser(subparsers: Any) -> None:
    """Describe the subcommand."""
    parser: Parser = command(
        subparsers, "frontier", run, "fidelity against bytes read of all methods, with a plot"
    )
    parser.add_argument("--model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--data", type=existing_file, metavar="FILE", help=".txt or .jsonl")
    add_positions(parser)
    parser.add_argument("--seed", type=integer(0), default=0, metavar="N", help="of the windows")
    parser.add_argument(
        "--methods",
        type=method_names,
        default=METHODS,
        metavar="A,B",
        help=f"default: all, that is {','.join(METHODS)}",
    )
    parser.add_argument(
        "--skip", type=method_names, default=(), metavar="A,B", help="methods to leave out"
    )
    parser.add_argument(
        "--out-dir",
        type=existing_folder,
        default=Path(),
        metavar="DIR",
        help="for frontier-MODEL.json and .svg (default: here)",
    )
    parser.add_argument(
        "--from", dest="source", type=existing_file, metavar="JSON", help="only draw it again"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, write the document, then draw the plot from it."""
    from flashhead.report.frontier import draw_frontier, read_document

    if args.source is not None:
        if args.model is not None or args.data is not None:
            raise FlashHeadError("--from draws a document: --model and --data are not wanted")
        document = read_document(args.source)
        plot = args.out_dir / f"{args.source.stem}.svg"
    else:
        if args.model is None or args.data is None:
            missing = "--model" if args.model is None else "--data"
            raise FlashHeadError(f"{missing} is missing: wanted --model and --data, or --from JSON")
        args.methods = tuple(name for name in args.methods if name not in args.skip)
        if not args.methods:
            raise FlashHeadError("--skip leaves no method: wanted one or more")
        _require_matplotlib()
        path = args.out_dir / f"frontier-{_file_part(args.model)}.json"
        _measure(args, path)
        document, plot = read_document(path), path.with_suffix(".svg")
    draw_frontier(document, plot)
    print(f"drawn: {plot}")
    return document


def _measure(args: argparse.Namespace, path: Path) -> None:
    from flashhead.cli import session

    model, tokenizer, calibration = session.load_calibrated(args.model)
    import torch

    from flashhead.evaluate.head import evaluate_head, format_table
    from flashhead.integrations.transformers import logit_postprocess

    document = evaluate_head(
        model,
        tokenizer,
        args.data,
        args.positions,
        methods=args.methods,
        calibration=calibration,
        seed=args.seed,
        precision=torch.float32,
        postprocess=logit_postprocess(model.config),
    )
    document |= {"model": Path(args.model).name, "data": args.data.name}
    write_document(path, document)
    print(format_table(document))
    print(f"written: {path}")


def _require_matplotlib() -> None:
    """Before minutes of measuring, not after them."""
    import matplotlib as mpl

    assert mpl


def _file_part(model: str) -> str:
    """A model's name as a part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", Path(model).name.removesuffix(".gguf")).lower()
