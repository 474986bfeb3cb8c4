"""Train a 32-head model and its latent twin from scratch on the same text, and compare them.

    python examples/train_twins.py train OUT --tokens 80000000 --device cuda --json train.json
    python examples/train_twins.py times OUT --contexts 2048,8192,16384 --device cuda
    flashhead convert OUT/mha OUT/mha-8x --attention latent --kv-ratio 8 --head dense
    flashhead heal OUT/mha-8x --teacher OUT/mha --tokens 8000000 --data OUT/heal.jsonl
    python examples/train_twins.py judge OUT OUT/mha OUT/latent OUT/mha-8x --device cuda

The text is what is installed on the machine (Python sources, documentation) with synthetic tasks
strewn in (`twins/corpus.py`). OUT keeps it, its tokenizer, and both models as folders that
`flashhead.load` takes. Ctrl-C and `--minutes` leave a checkpoint; the same command goes on.
"""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from flashhead.cli.arguments import (
    Parser,
    command,
    existing_file,
    existing_folder,
    integer,
    integers,
    new_file,
    real,
    write_document,
)
from flashhead.errors import FlashHeadError


def build_parser() -> Parser:
    """The parser of all subcommands."""
    parser = Parser(prog="train_twins.py", description=(__doc__ or "").splitlines()[0])
    subparsers = parser.add_subparsers(metavar="WHAT", required=True, dest="what")
    _add_train(subparsers)
    own = command(subparsers, "times", run_times, "training and decode steps at several contexts")
    own.add_argument("out", type=existing_folder, metavar="OUT", help="folder of `train`")
    own.add_argument("--contexts", type=integers, default=(2048, 8192, 16384))
    own.add_argument("--batches", type=integers, default=(8, 32), help="of decode steps")
    own.add_argument("--step-tokens", type=integer(16), default=32768, help="of training steps")
    own.add_argument("--repeats", type=integer(2), default=15)
    _add_device(own)
    own = command(subparsers, "judge", run_judge, "loss and answers of model folders")
    own.add_argument("out", type=existing_folder, metavar="OUT", help="folder of `train`")
    own.add_argument(
        "folders", type=existing_folder, nargs="+", metavar="FOLDER", help="the first: baseline"
    )
    own.add_argument("--tokens", type=integer(16), default=1_000_000, help="held out, at most")
    own.add_argument("--questions", type=integer(1), default=1000, help="of each task, at most")
    _add_device(own)
    own = command(subparsers, "plot", run_plot, "loss curves of a document of `train`, as SVG")
    own.add_argument("document", type=existing_file, metavar="JSON")
    own.add_argument("svg", type=new_file, metavar="SVG")
    return parser


def _add_train(subparsers: Any) -> None:
    own = command(subparsers, "train", run_train, "train both, write OUT/mha and OUT/latent")
    share = real("from 0 to 1", lambda value: 0 < value < 1)
    own.add_argument("out", type=Path, metavar="OUT", help="folder, made if it is not there")
    own.add_argument("--tokens", type=integer(16), default=80_000_000, help="of each twin")
    own.add_argument(
        "--corpus", default="", help="folders with commas (default: what is installed)"
    )
    own.add_argument("--corpus-bytes", type=integer(1), default=300_000_000)
    own.add_argument("--vocab-size", type=integer(300), default=8192)
    own.add_argument("--tokenizer", default="", help="folder of a tokenizer to take instead")
    own.add_argument("--task-share", type=share, default=0.08, help="of the tokens")
    own.add_argument("--heal-tokens", type=integer(16), help="in heal.jsonl (default: a tenth)")
    for name, value in (("layers", 6), ("hidden", 1024), ("heads", 32), ("head-dim", 32)):
        own.add_argument(f"--{name}", type=integer(1), default=value)
    own.add_argument("--intermediate", type=integer(1), default=2048)
    own.add_argument("--context", type=integer(16), default=1024)
    own.add_argument("--batch-tokens", type=integer(16), default=65536, help="of one step")
    own.add_argument("--micro-tokens", type=integer(16), default=32768, help="of one pass")
    own.add_argument("--held-tokens", type=integer(16), default=262_144, help="of the curves")
    own.add_argument("--rate", type=share, default=1e-3, help="largest learning rate")
    own.add_argument("--seed", type=integer(0), default=0)
    own.add_argument("--only", choices=("mha", "latent"), help="train this one alone")
    own.add_argument("--minutes", type=real("above 0", lambda value: value > 0))
    _add_device(own)


def _add_device(parser: Parser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--eager", action="store_true", help="no torch.compile on a GPU")
    parser.add_argument("--out-json", type=new_file, metavar="FILE", help="the document, too")


def run_train(args: argparse.Namespace) -> dict[str, Any]:
    """Train both, one after the other."""
    from twins.run import train_twins

    return train_twins(args)


def run_times(args: argparse.Namespace) -> dict[str, Any]:
    """Time both, by context."""
    from twins.run import time_twins

    return time_twins(args)


def run_judge(args: argparse.Namespace) -> dict[str, Any]:
    """Judge folders."""
    from twins.run import judge_folders

    return judge_folders(args)


def run_plot(args: argparse.Namespace) -> dict[str, Any]:
    """Draw the curves."""
    from twins.plot import draw

    return draw(args.document, args.svg)


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; 2: a mistake the user can mend, 130: Ctrl-C."""
    args = build_parser().parse_args(argv)
    started = time.perf_counter()
    try:
        with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
            document = args.run(args)
        if getattr(args, "out_json", None):
            write_document(args.out_json, document)
        if args.json:
            print(json.dumps(document, allow_nan=False))
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on", file=sys.stderr)
        return 130
    except (FlashHeadError, ImportError) as error:
        if args.debug or not isinstance(error, FlashHeadError):
            raise
        print(f"train_twins.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
