"""`flashhead convert`: write a model folder with its index."""

import argparse
from pathlib import Path
from typing import Any

from flashhead.cli.arguments import (
    HEADS,
    MODEL_HELP,
    Parser,
    add_head,
    command,
    existing_file,
    index_options,
)
from flashhead.cli.convert_latent import add_latent, latent_options, print_latent, write_layout
from flashhead.errors import FlashHeadError
from flashhead.options import QUANTIZE


def add_parser(subparsers: Any) -> None:
    """Describe the subcommand."""
    parser: Parser = command(
        subparsers, "convert", run, "write a Hugging Face folder with the index of its head"
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "out",
        nargs="?",
        type=Path,
        metavar="OUT",
        help="folder to write; must not exist (default: such as BASE-FlashHead-W4A16, here)",
    )
    add_head(
        parser,
        (*HEADS, "dense"),
        "index (default: codes); dense: none, with --quantize a plain quantized model",
    )
    parser.add_argument(
        "--quantize",
        choices=["none", *QUANTIZE],
        default="none",
        help="round the linear layers, in compressed-tensors' layout; the head stays "
        "(default: none)",
    )
    parser.add_argument(
        "--calibration",
        type=existing_file,
        nargs="+",
        default=(),
        metavar="FILE",
        help="text (.txt, .jsonl) to round with, by GPTQ, and to make attention latent with "
        "(default: round to nearest; latents by text that the model samples)",
    )
    parser.add_argument(
        "--index-only", action="store_true", help="write the index without the model's weights"
    )
    add_latent(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Convert and say what was written."""
    if args.layout == "deepseek":
        return write_layout(args)
    if args.head == "dense" and args.set:
        raise FlashHeadError("--head dense with --set: there is no index to set options of")
    options = {} if args.head == "dense" else index_options(args)
    from flashhead.convert.workspace import require_new

    if args.out is not None:
        require_new(args.out)
    attention = latent_options(args)
    if args.calibration and attention is None and args.quantize == "none":
        raise FlashHeadError("--calibration: wanted --quantize or --attention latent with it")
    from flashhead.cli import session
    from flashhead.convert.head import convert

    session.open_source(args.model)
    head = args.head or "codes"
    quantize = None if args.quantize == "none" else args.quantize
    report = convert(
        args.model,
        args.out,
        head=head,
        index_only=args.index_only,
        quantize=quantize,
        attention=attention,
        calibration=() if quantize is None else args.calibration,
        **options,
    )
    _print_written(report)
    if report["expectation"] is not None:
        _print_choice(report["expectation"])
    return {**report, "model": args.model}


def _print_written(report: dict[str, Any]) -> None:
    """What was written, and what became of the linear layers."""
    index = (
        "its dense head"
        if report["parameters"] is None
        else f"{report['head']} index of {report['index_bytes'] / 1e6:.0f} MB beside a head"
    )
    print(
        f"wrote {report['out']}: {index} of {report['head_bytes'] / 1e6:.0f} MB, "
        f"{report['seconds']:.0f} s"
    )
    if report["latent"] is not None:
        print_latent(report["latent"])
    if report["quantize"] is not None:
        done = report["quantize"]
        group = "a row" if done["group_size"] is None else f"{done['group_size']} weights"
        whole = "folder" if report["parameters"] is None else "folder with its index"
        print(
            f"{done['layers']} layers in {done['kind']} ({done['method']}), a scale for {group}: "
            f"{report['model_bytes'] / 1e6:.0f} MB of weights became a {whole} of "
            f"{report['folder_bytes'] / 1e6:.0f} MB"
        )


def _print_choice(expected: dict[str, Any]) -> None:
    """The table of choices with what each is expected to read, then what was built."""
    built = (expected["bits"], expected["planes"])
    if expected["table"]:
        print(
            f"\n{'bits':>6}{'planes':>8}{'plane rows':>12}{'exact rows':>12}{'bytes':>9}"
            f"{'certified':>11}{'cost':>8}"
        )
    for row in expected["table"]:
        print(
            f"{row['bits']:>6g}{row['planes']:>8}{row['survivors']:>12,.0f}"
            f"{row['exact_rows']:>12,.0f}{row['bytes_fraction']:>9.1%}"
            f"{row['certified_bytes_fraction']:>11.1%}{row['cost']:>8.3f}"
            + ("  built" if (row["bits"], row["planes"]) == built else "")
        )
    fidelity = f"KL at most {expected['kl_budget']:.1e} nats a token"
    if expected["int8_kl"] is not None:
        fidelity += f" (an int8 head: {expected['int8_kl']:.1e})"
    print(f"\nbuilt: {built[0]:g} bits, planes: {built[1]}; expected {fidelity}")
    chosen = expected["chosen"]
    if chosen is not None:
        print(
            f"expected bytes on text of the model's own: {chosen['bytes_fraction']:.1%} of the "
            f"head's with all logits, {chosen['certified_bytes_fraction']:.1%} for the certified "
            "token alone"
        )
