"""`flashhead generate`: stream a model's answer to a prompt."""

import argparse
import sys
from typing import Any

from flashhead.cli.arguments import (
    Parser,
    add_crossover,
    add_head,
    add_model,
    command,
    integer,
    real,
)
from flashhead.errors import FlashHeadError


def add_parser(subparsers: Any) -> None:
    """Describe the subcommand."""
    parser: Parser = command(subparsers, "generate", run, "stream text from a model")
    add_model(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="text to go on from (default: stdin)")
    parser.add_argument("--raw", action="store_true", help="do not use the chat template")
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


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Generate, streaming to stdout."""
    prompt = _prompt(args)
    if args.top_p < 1 and args.temperature == 0:
        raise FlashHeadError("--top-p without --temperature: greedy decoding does not sample")
    from flashhead.cli import session
    from flashhead.cli.stream import Streamer

    model, tokenizer = session.load_model(args, "dense" if args.dense else args.head)
    import torch

    seed = args.seed if args.seed is not None else torch.seed() % 2**32
    torch.manual_seed(seed)
    inputs = session.encode(tokenizer, prompt, args.raw).to(model.device)
    streamer = Streamer(tokenizer, sys.stdout)
    model.generate(
        **inputs,
        **_sampling(args),
        max_new_tokens=args.max_new_tokens,
        pad_token_id=session.pad_token(tokenizer),
        streamer=streamer,
    )
    head = model.get_output_embeddings()
    counted = session.counted(head)
    share = f", {counted['bytes_fraction']:.1%} of the head's bytes read" if counted else ""
    print(
        f"[{len(streamer.tokens)} tokens, {streamer.tok_per_sec:.1f} tok/s{share}]",
        file=sys.stderr,
    )
    return {
        "model": args.model,
        "head": head.kind,
        "prompt": prompt,
        "text": streamer.text,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "new_tokens": len(streamer.tokens),
        "seconds": streamer.seconds,
        "tok_per_sec": streamer.tok_per_sec,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "seed": seed if args.temperature > 0 else None,
        **counted,
    }


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is None and sys.stdin.isatty():
        raise FlashHeadError("no prompt: pass --prompt TEXT or pipe it in")
    prompt: str = sys.stdin.read() if args.prompt is None else args.prompt
    if not prompt.strip():
        raise FlashHeadError("the prompt is empty: pass --prompt TEXT or pipe it in")
    return prompt


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `generate`; only what the user can set cuts the distribution (no top-k)."""
    if args.temperature == 0:
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": 0,
    }
