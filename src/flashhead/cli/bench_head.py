"""`flashhead bench head`: the head alone, verified, then timed against other products.

On the CPU a model's head is timed (`bench/head.py`). With `--device cuda` so is a head of a model,
of a file or of a shape (`bench/device_head.py`), and `--from` draws what that measured.
"""

import argparse
import functools
from pathlib import Path
from typing import Any

from flashhead.bench.shapes import DEVICE_METHODS, SHAPES
from flashhead.cli.arguments import (
    MODEL_HELP,
    Parser,
    add_head,
    command,
    existing_file,
    index_options,
    integer,
    integers,
    new_file,
    write_document,
)
from flashhead.errors import FlashHeadError

HIDDEN_STATES = 512
"""States of the model's own text that the rounds go through."""
BATCHES = {"cpu": (1, 2, 4, 8), "cuda": (1, 4, 16)}
REPEATS = {"cpu": 50, "cuda": 200}


def add_parser(subparsers: Any) -> None:
    """Describe the subcommand."""
    parser: Parser = command(subparsers, "head", run, "verify the head, then time it alone")
    parser.add_argument("--model", metavar="MODEL", help=MODEL_HELP)
    add_head(parser)
    parser.add_argument("--device", choices=tuple(BATCHES), default="cpu", help="default: cpu")
    parser.add_argument(
        "--batches",
        "--batch",
        type=integers,
        metavar="N,N",
        help="default: 1,2,4,8; on cuda 1,4,16",
    )
    parser.add_argument(
        "--repeats", type=integer(1), metavar="N", help="rounds (default: 50; on cuda 200)"
    )
    parser.add_argument(
        "--seed", type=integer(0), default=1, metavar="N", help="of the text (calibration: 0)"
    )
    parser.add_argument("--out", type=new_file, metavar="FILE", help="keep the document there too")
    device = parser.add_argument_group("with --device cuda")
    device.add_argument(
        "--shape", choices=tuple(SHAPES), help="synthetic rows with the statistics of real ones"
    )
    device.add_argument(
        "--head-file",
        type=existing_file,
        metavar="FILE",
        help="safetensors: weight [V, d], hidden [n, d], calibration [m, d]; metadata: name",
    )
    device.add_argument(
        "--skip",
        type=device_methods,
        default=(),
        metavar="A,B",
        help=f"leave out some of {','.join(DEVICE_METHODS)}",
    )
    drawing = parser.add_argument_group("drawing")
    drawing.add_argument(
        "--from",
        dest="sources",
        nargs="+",
        type=existing_file,
        metavar="JSON",
        help="only draw documents of --device cuda, to --plot",
    )
    drawing.add_argument("--plot", type=new_file, metavar="FILE", help="SVG or PNG")


def device_methods(text: str) -> tuple[str, ...]:
    """Type of a list of methods that can be left out."""
    names = tuple(text.split(","))
    for name in names:
        if name not in DEVICE_METHODS:
            wanted = ", ".join(DEVICE_METHODS)
            raise argparse.ArgumentTypeError(f"{name!r}: wanted {wanted}, with commas")
    return names


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Time and print the table, or draw."""
    _require_one(args)
    if args.sources is not None:
        return _draw(args.sources, args.plot)
    args.batches = args.batches or BATCHES[args.device]
    args.repeats = args.repeats or REPEATS[args.device]
    document = _on_cuda(args) if args.device == "cuda" else _on_cpu(args)
    if args.out is not None:
        write_document(args.out, document)
    return document


def _require_one(args: argparse.Namespace) -> None:
    """Mistakes that need no torch to be seen."""
    heads = {"--model": args.model, "--shape": args.shape, "--head-file": args.head_file}
    given = [name for name, value in heads.items() if value is not None]
    if args.sources is not None or args.plot is not None:
        if args.sources is None or args.plot is None or given:
            raise FlashHeadError("drawing: wanted --from JSON [JSON ...] --plot FILE and no head")
        return
    if len(given) > 1:
        raise FlashHeadError(f"{' and '.join(given)}: wanted one of them")
    if args.device == "cpu" and given != ["--model"]:
        missing = "--model is missing" if not given else f"{given[0]} without --device cuda"
        raise FlashHeadError(f"{missing}: on the CPU wanted --model")
    if args.device == "cpu" and args.skip:
        raise FlashHeadError("--skip without --device cuda: nothing is left out on the CPU")
    if not given:
        raise FlashHeadError(f"--device cuda: wanted one of {', '.join(heads)}")
    if args.device == "cuda" and args.head == "clusters":
        raise FlashHeadError("--head clusters: --device cuda times codes and clusters, see --skip")


def _on_cpu(args: argparse.Namespace) -> dict[str, Any]:
    from flashhead.cli import session

    model, _ = session.load_model(args, args.head)
    from flashhead.bench.head import bench_head, format_head_table
    from flashhead.integrations.calibration import sample_hidden_states

    hidden = sample_hidden_states(model, HIDDEN_STATES, args.seed, progress=True)
    document = bench_head(
        model.get_output_embeddings(), hidden, batches=args.batches, repeats=args.repeats
    )
    document = {"model": args.model, **document}
    print(format_head_table(document))
    return document


def _on_cuda(args: argparse.Namespace) -> dict[str, Any]:
    from flashhead.options import CodesOptions, make_options

    options = make_options(CodesOptions, index_options(args))
    _require_cuda()
    from flashhead.bench.device_head import bench_device
    from flashhead.bench.device_table import format_device_table

    document = bench_device(
        _problem(args, options),
        batches=args.batches,
        repeats=args.repeats,
        skip=args.skip,
        options=options,
        save=None if args.out is None else functools.partial(write_document, args.out),
    )
    print(format_device_table(document))
    return document


def _require_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise FlashHeadError(
            f"--device cuda: torch {torch.__version__} sees no CUDA device on this machine"
        )


def _problem(args: argparse.Namespace, options: Any) -> Any:
    """The head to time and its hidden states, on the device."""
    from flashhead.bench.device_head import states_needed

    states = states_needed(args.batches)
    if args.head_file is not None:
        from flashhead.bench.head_file import read_head_file

        return read_head_file(args.head_file, "cuda")
    if args.shape is not None:
        from flashhead.bench.synthetic import make_problem

        return make_problem(
            args.shape,
            SHAPES[args.shape],
            states=states,
            calibration=options.calibration_tokens,
            device="cuda",
            seed=args.seed,
        )
    return _problem_of_model(args, options, states)


def _problem_of_model(args: argparse.Namespace, options: Any, states: int) -> Any:
    from flashhead.cli import session

    source = session.open_source(args.model)
    from flashhead.bench.synthetic import Problem
    from flashhead.integrations import transformers
    from flashhead.integrations.calibration import sample_hidden_states

    model = transformers.load_dense(source).to("cuda")
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise FlashHeadError(f"{args.model}: its head has a bias, which is not timed")
    calibration = sample_hidden_states(model, options.calibration_tokens, options.seed, True)
    hidden = sample_hidden_states(model, states, args.seed, True)
    weight, hidden, calibration = (
        tensor.detach().bfloat16() for tensor in (head.weight, hidden, calibration)
    )
    return Problem(Path(args.model).name, weight, calibration, hidden, synthetic=False)


def _draw(sources: list[Path], plot: Path) -> dict[str, Any]:
    from flashhead.report.head_times import draw_head_times, read_documents

    documents = read_documents(sources)
    draw_head_times(documents, plot)
    print(f"drawn: {plot}")
    return {"plot": str(plot), "documents": [document["name"] for document in documents]}
