"""`flashhead eval MODEL --against BASE`: what a conversion lost, task by task.

With `--data FILE` the task is perplexity through the real cache path (`evaluate/perplexity.py`),
else the tasks are those of `evaluate/suite`, through lm-evaluation-harness.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from flashhead.cli import eval_suite
from flashhead.cli.arguments import (
    MODEL_HELP,
    Parser,
    command,
    existing_file,
    integer,
    new_file,
    real,
    write_document,
)
from flashhead.errors import FlashHeadError
from flashhead.report.results import document_sha256

NAME = "model"
PERPLEXITY_TOKENS = 16384


def add_parser(subparsers: Any) -> None:
    """Describe the subcommand."""
    parser: Parser = command(
        subparsers,
        NAME,
        run,
        "compare a model with the one it was made from (the word `model` may be left out)",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--against", required=True, metavar="BASE", help="the original model")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--out", type=new_file, metavar="FILE", help="keep the document there too")
    parser.add_argument(
        "--limit",
        type=integer(1),
        metavar="N",
        help="questions a task (default: 200); with --data: tokens (default: 16384)",
    )
    eval_suite.add_arguments(parser)
    cached = parser.add_argument_group("perplexity through the cache, with --data")
    cached.add_argument("--data", type=existing_file, metavar="FILE", help=".txt or .jsonl")
    cached.add_argument(
        "--decode-share",
        type=real("from 0 to 1", lambda value: 0 <= value <= 1),
        default=0.25,
        metavar="S",
        help="of every window's tokens, from its end, one at a time (default: 0.25)",
    )
    cached.add_argument(
        "--window", type=integer(2), default=512, metavar="N", help="tokens (default: 512)"
    )
    cached.add_argument(
        "--kv-dtype",
        choices=("bf16", "fp8", "int8", "int4", "mixed"),
        help="of MODEL's latents (default: as its folder says)",
    )
    cached.add_argument(
        "--kv-select",
        type=integer(18),
        metavar="N",
        help="MODEL's decode steps read N tokens, chosen by a scan of the keys in 2 bits "
        "(default: all)",
    )


def with_name(argv: list[str], names: Any) -> list[str]:
    """`eval MODEL ...` is short for `eval model MODEL ...`."""
    if argv[:1] == ["eval"] and len(argv) > 1 and argv[1] not in (*names, "-h", "--help"):
        return ["eval", NAME, *argv[1:]]
    return argv


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and print the table."""
    if args.data is None:
        for option in ("kv_dtype", "kv_select"):
            if getattr(args, option) is not None:
                name = option.replace("_", "-")
                raise FlashHeadError(f"--{name} without --data: wanted both")
        document = eval_suite.evaluate_suite(args)
    else:
        if args.tasks != ("perplexity",):
            raise FlashHeadError("--data is for --tasks perplexity; other tasks take --data-dir")
        document = _through_cache(args)
    document["model"], document["against"] = _name(args.model), _name(args.against)
    document["argv"] = [_name(argument) for argument in document["argv"]]
    if "kind" in document:
        document["sha256"] = document_sha256(document)
    if args.out:
        write_document(args.out, document)
    return document


def _through_cache(args: argparse.Namespace) -> dict[str, Any]:
    """Perplexity of one text, decoding through the cache."""
    from flashhead.cli import session

    sources = [session.open_source(name) for name in (args.model, args.against)]
    from flashhead.evaluate.perplexity import compare, format_table
    from flashhead.evaluate.text import read_documents, token_windows
    from flashhead.integrations.latent_model import latent_modules, store_of
    from flashhead.integrations.transformers import load_dense, load_tokenizer
    from flashhead.ops.latent_select.options import SelectOptions

    select = None if args.kv_select is None else SelectOptions(args.kv_select)
    tokenizers = [load_tokenizer(source) for source in sources]
    if tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
        raise FlashHeadError(f"--against {args.against}: its vocabulary is not {args.model}'s")
    windows = token_windows(
        read_documents(args.data),
        tokenizers[1],
        args.limit or PERPLEXITY_TOKENS,
        window_tokens=args.window,
    )

    def load_value() -> Any:
        model = load_dense(sources[0]).to(args.device)
        if (args.kv_dtype or select) and not latent_modules(model):
            name = "--kv-dtype" if args.kv_dtype else "--kv-select"
            raise FlashHeadError(f"{name}: {args.model} has no latent attention")
        if args.kv_dtype is not None:
            model.latent_store = store_of(args.kv_dtype)
        if select is not None:
            model.latent_select = select
        return model

    document = compare(
        load_dense(sources[1]).to(args.device),
        load_value,
        windows,
        data=args.data,
        decode_share=args.decode_share,
    )
    if select is not None:
        document["tasks"]["perplexity"]["select"] = dataclasses.asdict(select)
    print(format_table(document, _name(args.model)))
    return document


def _name(model: str) -> str:
    """A model's name, or a file's, without the machine's folders."""
    path = Path(model)
    return path.name if path.is_absolute() or path.exists() else model
