"""`flashhead bench decode --context N`: decode steps at a long context, full caches and latents."""

import argparse
import functools
from typing import Any

from flashhead.bench.attention_shapes import FORMATS, SHAPES
from flashhead.cli.arguments import (
    Parser,
    existing_file,
    integer,
    integers,
    new_file,
    write_document,
)
from flashhead.errors import FlashHeadError

DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
KINDS = (*FORMATS, "mixed")
ONLY_HERE = (
    *("shape", "batch", "kv_dtype", "data", "device", "dtype", "layers", "steps", "lines", "out"),
)
"""Arguments that need `--context`."""
NOT_HERE = ("head", "set", "prompts", "compile")
"""Arguments that `--context` takes no notice of, and so refuses."""


def add_arguments(parser: Parser) -> None:
    """What `--context` brings along."""
    group = parser.add_argument_group(
        "at a long context",
        "MODEL has latent attention; --against BASE adds its full caches; heads are dense",
    )
    group.add_argument("--context", type=integers, metavar="N,N", help="cached tokens a row")
    group.add_argument("--batch", type=integers, metavar="N,N", help="rows (default: 1)")
    group.add_argument(
        "--shape",
        metavar="SHAPE",
        help=f"random weights instead of MODEL: {', '.join(SHAPES)}, or heads=N,...",
    )
    group.add_argument(
        "--layers", type=integer(1), metavar="N", help="of a SHAPE's model (default: 32)"
    )
    group.add_argument(
        "--kv-dtype",
        type=kinds,
        metavar="A,B",
        help=f"how latents are kept: some of {','.join(KINDS)} (default: as the folder says)",
    )
    group.add_argument(
        "--data", type=existing_file, metavar="FILE", help="the text (default: random tokens)"
    )
    group.add_argument("--device", choices=tuple(DTYPES), help="default: cpu")
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the weights (default: float32; on cuda bfloat16)",
    )
    group.add_argument("--steps", type=integer(1), metavar="N", help="timed at once (default: 16)")
    group.add_argument(
        "--lines",
        type=lambda text: tuple(text.split(",")),
        metavar="A,B",
        help="of the table, the first is the baseline (default: all; they share the memory)",
    )
    group.add_argument("--out", type=new_file, metavar="FILE", help="keep the document there too")


def kinds(text: str) -> tuple[str, ...]:
    """Type of a list of kinds."""
    names = tuple(text.split(","))
    for name in names:
        if name not in KINDS:
            raise argparse.ArgumentTypeError(f"{name!r}: wanted {', '.join(KINDS)}, with commas")
    return names


def refuse_others(args: argparse.Namespace) -> None:
    """FlashHeadError unless the arguments belong together."""
    if args.context is None:
        for name in ONLY_HERE:
            if getattr(args, name) is not None:
                raise FlashHeadError(f"--{name.replace('_', '-')}: wanted --context N with it")
        if args.model is None:
            raise FlashHeadError("bench decode: wanted --model MODEL")
        return
    for name in NOT_HERE:
        if getattr(args, name):
            raise FlashHeadError(f"--context: --{name} is of the other benchmark")
    if (args.model is None) == (args.shape is None):
        raise FlashHeadError("--context: wanted --model MODEL or --shape SHAPE")
    for name, needed in (("layers", "shape"), ("data", "model"), ("against", "model")):
        if getattr(args, name) is not None and getattr(args, needed) is None:
            raise FlashHeadError(f"--{name}: wanted --{needed} with it")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Time and print the table."""
    import torch

    from flashhead.bench.context import bench_context
    from flashhead.bench.context_table import format_context_table
    from flashhead.integrations.latent_model import store_of

    device = args.device or "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise FlashHeadError(
            f"--device cuda: torch {torch.__version__} sees no CUDA device on this machine"
        )
    dtype = getattr(torch, args.dtype or DTYPES[device])
    longest = max(args.context)
    if args.shape is not None:
        model, bases, ids = _random(args, longest, device, dtype)
    else:
        model, bases, ids = _loaded(args, longest, device, dtype)
    about = {"model": args.model, "base": args.against, "shape": args.shape}
    about["layers"] = len(model.get_decoder().layers)
    about["data"] = "random tokens" if args.data is None else args.data.name
    document = bench_context(
        model,
        bases,
        ids,
        contexts=args.context,
        batches=args.batch or (1,),
        kinds=tuple(store_of(kind) for kind in args.kv_dtype or ()),
        steps=args.steps or 16,
        rounds=args.repeats,
        only=args.lines or (),
        save=None if args.out is None else functools.partial(_save, args.out, about),
    )
    document |= about
    print(format_context_table(document))
    return document


def _save(path: Any, about: dict[str, Any], document: dict[str, Any]) -> None:
    write_document(path, document | about)


def _random(args: argparse.Namespace, longest: int, device: str, dtype: Any) -> Any:
    import torch

    from flashhead.bench.attention_shapes import parse_shape
    from flashhead.bench.random_latent import VOCAB, random_models

    room = longest + 1024
    models = random_models(parse_shape(args.shape), args.layers or 32, room, device, dtype)
    generator = torch.Generator().manual_seed(0)
    return *models, torch.randint(VOCAB, (longest + 1,), generator=generator)


def _loaded(args: argparse.Namespace, longest: int, device: str, dtype: Any) -> Any:
    import torch

    from flashhead.cli import session
    from flashhead.integrations.transformers import load_dense, load_tokenizer

    source, place = session.open_source(args.model), torch.device(device)
    model, bases = load_dense(source, dtype=dtype, device=place), {}
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and longest >= most:
        raise FlashHeadError(f"--context {longest}: wanted less than the model's {most:,} tokens")
    if args.against is not None:
        base = session.open_source(args.against)
        bases["full"] = load_dense(base, dtype=dtype, device=place)
    if args.data is None:
        generator = torch.Generator().manual_seed(0)
        words = model.config.get_text_config().vocab_size
        return model, bases, torch.randint(words, (longest + 1,), generator=generator)
    text = args.data.read_text(encoding="utf-8")[: 16 * (longest + 1)]
    tokens = load_tokenizer(source)(text, return_tensors="pt")["input_ids"][0]
    return model, bases, tokens[: longest + 1]
