"""Which learning rate heals a folder: short runs on copies of it, then the best one in full.

    python benchmarks/heal_rates.py latent-8x --teacher qwen2.5-coder-0.5b --device cuda \\
        --rates 5e-6,2e-5,1e-4 --tokens 800000 --full-tokens 8000000 --out heal.json

Text is sampled from the teacher once and shared. A run is `flashhead heal --stage b`; copies are
removed. The full run rewrites the folder, as `flashhead heal` does. The document is written after
every run; exit code 1: a run failed, or none of the rates makes the folder better.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from flashhead.cli.arguments import Parser, existing_folder, integer, new_file, reals
from flashhead.cli.session import open_source
from flashhead.convert.heal import require_teacher
from flashhead.convert.heal_text import healing_rows
from flashhead.environment import provenance
from flashhead.errors import FlashHeadError
from flashhead.integrations.transformers import load_dense, load_tokenizer


def sample(args: argparse.Namespace) -> None:
    """Keep text of the teacher in the folder, where `flashhead heal` looks for it."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    if args.device == "cuda" and not torch.cuda.is_available():
        raise FlashHeadError("--device cuda: torch sees no GPU")
    source = open_source(args.teacher)
    teacher = load_dense(source, dtype=dtype)
    require_teacher(load_dense(str(args.folder)), teacher)
    healing_rows(
        teacher.to(args.device),
        load_tokenizer(source),
        (),
        args.folder / ".heal-text-0.safetensors",
        tokens=min(args.text_tokens, max(args.tokens, args.full_tokens)),
        row_tokens=512,
        seed=0,
        seconds=None,
    )


def run(args: argparse.Namespace, folder: Path, rate: float, tokens: int) -> dict[str, Any] | None:
    """`flashhead heal`: its document, or None if it ended with an error."""
    options = {
        "--teacher": args.teacher,
        "--device": args.device,
        "--stage": "b",
        "--rate-b": rate,
        "--tokens": tokens,
        "--text-tokens": min(tokens, args.text_tokens),
        "--batch-tokens": args.batch_tokens,
        "--micro-tokens": args.micro_tokens,
    }
    command = [sys.executable, "-m", "flashhead", "heal", str(folder), "--json"]
    command += [str(word) for pair in options.items() for word in pair]
    lines = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    if not lines:  # exit code 1 with a document is a model that got worse
        return None
    document: dict[str, Any] = json.loads(lines[-1])
    held = document["held_out"]
    print(
        f"rate {rate}, {tokens:,} tokens: KL {held['before']['kl']:.5f} -> "
        f"{held['after']['kl']:.5f}, {document['seconds']:.0f} s",
        flush=True,
    )
    return document


def rates_tried(args: argparse.Namespace, document: dict[str, Any], keep: Any) -> None:
    """Short runs on copies; the document gets them by rate, or the rates that failed."""
    copy = args.folder.with_name(f"{args.folder.name}-try")
    for rate in args.rates:
        shutil.rmtree(copy, ignore_errors=True)
        try:
            shutil.copytree(args.folder, copy)
            found = run(args, copy, rate, args.tokens)
        finally:
            shutil.rmtree(copy, ignore_errors=True)
        if found is None:
            document["failed"].append(f"{rate:g}")
        else:
            document["rates"][f"{rate:g}"] = found
        keep()


def search(args: argparse.Namespace) -> int:
    """Try all rates, heal with the best, keep the document."""
    started = time.monotonic()
    sample(args)
    if args.device == "cuda":
        torch.cuda.empty_cache()
    document: dict[str, Any] = {"benchmark": "heal_rates", "rates": {}, "failed": []}

    def keep(**parts: Any) -> None:
        document.update(parts, seconds=round(time.monotonic() - started, 1))
        if args.out:
            args.out.write_text(json.dumps(document | provenance(), indent=1) + "\n")

    rates_tried(args, document, keep)
    after = {rate: one["held_out"]["after"]["kl"] for rate, one in document["rates"].items()}
    if not after:
        return 1
    best = min(after, key=after.__getitem__)
    keep(best=best)
    print(f"best: {best}", flush=True)
    written = document["rates"][best]["written"]
    if args.full_tokens and written:
        full = run(args, args.folder, float(best), args.full_tokens)
        keep(full=full)
        written = full is not None and full["written"]
    return 0 if written and not document["failed"] else 1


def main() -> int:
    parser = Parser(prog="heal_rates.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=existing_folder)
    parser.add_argument("--teacher", required=True)
    rates = reals("rates from 0 to 1", lambda value: 0 < value < 1)
    parser.add_argument("--rates", type=rates, default="5e-6,2e-5,1e-4", help="tried in turn")
    parser.add_argument("--tokens", type=integer(16), default=800_000, help="of a short run")
    parser.add_argument("--full-tokens", type=integer(0), default=0, help="0: short runs only")
    parser.add_argument("--text-tokens", type=integer(16), default=4_000_000, help="different ones")
    parser.add_argument("--batch-tokens", type=integer(16), default=16384)
    parser.add_argument("--micro-tokens", type=integer(16), default=4096)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=new_file)
    args = parser.parse_args()
    try:
        return search(args)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except FlashHeadError as error:
        print(f"heal_rates.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
