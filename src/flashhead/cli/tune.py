"""`flashhead tune`: up to how many rows the search pays on this machine, measured and kept."""

import argparse
import sys
from typing import Any

from flashhead.cli.arguments import MODEL_HELP, Parser, add_head, command, index_options, integer
from flashhead.errors import FlashHeadError

LEAST_REPEATS = 9
USES = {"logits": "complete logits", "token": "certified token"}


def add_parser(subparsers: Any) -> None:
    """Describe the subcommand."""
    parser: Parser = command(
        subparsers, "tune", run, "measure up to what batch size the search pays here, and keep it"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="MODEL", help=MODEL_HELP)
    what.add_argument("--list", action="store_true", help="show what is kept")
    what.add_argument("--clear", action="store_true", help="forget what is kept")
    add_head(parser)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="of the model (default: cpu)")
    parser.add_argument(
        "--repeats",
        type=integer(LEAST_REPEATS),
        metavar="N",
        help="interleaved timings a batch size (default: 15)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and keep, or show or forget what is kept."""
    from flashhead.nn.tuning import SWITCH, cache_is_on

    if args.model is not None:
        return _tune(args)
    for name in ("head", "set", "device", "repeats"):
        if getattr(args, name):
            raise FlashHeadError(f"--{name} without --model: wanted both")
    if not cache_is_on():
        raise FlashHeadError(f"{SWITCH}=0: nothing is kept, so there is nothing to list or clear")
    return _list() if args.list else _clear()


def _tune(args: argparse.Namespace) -> dict[str, Any]:
    head = _load_head(args)
    import dataclasses

    from flashhead.environment import provenance
    from flashhead.nn.crossover import crossover_of, key_of, time_rows
    from flashhead.nn.tuning import SWITCH, Entry, cache_is_on, store_entry

    pairs = args.repeats or 15
    timings = time_rows(head, pairs, all_rows=True, progress=True)
    entry = Entry(key_of(head), crossover_of(timings), pairs)
    print(_format_timings(entry, timings))
    path = store_entry(entry) if cache_is_on() else None
    print(f"not kept: {SWITCH}=0" if path is None else f"kept in {path}")
    return {
        "model": args.model,
        **dataclasses.asdict(entry),
        "rows": [dataclasses.asdict(timing) for timing in timings],
        "file": None if path is None else str(path),
        **provenance(),
    }


def _load_head(args: argparse.Namespace) -> Any:
    """The head of a model that was loaded to the device."""
    from flashhead.cli import session

    options = index_options(args)
    source = session.open_source(args.model)
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise FlashHeadError("--device cuda: torch finds no CUDA device here")
    print(f"loading {args.model} ...", file=sys.stderr, flush=True)
    from flashhead.integrations import transformers

    model = transformers.load(source, args.head, device=args.device or "cpu", **options)
    return transformers.head_of(model)


def _format_timings(entry: Any, timings: list[Any]) -> str:
    """Time of the search over that of the dense product: one line a batch size."""
    key, uses = entry.key, [use for use in USES if any(t.use == use for t in timings)]
    lines = [
        f"{key.head} head {key.vocab_size:,} x {key.hidden_size:,}, {key.impl}, {key.device}",
        "time of the search over that of the dense product (below 1: the search is faster), "
        f"medians of {entry.pairs} pairs",
        f"{'':>4}" + "".join(f"{USES[use]:>18}{'p10-p90':>14}" for use in uses),
    ]
    for rows in sorted({timing.rows for timing in timings}):
        line = f"{rows:>4}"
        for timing in (timing for timing in timings if timing.rows == rows):
            spread = f"{timing.ratio_p10:.2f}-{timing.ratio_p90:.2f}"
            line += f"{timing.ratio:>18.2f}{spread:>14}"
        lines.append(line)
    return "\n".join([*lines, f"the search pays: {_pays(entry)}"])


def _pays(entry: Any) -> str:
    rows = {"logits": entry.crossover.logits, "token": entry.crossover.token}
    return "; ".join(
        f"{USES[use]}, up to {count} rows" if count else f"{USES[use]}, never"
        for use, count in rows.items()
        if use != "token" or entry.key.head == "codes"
    )


def _list() -> dict[str, Any]:
    import dataclasses

    from flashhead.nn.tuning import read_entries, tune_file

    try:
        entries = read_entries()
    except FlashHeadError as error:
        raise FlashHeadError(f"{error}: flashhead tune --clear removes it") from error
    print(f"{tune_file()}: {len(entries) or 'no'} crossovers")
    for entry in entries:
        key = entry.key
        lines = [
            f"{key.head} head {key.vocab_size:,} x {key.hidden_size:,} {key.dtype}"
            f"{' with bias' if key.bias else ''}, {key.impl}: {_pays(entry)}",
            f"{key.device}; {key.versions}",
            f"{key.layout}; {entry.pairs} pairs on {key.states} states",
        ]
        # a name out of a file must not steer the terminal
        safe = [ascii(line)[1:-1] if not line.isprintable() else line for line in lines]
        print("\n" + "\n  ".join(safe))
    return {"file": str(tune_file()), "entries": [dataclasses.asdict(entry) for entry in entries]}


def _clear() -> dict[str, Any]:
    from flashhead.nn.tuning import clear_entries, tune_file

    removed = clear_entries()
    print(f"{'removed' if removed else 'there is no'} {tune_file()}")
    return {"file": str(tune_file()), "removed": removed}
