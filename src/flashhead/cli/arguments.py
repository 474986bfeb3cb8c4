"""Arguments that several subcommands share, and types that check a value's range while parsing."""

import argparse
import dataclasses
import json
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from flashhead.errors import FlashHeadError
from flashhead.method_names import METHODS
from flashhead.options import ClustersOptions, CodesOptions, make_options

HEADS = ("codes", "clusters")
OPTIONS: dict[str, Any] = {"codes": CodesOptions, "clusters": ClustersOptions}
MODEL_HELP = "gemma-3-270m, smollm2-135m, a folder, a .gguf file or a hub id"


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and no abbreviated options."""

    takes_extra = False
    """Whether what follows `--` becomes `extra`, as it is: arguments of another program."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, up to the first `--` if the parser `takes_extra`."""
        if not self.takes_extra or args is None:
            return super().parse_known_args(args, namespace)
        end = args.index("--") if "--" in args else len(args)
        parsed, unknown = super().parse_known_args(args[:end], namespace)
        parsed.extra = args[end + 1 :]
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        """One line and exit code 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def command(subparsers: Any, name: str, run: Callable[..., Any], summary: str) -> Parser:
    """A subcommand with the options that every subcommand has."""
    parser: Parser = subparsers.add_parser(name, help=summary, description=summary)
    parser.add_argument("--json", action="store_true", help="last line of stdout: one document")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and warnings")
    parser.set_defaults(run=run, exit_code=0)
    return parser


def add_model(parser: Parser) -> None:
    """`--model`."""
    parser.add_argument("--model", required=True, metavar="MODEL", help=MODEL_HELP)


def add_head(
    parser: Parser,
    choices: tuple[str, ...] = HEADS,
    text: str = "index (default: the folder's if it has one, else codes)",
) -> None:
    """`--head` and `--set`."""
    parser.add_argument("--head", choices=choices, help=text)
    known = "; ".join(f"{kind}: {', '.join(_fields(kind))}" for kind in HEADS)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=assignment,
        metavar="NAME=VALUE",
        help=f"an option of the index, may be repeated ({known})",
    )


def add_crossover(parser: Parser) -> None:
    """`--crossover`."""
    parser.add_argument(
        "--crossover",
        type=int,
        choices=(0, 1, 2, 4, 8, 16, 32, 64),
        metavar="ROWS",
        help="search up to so many rows, 0 to 64, a power of two (default: measured, see tune)",
    )


def add_decoding(parser: Parser) -> None:
    """What `generate` and `chat` take: the head, how long, how to sample."""
    parser.add_argument("--dense", action="store_true", help="use the model's own head")
    add_head(parser)
    add_crossover(parser)
    parser.add_argument(
        "--max-new-tokens", type=integer(1), default=256, metavar="N", help="default: 256"
    )
    parser.add_argument(
        "--temperature",
        type=real("0 (greedy) or more", lambda value: value >= 0),
        default=0.0,
        metavar="T",
        help="0 is greedy (default)",
    )
    parser.add_argument(
        "--top-p",
        type=real("above 0 and at most 1", lambda value: 0 < value <= 1),
        default=1.0,
        metavar="P",
        help="sample from the likeliest tokens that hold this probability (default: 1)",
    )
    parser.add_argument(
        "--seed", type=integer(0), metavar="N", help="of the sampling (default: a new one)"
    )


def add_evaluation(parser: Parser, least_positions: int | None = 1) -> None:
    """What every evaluation of a head on a text takes: model, head, text, seed, where to keep it.

    Args:
        parser: of the subcommand.
        least_positions: smallest `--positions`, or None for a command without.
    """
    add_model(parser)
    add_head(parser)
    parser.add_argument(
        "--data", type=existing_file, required=True, metavar="FILE", help=".txt or .jsonl"
    )
    if least_positions is not None:
        add_positions(parser, least_positions)
    parser.add_argument(
        "--seed", type=integer(0), default=0, metavar="N", help="of what is drawn (default: 0)"
    )
    parser.add_argument("--out", type=new_file, metavar="FILE", help="keep the document there too")


def add_positions(parser: Parser, least: int = 1) -> None:
    """`--positions`."""
    parser.add_argument(
        "--positions", type=integer(least), default=4096, metavar="N", help="default: 4096"
    )


def write_document(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON document whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def index_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options given with `--set`, converted to the types of the index they are for, and checked."""
    head = args.head or "codes"
    types = _fields(head)
    values = {name: _convert(name, text, types.get(name, str)) for name, text in args.set}
    make_options(OPTIONS[head], values)
    return values


def _fields(head: str) -> dict[str, Any]:
    hints = typing.get_type_hints(OPTIONS[head])
    return {field.name: hints[field.name] for field in dataclasses.fields(OPTIONS[head])}


def _convert(name: str, text: str, kind: Any) -> Any:
    """Text of `--set` in the type of the option; its range is checked with the others."""
    choices = [choice for choice in typing.get_args(kind) or (kind,) if choice is not Ellipsis]
    if type(None) in choices and text == "none":
        return None
    try:
        if typing.get_origin(kind) is tuple:
            return tuple(int(part) for part in text.split(",") if part)
        return choices[0](text)
    except ValueError as error:
        many = typing.get_origin(kind) is tuple
        wanted = "token ids with commas" if many else choices[0].__name__
        raise FlashHeadError(f"--set {name}={text}: wanted {wanted}") from error


def assignment(text: str) -> tuple[str, str]:
    """`NAME=VALUE`."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r}: wanted NAME=VALUE")
    return name.replace("-", "_"), value


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """Type of an integer that is at least `least`, and at most `most` if that is given."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            limit = "or more" if most is None else f"to {most:,}"
            raise argparse.ArgumentTypeError(f"{text!r}: wanted an integer, {least} {limit}")
        return value

    return parse


def real(wanted: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """Type of a finite number for which `holds`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not (abs(value) < float("inf") and holds(value)):
            raise argparse.ArgumentTypeError(f"{text!r}: wanted {wanted}")
        return value

    return parse


def integers(text: str) -> tuple[int, ...]:
    """Type of a list such as `1,2,4,8`."""
    return tuple(integer(1)(part) for part in text.split(","))


def reals(wanted: str, holds: Callable[[float], bool]) -> Callable[[str], tuple[float, ...]]:
    """Type of a list such as `0.5,1.0`, each number as `real` wants it."""
    return lambda text: tuple(real(wanted, holds)(part) for part in text.split(","))


def method_names(text: str) -> tuple[str, ...]:
    """Type of a list of methods, such as `flashhead,int8`, or `all`."""
    names = METHODS if text == "all" else tuple(text.split(","))
    for name in names:
        if name not in METHODS:
            wanted = ", ".join(("all", *METHODS))
            raise argparse.ArgumentTypeError(f"{name!r}: wanted {wanted}, with commas")
    return tuple(dict.fromkeys(names))


def existing_file(text: str) -> Path:
    """Type of a file that is there."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text!r}: no such file")
    return Path(text)


def new_file(text: str) -> Path:
    """Type of a file to write, whose folder is there."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: wanted a file in a folder that exists")
    return path


def existing_folder(text: str) -> Path:
    """Type of a folder that is there."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: no such folder")
    return Path(text)
