"""`flashhead convert --attention latent`: its arguments and its lines on the screen."""

import argparse
from typing import Any

from flashhead.cli.arguments import Parser, integer, real
from flashhead.errors import FlashHeadError

_OWN = {
    "kv_ratio": "--kv-ratio",
    "kv_dtype": "--kv-dtype",
    "rotary": "--rotary",
    "ranks": "--ranks",
    "calibration_tokens": "--calibration-tokens",
    "device": "--device",
}
"""Argument: its flag."""


def add_latent(parser: Parser) -> None:
    """Arguments of latent attention."""
    group = parser.add_argument_group("latent attention")
    group.add_argument(
        "--attention",
        choices=("keep", "latent"),
        default="keep",
        help="latent: cache one latent a token instead of keys and values (default: keep)",
    )
    group.add_argument(
        "--kv-ratio",
        type=real("a number from 1", lambda value: value >= 1),
        metavar="R",
        help="numbers a token in the cache, before over after; bytes with --kv-dtype mixed "
        "(default: 2)",
    )
    group.add_argument(
        "--kv-dtype",
        choices=("bf16", "fp8", "int8", "int4", "mixed"),
        help="what generate() keeps latents in; mixed: 8, 4, 2 or no bits a number, by what it is "
        "worth (default: bf16)",
    )
    group.add_argument(
        "--rotary",
        choices=("rebuilt", "decoupled"),
        help="rebuilt: closer to the model; decoupled: nothing is rebuilt at decode, as in "
        "DeepSeek-V2 (default: rebuilt)",
    )
    group.add_argument(
        "--ranks",
        choices=("budget", "uniform"),
        help="budget: layers compete for the numbers; uniform: all alike (default: budget)",
    )
    group.add_argument("--calibration-tokens", type=integer(256), metavar="N", help="default: 8192")
    group.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="where the model samples text and its statistics are taken (default: cpu)",
    )
    group.add_argument(
        "--layout",
        choices=("flashhead", "deepseek"),
        default="flashhead",
        help="deepseek: write MODEL, a folder with decoupled latents, as transformers' "
        "DeepseekV3ForCausalLM (default: flashhead)",
    )


def latent_options(args: argparse.Namespace) -> Any:
    """`LatentOptions`, or None for `--attention keep`.

    Raises:
        FlashHeadError: an option of latent attention without it.
    """
    given = {name: getattr(args, name) for name in _OWN if getattr(args, name) is not None}
    if args.attention == "keep":
        if given:
            raise FlashHeadError(f"{_OWN[next(iter(given))]}: wanted --attention latent with it")
        return None
    if args.index_only:
        raise FlashHeadError("--index-only: latent attention changes the weights")
    if args.calibration:
        given["calibration"] = tuple(args.calibration)
    from flashhead.options_latent import LatentOptions

    return LatentOptions(**given)


def write_layout(args: argparse.Namespace) -> dict[str, Any]:
    """`--layout deepseek`: the folder again, as other programs know it.

    Raises:
        FlashHeadError: an argument that does not go with it, or what the layout cannot hold.
    """
    others = {
        "--head": args.head,
        "--set": args.set,
        "--quantize": args.quantize != "none",
        "--calibration": args.calibration,
        "--index-only": args.index_only,
        "--attention": args.attention == "latent",
        **{flag: getattr(args, name) is not None for name, flag in _OWN.items()},
    }
    given = next((flag for flag, value in others.items() if value), None)
    if given is not None:
        raise FlashHeadError(
            f"--layout deepseek with {given}: it takes a converted folder as it is"
        )
    if args.out is None:
        raise FlashHeadError("--layout deepseek: wanted OUT, the folder to write")
    from flashhead.convert.deepseek_folder import write_deepseek

    report = write_deepseek(args.model, args.out)
    print(
        f"wrote {report['out']}: DeepseekV3ForCausalLM, kv_lora_rank {report['rank']}, head sizes "
        f"{report['fixed']} + {report['rope']} rotary, values {report['value']}; logits differ by "
        f"{report['logit_error']:.1e} of the largest, {report['seconds']:.0f} s"
    )
    if report["attention_bias"]:
        print("it has attention biases: transformers reads them, vLLM's DeepSeek classes do not")
    return {**report, "model": args.model}


def print_latent(report: dict[str, Any]) -> None:
    """What became of the cache."""
    widths = report["widths"]
    print(
        f"{len(widths)} layers cache {sum(widths) / len(widths):.0f} numbers a token on average "
        f"({min(widths)} to {max(widths)}), 1/{report['kv_ratio']:.2f} of keys and values, in "
        f"{report['kv_dtype']}: 1/{report['bytes_ratio']:.2f} of a bf16 cache's bytes; expected KL "
        f"{sum(report['expected_kl']):.3g} nats a token"
    )
