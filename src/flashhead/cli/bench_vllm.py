"""`flashhead bench vllm`: tokens a second of vLLM, dense head and FlashHead interleaved."""

import argparse
import importlib.util
import json
from typing import Any

from flashhead.cli.arguments import Parser, command, integer, integers, new_file, write_document

PROMPTS = (
    "Here is a recipe for a simple tomato soup:\n",
    "Photosynthesis is the process by which plants",
    "def quicksort(values):\n    ",
    "The history of the city begins with",
)


def add_parser(subparsers: Any) -> None:
    """Describe the subcommand."""
    parser: Parser = command(
        subparsers, "vllm", run, "time vLLM with the dense head and with FlashHead"
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help="gemma-3-270m, smollm2-135m, a folder or a hub id",
    )
    parser.add_argument(
        "--batches", type=integers, default=(1, 4), metavar="N,N", help="default: 1,4"
    )
    parser.add_argument("--tokens", type=integer(2), default=64, metavar="N", help="default: 64")
    parser.add_argument(
        "--repeats", type=integer(1), default=9, metavar="N", help="rounds a batch (default: 9)"
    )
    parser.add_argument(
        "--engine",
        type=_json_object,
        default={},
        metavar="JSON",
        help="further arguments of both engines, such as '{\"enforce_eager\": true}'",
    )
    parser.add_argument("--out", type=new_file, metavar="FILE", help="keep the document there too")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Time and print the table."""
    if importlib.util.find_spec("vllm") is None:
        raise ImportError("vllm is not installed", name="vllm")
    from flashhead.bench.served import bench_served, format_served
    from flashhead.cli import session

    engine = {"max_model_len": 512, "quantization": "flashhead", **args.engine}
    document = bench_served(
        session.open_source(args.model),
        PROMPTS,
        batches=args.batches,
        tokens=args.tokens,
        repeats=args.repeats,
        engine=engine,
    )
    document["model"] = args.model
    print(format_served(document))
    if args.out is not None:
        write_document(args.out, document)
    return document


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r}: wanted a JSON object")
    return value
