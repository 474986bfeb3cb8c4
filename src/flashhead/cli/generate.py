"""`flashhead generate`: stream a model's answer to a prompt."""

import argparse
import sys
from typing import Any

from flashhead.cli.arguments import Parser, add_decoding, add_model, command
from flashhead.cli.stream import Streamer
from flashhead.errors import FlashHeadError


def add_parser(subparsers: Any) -> None:
    """Describe the subcommand."""
    parser: Parser = command(subparsers, "generate", run, "stream text from a model")
    add_model(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="text to go on from (default: stdin)")
    parser.add_argument("--raw", action="store_true", help="do not use the chat template")
    add_decoding(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Generate, streaming to stdout."""
    prompt = _prompt(args)
    choice = sampling(args)
    from flashhead.cli import session

    model, tokenizer = session.load_model(args, "dense" if args.dense else args.head)
    seed = seed_torch(args.seed)
    inputs = session.encode(tokenizer, prompt, args.raw).to(model.device)
    streamer = Streamer(tokenizer, sys.stdout)
    model.generate(
        **inputs,
        **choice,
        max_new_tokens=args.max_new_tokens,
        pad_token_id=session.pad_token(tokenizer),
        streamer=streamer,
    )
    head = model.get_output_embeddings()
    counted = session.counted(head)
    print(f"[{summary(streamer, counted)}]", file=sys.stderr)
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


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `generate`; only what the user can set cuts the distribution (no top-k).

    Raises:
        FlashHeadError: `--top-p` without `--temperature`.
    """
    if args.temperature == 0:
        if args.top_p < 1:
            raise FlashHeadError("--top-p without --temperature: greedy decoding does not sample")
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": 0,
    }


def seed_torch(seed: int | None) -> int:
    """Seed the sampling; None: with a new seed. Returns the seed."""
    import torch

    seed = torch.seed() % 2**32 if seed is None else seed
    torch.manual_seed(seed)
    return seed


def summary(streamer: Streamer, counted: dict[str, float]) -> str:
    """Tokens, speed, and what `session.counted` says of the search, on a part of a line."""
    share = f", {counted['bytes_fraction']:.1%} of the head's bytes read" if counted else ""
    return f"{len(streamer.tokens)} tokens, {streamer.tok_per_sec:.1f} tok/s{share}"
