"""`flashhead bench attention`: one decode step's attention, latents against full caches."""

import argparse
import functools
from pathlib import Path
from typing import Any

from flashhead.bench.attention_shapes import FORMATS, SHAPES
from flashhead.cli.arguments import (
    Parser,
    command,
    existing_file,
    integer,
    integers,
    new_file,
    write_document,
)
from flashhead.errors import FlashHeadError

REPEATS = {"cpu": 15, "cuda": 60}


def add_parser(subparsers: Any) -> None:
    """Describe the subcommand."""
    parser: Parser = command(
        subparsers, "attention", run, "time attention over latents and over full caches"
    )
    parser.add_argument(
        "--shape",
        metavar="SHAPE",
        help=f"{', '.join(SHAPES)}, or heads=N,head_dim=N,kv_heads=N,rank=N,rope=N "
        "(default: mha-7b)",
    )
    parser.add_argument(
        "--context", type=integers, default=(4096, 16384, 32768), metavar="N,N", help="tokens a row"
    )
    parser.add_argument("--batch", type=integers, default=(1, 8, 32), metavar="N,N", help="rows")
    parser.add_argument(
        "--dtype",
        type=formats,
        default=("bf16", "int4"),
        metavar="A,B",
        help=f"how latents are kept: some of {','.join(FORMATS)} (default: bf16,int4)",
    )
    parser.add_argument("--device", choices=tuple(REPEATS), default="cpu", help="default: cpu")
    parser.add_argument(
        "--repeats", type=integer(1), metavar="N", help="rounds (default: 15; on cuda 60)"
    )
    parser.add_argument("--out", type=new_file, metavar="FILE", help="keep the document there too")
    drawing = parser.add_argument_group("drawing")
    drawing.add_argument(
        "--from", dest="source", type=existing_file, metavar="JSON", help="only draw this document"
    )
    drawing.add_argument("--plot", type=new_file, metavar="FILE", help="SVG or PNG")


def formats(text: str) -> tuple[str, ...]:
    """Type of a list of formats."""
    names = tuple(text.split(","))
    for name in names:
        if name not in FORMATS:
            raise argparse.ArgumentTypeError(f"{name!r}: wanted {', '.join(FORMATS)}, with commas")
    return names


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Time and print the table, or draw."""
    if args.source is not None:
        return _draw(args)
    from flashhead.bench.attention_shapes import parse_shape

    shape = parse_shape(args.shape or "mha-7b")
    from flashhead.bench.attention import bench_attention, format_attention_table

    if args.device == "cuda":
        _require_cuda()
    document = bench_attention(
        shape,
        contexts=args.context,
        batches=args.batch,
        formats=args.dtype,
        device=args.device,
        repeats=args.repeats or REPEATS[args.device],
        save=None if args.out is None else functools.partial(write_document, args.out),
    )
    print(format_attention_table(document))
    if args.plot is not None:
        from flashhead.report.attention_times import draw_attention

        draw_attention(document, args.plot)
    return document


def _require_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise FlashHeadError(
            f"--device cuda: torch {torch.__version__} sees no CUDA device on this machine"
        )


def _draw(args: argparse.Namespace) -> dict[str, Any]:
    if args.plot is None or args.shape is not None or args.out is not None:
        raise FlashHeadError("drawing: wanted --from JSON --plot FILE and nothing else")
    from flashhead.bench.attention import format_attention_table
    from flashhead.report.attention_times import draw_attention, read_attention

    path: Path = args.plot
    document = read_attention(args.source)
    draw_attention(document, path)
    print(format_attention_table(document))
    print(f"drawn: {path}")
    return {"plot": str(path)}
