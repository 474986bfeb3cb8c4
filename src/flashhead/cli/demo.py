"""`flashhead demo`: the same prompt through the dense head and through FlashHead, side by side.

One model in memory; only its head changes. The first run of each head is streamed and warms up,
then silent runs of the two are timed in turn, each pair in the other order than the one before, and
the medians are compared. Last, FlashHead is asked at every step of the dense run: same hidden
state, same token?
"""

import argparse
import statistics
import sys
import time
from typing import Any

from flashhead._version import __version__
from flashhead.cli.arguments import MODEL_HELP, Parser, add_crossover, add_head, command, integer

DEFAULT_MODEL = "gemma-3-270m"
PROMPT = "Here is a recipe for a simple tomato soup:\n"
CHAT_PROMPT = "Explain in a few sentences why the sky is blue."
SMALL_HEAD = 0.3
"""Share of a token's bytes below which the demo says that there is little to gain."""
RULE = 72


def add_parser(subparsers: Any) -> None:
    """Describe the subcommand."""
    parser: Parser = command(
        subparsers, "demo", run, "decode the same prompt with the dense head and with FlashHead"
    )
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="MODEL", help=f"{MODEL_HELP} (default: the first)"
    )
    add_head(parser)
    add_crossover(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="text to go on from")
    parser.add_argument(
        "--max-new-tokens", type=integer(2), default=64, metavar="N", help="default: 64"
    )
    parser.add_argument(
        "--repeats", type=integer(1), default=3, metavar="N", help="timed runs a head (default: 3)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the demo and print its screen."""
    from flashhead.cli import session

    started = time.perf_counter()
    model, tokenizer = session.load_model(args, args.head)
    load_seconds = time.perf_counter() - started
    import torch

    from flashhead.cli.decoding import Decoder, compare_steps
    from flashhead.environment import provenance

    share = session.head_share(model)
    print(f"FlashHead {__version__}: {args.model}, CPU, {torch.get_num_threads()} threads")
    print(f"the head is {share:.0%} of the bytes that a token reads")
    prompt = args.prompt or (PROMPT if tokenizer.chat_template is None else CHAT_PROMPT)
    inputs = session.encode(tokenizer, prompt, raw=False).to(model.device)
    decoder = Decoder(model, tokenizer, inputs, args.max_new_tokens)
    head = decoder.head
    print(f"model loaded and {head.kind} index ready in {load_seconds:.0f} s")
    print(f"\nprompt: {prompt.strip()}")
    for name, flash in (("dense", False), ("FlashHead", True)):
        print(f"\n--- {name} " + "-" * (RULE - len(name) - 5), flush=True)
        decoder.generate(flash, sys.stdout)
    print("\ntiming both, in turn ...", file=sys.stderr, flush=True)
    rates = decoder.time(args.repeats)
    dense_rate, flash_rate = (statistics.median(rates[kind]) for kind in (False, True))
    steps = compare_steps(decoder)
    document = {
        "model": args.model,
        "dense_tok_per_sec": dense_rate,
        "flash_tok_per_sec": flash_rate,
        "speedup": flash_rate / dense_rate,
        **steps,
        "head": head.kind,
        "impl": head.impl,
        "crossover_rows": head.crossover_rows,
        "head_share": share,
        "load_seconds": load_seconds,
        "prompt": prompt,
        "repeats": args.repeats,
        "dense_runs_tok_per_sec": rates[False],
        "flash_runs_tok_per_sec": rates[True],
        **provenance(),
    }
    _print_table(document)
    return document


def _print_table(document: dict[str, Any]) -> None:
    tokens, differ = document["new_tokens"], document["differing_steps"]
    rows = [
        ("", "dense", "FlashHead", ""),
        (
            "tokens per second",
            f"{document['dense_tok_per_sec']:.1f}",
            f"{document['flash_tok_per_sec']:.1f}",
            f"{document['speedup']:.2f}x",
        ),
        (
            "head bytes a token",
            f"{document['head_bytes'] / 1e6:.1f} MB",
            f"{document['head_bytes'] * document['bytes_fraction'] / 1e6:.1f} MB",
            f"{document['bytes_fraction']:.1%}",
        ),
        (
            "tokens scored exactly",
            f"{document['vocab_size']:,}",
            f"{document['candidates_mean']:,.0f}",
            f"{document['candidates_mean'] / document['vocab_size']:.2%}",
        ),
        (
            "tokens agreed",
            "",
            f"{tokens - len(differ)} of {tokens}",
            f"{document['agreement']:.1%}",
        ),
        (
            "certified",
            "",
            f"{round(document['certified_fraction'] * tokens)} of {tokens}",
            f"{document['certified_fraction']:.1%}",
        ),
    ]
    print("\n" + "-" * RULE)
    for name, dense, flash, last in rows:
        print(f"{name:<24}{dense:>14}{flash:>16}{last:>12}".rstrip())
    for step in differ:
        why = ", which the dense head rounds away in bf16" if step["float32_picks_flash"] else ""
        print(
            f"step {step['step']}: dense {step['dense']!r}, FlashHead {step['flash']!r}; "
            f"in float32 the winner is {step['float32']!r}{why}"
        )
    if document["crossover_rows"] == 0:
        print("The search did not beat the dense product when measured here: FlashHead ran dense.")
    if document["head_share"] < SMALL_HEAD:
        print(
            f"The head is only {document['head_share']:.0%} of this model's bytes a token: there "
            "is little to gain here,\nhowever fast the head. Try --model gemma-3-270m."
        )
