"""`flashhead heal`: train a folder with latent attention towards the model it was made from."""

import argparse
import sys
from pathlib import Path
from typing import Any

from flashhead.cli.arguments import (
    MODEL_HELP,
    Parser,
    command,
    existing_file,
    existing_folder,
    integer,
    real,
)

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


def add_parser(subparsers: Any) -> None:
    """Describe the subcommand."""
    parser: Parser = command(
        subparsers, "heal", run, "train a latent model towards its original; Ctrl-C and go on"
    )
    parser.add_argument("out", type=existing_folder, metavar="OUT", help="folder of `convert`")
    parser.add_argument("--teacher", required=True, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--tokens", type=integer(16), required=True, metavar="N", help="trained on in all"
    )
    parser.add_argument(
        "--data",
        type=existing_file,
        nargs="+",
        default=[],
        metavar="FILE",
        help=".txt or .jsonl (default: text that the teacher samples, kept in OUT)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument(
        "--stage",
        choices=("a", "b", "both"),
        default="both",
        help="a: attention outputs, layer by layer; b: logits (default: both)",
    )
    parser.add_argument(
        "--minutes",
        type=real("above 0", lambda value: value > 0),
        metavar="M",
        help="stop with a checkpoint after so long, sampling included",
    )
    parser.add_argument(
        "--batch-tokens",
        type=integer(16),
        metavar="N",
        help=f"of one step (default: {BATCH_TOKENS['cpu']}, on a GPU {BATCH_TOKENS['cuda']})",
    )
    parser.add_argument(
        "--micro-tokens",
        type=integer(16),
        default=4096,
        metavar="N",
        help="of a step at a time: less takes less memory (default: 4096)",
    )
    parser.add_argument(
        "--row-tokens", type=integer(16), default=512, metavar="N", help="default: 512"
    )
    parser.add_argument(
        "--text-tokens",
        type=integer(16),
        default=10_000_000,
        metavar="N",
        help="different tokens, repeated up to --tokens (default: 10,000,000)",
    )
    for stage, rate in (("a", 5e-4), ("b", 1e-4)):
        parser.add_argument(
            f"--rate-{stage}",
            type=real("from 0 to 1", lambda value: 0 < value < 1),
            default=rate,
            metavar="X",
            help=f"largest learning rate of stage {stage} (default: {rate:g}; larger models want "
            "less: docs/latent.md)",
        )
    parser.add_argument("--seed", type=integer(0), default=0, metavar="N", help="default: 0")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Heal and say what came of it."""
    from flashhead.cli import session
    from flashhead.convert.heal import heal
    from flashhead.options_heal import HealOptions

    options = HealOptions(
        tokens=args.tokens,
        stage=args.stage,
        batch_tokens=args.batch_tokens or BATCH_TOKENS[args.device],
        micro_tokens=args.micro_tokens,
        row_tokens=args.row_tokens,
        text_tokens=args.text_tokens,
        minutes=args.minutes,
        rate_a=args.rate_a,
        rate_b=args.rate_b,
        seed=args.seed,
    )
    report = heal(
        args.out,
        session.open_source(args.teacher),
        options,
        files=tuple(args.data),
        device=args.device,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    _print(report, args.out)
    args.exit_code = 0 if report["written"] else 1
    return {**report, "teacher": Path(args.teacher).name}


def _print(report: dict[str, Any], out: Path) -> None:
    held = report["held_out"]
    print(
        f"held-out text: KL {held['before']['kl']:.5f} -> {held['after']['kl']:.5f} nats a "
        f"token, attention error {held['before']['regression']:.4f} -> "
        f"{held['after']['regression']:.4f}"
    )
    print(
        f"{report['seconds']:.0f} s of training, peak memory "
        f"{report['peak_memory_bytes'] / 2**30:.1f} GiB"
    )
    if not report["written"]:
        print(f"worse than before: {out} stays as it was; lower --rate-a or --rate-b")
    if not report["finished"]:
        held_by = out if report["written"] else out / ".heal"
        print(f"the time is over: {held_by} holds the weights so far; the same command goes on")
