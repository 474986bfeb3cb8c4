"""The subcommands of `train_twins.py`: what they print, and their documents."""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch

from flashhead.cli.arguments import write_document
from flashhead.environment import provenance
from flashhead.errors import FlashHeadError
from twins.corpus import Corpus, CorpusOptions, load_corpus, read_corpus
from twins.judge import judge
from twins.models import TWINS, TwinSizes, cache_numbers, make_twin, parameter_counts, save_twin
from twins.rows import Rows
from twins.times import decode_times, train_times
from twins.train import Training, TrainOptions

RESULT = "train.json"


def train_twins(args: argparse.Namespace) -> dict[str, Any]:
    """Make the corpus, train each twin that is not done, keep OUT/train.json after each."""
    started = time.perf_counter()
    until = None if args.minutes is None else started + 60 * args.minutes
    device, compiled = _device(args)
    options = TrainOptions(
        tokens=args.tokens,
        context=args.context,
        batch_tokens=args.batch_tokens,
        micro_tokens=args.micro_tokens,
        rate=args.rate,
        held_tokens=args.held_tokens,
        compiled=compiled,
        seed=args.seed,
    )
    corpus = load_corpus(args.out, _corpus_options(args))
    own = ("layers", "hidden", "heads", "head_dim", "intermediate", "context")
    sizes = TwinSizes(len(corpus.tokenizer), **{name: getattr(args, name) for name in own})
    settings = _settings(sizes, options)
    document = _earlier(args.out, settings) or {
        "benchmark": "train_twins",
        "settings": settings,
        "corpus": corpus.about,
        "twins": {},
    }
    print(f"{corpus.about['tokens']:,} tokens of text, {time.perf_counter() - started:.0f} s")
    for kind in [kind for kind in TWINS if args.only in (None, kind)]:
        if document["twins"].get(kind, {}).get("finished"):
            continue
        found = _train(kind, sizes, options, corpus, args.out, settings, device, until)
        document["twins"][kind] = found
        document |= _provenance(args)
        write_document(args.out / RESULT, document)
        print(
            f"{kind}: held-out loss {found['held_out'][-1][1]:.4f} nats after "
            f"{found['tokens']:,} tokens, {found['tokens_per_sec']:,} tokens/s, "
            f"{found['parameters']['all']:,} parameters, {found['cache_bytes']:,} bytes a token"
        )
        if not found["finished"]:
            print("the time is over: the same command goes on")
            break
    return document


def _train(
    kind: str,
    sizes: TwinSizes,
    options: TrainOptions,
    corpus: Corpus,
    out: Path,
    settings: dict[str, Any],
    device: torch.device,
    until: float | None,
) -> dict[str, Any]:
    model = make_twin(kind, sizes, options.seed, corpus.tokenizer).to(device)
    rows = Rows(corpus.train.to(device), options.context, options.seed)
    held_out = Rows(corpus.held_out.to(device), options.context)
    training = Training(model, rows, held_out, options, out / f".{kind}", settings)
    finished = training.run(until)
    if finished:
        save_twin(model, corpus.tokenizer, out / kind)
    tokens = training.progress.step * options.batch_rows * options.context
    seconds = training.progress.seconds
    return {
        "finished": finished,
        "parameters": parameter_counts(model),
        "cache_bytes": 2 * cache_numbers(kind, sizes),
        "tokens": tokens,
        "epochs": round(tokens / (rows.count * options.context), 3),
        "seconds": round(seconds, 1),
        "tokens_per_sec": round(tokens / max(seconds, 1e-9)),
        "held_out": training.curve("held_out"),
        "train": training.curve("train"),
    }


def _settings(sizes: TwinSizes, options: TrainOptions) -> dict[str, Any]:
    return {**dataclasses.asdict(sizes), **dataclasses.asdict(options)}


def _corpus_options(args: argparse.Namespace) -> CorpusOptions:
    return CorpusOptions(
        folders=tuple(folder for folder in args.corpus.split(",") if folder),
        most_bytes=args.corpus_bytes,
        vocab_size=args.vocab_size,
        tokenizer=args.tokenizer,
        task_share=args.task_share,
        heal_tokens=args.heal_tokens or args.tokens // 10,
        seed=args.seed,
    )


def _earlier(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The document of a run with the same settings; None: there is none.

    Raises:
        FlashHeadError: of other settings.
    """
    path = out / RESULT
    if not path.exists():
        return None
    document: dict[str, Any] = json.loads(path.read_text())
    for name, value in settings.items():
        if document["settings"].get(name) != value:
            raise FlashHeadError(
                f"{out}: trained with {name}={document['settings'].get(name)!r}, got {value!r}: "
                "go on with the same, or take another folder"
            )
    return document


def _sizes(out: Path) -> TwinSizes:
    """Sizes that OUT was trained with."""
    path = out / RESULT
    if not path.exists():
        raise FlashHeadError(f"{out}: no {RESULT}: `train_twins.py train` makes it")
    settings = json.loads(path.read_text())["settings"]
    names = [field.name for field in dataclasses.fields(TwinSizes)]
    return TwinSizes(**{name: settings[name] for name in names})


def _device(args: argparse.Namespace) -> tuple[torch.device, bool]:
    """Where to run, and whether compiled: on a GPU, unless --eager."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise FlashHeadError("--device cuda: torch sees no GPU")
    return torch.device(args.device), args.device == "cuda" and not args.eager


def _provenance(args: argparse.Namespace) -> dict[str, Any]:
    """With names in the place of paths."""
    document = provenance()
    document["argv"] = [Path(a).name if Path(a).exists() else a for a in document["argv"]]
    return {"device": args.device, **document}


def time_twins(args: argparse.Namespace) -> dict[str, Any]:
    """Training and decode steps at each context."""
    device, compiled = _device(args)
    sizes = dataclasses.replace(_sizes(args.out), context=max(args.contexts) + 1024)
    document: dict[str, Any] = {
        "benchmark": "train_twins_times",
        "sizes": dataclasses.asdict(sizes),
        "compiled": compiled,
        "train": {},
        "decode": {},
        **_provenance(args),
    }
    for context in args.contexts:
        found = train_times(sizes, context, args.step_tokens, args.repeats, compiled, device)
        document["train"][context] = found
        print(
            f"train {context:>6}: mha {found['mha']['median_ms']:.1f} ms, latent "
            f"{found['latent']['median_ms']:.1f} ms ({found['latent']['ratio']:.2f}x as fast), "
            f"{found['mha']['rows']} rows",
            flush=True,
        )
    for batch in args.batches:
        for context in args.contexts:
            rows = decode_times(sizes, context, batch, args.repeats, device)
            document["decode"][f"{batch}x{context}"] = rows
            parts = [
                f"{kind} {row['median_ms']:.2f} ms ({row['cache_bytes'] / 1e9:.2f} GB)"
                for kind, row in rows.items()
            ]
            print(f"decode {batch} rows, {context:>6}: {', '.join(parts)}", flush=True)
    return document


def judge_folders(args: argparse.Namespace) -> dict[str, Any]:
    """Loss and answers of each folder beside the first one's."""
    _device(args)
    corpus, sizes = read_corpus(args.out), _sizes(args.out)
    found: dict[str, Any] = {}
    for folder in args.folders:
        own = judge(
            folder,
            corpus,
            context=sizes.context,
            tokens=args.tokens,
            count=args.questions,
            seed=corpus.about["settings"]["seed"],
            device=args.device,
        )
        base = next(iter(found.values()), own)
        own["loss_ratio"] = own["loss"] / base["loss"]
        found[folder.name] = own
        answers = ", ".join(
            f"{name} {100 * task['accuracy']:.1f} +- {100 * task['standard_error']:.1f} %"
            for name, task in own["tasks"].items()
        )
        print(
            f"{folder.name}: loss {own['loss']:.4f} ({own['loss_ratio']:.4f}x), {answers}",
            flush=True,
        )
    corpus_about = {k: v for k, v in corpus.about.items() if k != "settings"}
    return {
        "benchmark": "train_twins_judge",
        "folders": found,
        "corpus": corpus_about,
        **_provenance(args),
    }
