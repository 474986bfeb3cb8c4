"""A training text from what is installed: sources and documentation, deduplicated, tokenised.

Files are shuffled by a seed and taken up to a number of characters; every 200th is held out, whole.
Synthetic documents (`tasks`) are strewn in. All is kept in OUT: the tokenizer, the two streams of
tokens, and the same text as .jsonl for `flashhead convert`, `heal` and `eval`.
"""

import dataclasses
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flashhead.errors import FlashHeadError
from twins import tasks
from twins.files import gather

HELD_OUT_EVERY = 200
"""Of so many files one is held out; of few files a tenth."""
TOKENIZER_BYTES = 40_000_000
"""Text that the tokenizer is trained on."""
END = "<|end|>"
BATCH_FILES = 1024
"""Files that go through the tokenizer side by side."""
CALIBRATION_TOKENS = 100_000


@dataclasses.dataclass(frozen=True)
class CorpusOptions:
    """What the text is made of.

    Args:
        folders: searched for text; (): the running interpreter's library and packages.
        most_bytes: of files, counted in characters.
        vocab_size: of the tokenizer that is trained.
        tokenizer: folder of one that is taken instead; "": none.
        task_share: of the tokens, of each epoch, that are synthetic tasks.
        heal_tokens: about how many tokens of the training text go into heal.jsonl.
        seed: of order and tasks.
    """

    folders: tuple[str, ...] = ()
    most_bytes: int = 300_000_000
    vocab_size: int = 8192
    tokenizer: str = ""
    task_share: float = 0.08
    heal_tokens: int = 8_000_000
    seed: int = 0


@dataclasses.dataclass
class Corpus:
    """A text in tokens.

    Args:
        tokenizer: of transformers.
        train: int32[tokens], every document behind an end-of-text token.
        held_out: int32[tokens], likewise, of files that are not in `train`, without tasks.
        about: counts, JSON-able.
    """

    tokenizer: PreTrainedTokenizerFast
    train: Tensor
    held_out: Tensor
    about: dict[str, Any]


def load_corpus(out: Path, options: CorpusOptions) -> Corpus:
    """The corpus that is kept in `out`, made if it is not there.

    Raises:
        FlashHeadError: it was made with other options, or there is too little text.
    """
    path = out / "corpus.json"
    settings = json.loads(json.dumps(dataclasses.asdict(options)))
    if not path.exists():
        make_corpus(out, options, settings)
    about = json.loads(path.read_text())
    for name, value in settings.items():
        if about["settings"].get(name) != value:
            raise FlashHeadError(
                f"{out}: its corpus has {name}={about['settings'].get(name)!r}, got {value!r}: "
                "go on with the same, or take another folder"
            )
    return read_corpus(out)


def read_corpus(out: Path) -> Corpus:
    """The corpus that is kept in `out`.

    Raises:
        FlashHeadError: there is none.
    """
    if not (out / "corpus.json").exists():
        raise FlashHeadError(f"{out}: no corpus.json: `train_twins.py train` makes it")
    streams = load_file(out / "tokens.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    about = json.loads((out / "corpus.json").read_text())
    return Corpus(tokenizer, streams["train"], streams["held_out"], about)


def make_corpus(out: Path, options: CorpusOptions, settings: dict[str, Any]) -> None:
    """Find, tokenise, keep; corpus.json comes last."""
    out.mkdir(parents=True, exist_ok=True)
    found = gather(options.folders, options.most_bytes, options.seed)
    texts = [text.replace(END, "") for text in found]
    every = min(HELD_OUT_EVERY, len(texts) // 10)
    held = texts[::every]
    texts = [text for i, text in enumerate(texts) if i % every]
    tokenizer = _tokenizer(options, texts)
    tokenizer.save_pretrained(out / "tokenizer")
    own = list(encode(tokenizer, texts))
    own_tokens = sum(len(part) for part in own)
    share = options.task_share
    made = _task_documents(tokenizer, options.seed, int(share / (1 - share) * own_tokens))
    mixed = [*zip(texts, own, strict=True), *made]
    random.Random(options.seed).shuffle(mixed)
    held_out = list(encode(tokenizer, held))
    train = torch.from_numpy(np.concatenate([part for _, part in mixed]))
    streams = {"train": train, "held_out": torch.from_numpy(np.concatenate(held_out))}
    save_file(streams, out / "tokens.safetensors")
    _write_text(out / "heal.jsonl", mixed, options.heal_tokens)
    _write_text(out / "calibration.jsonl", mixed, CALIBRATION_TOKENS)
    _write_text(out / "held.jsonl", list(zip(held, held_out, strict=True)), len(train))
    about = {
        "settings": settings,
        "files": len(texts),
        "held_out_files": len(held),
        "characters": sum(len(text) for text in texts),
        "tokens": len(train),
        "task_tokens": len(train) - own_tokens,
        "held_out_tokens": len(streams["held_out"]),
        "vocab_size": len(tokenizer),
    }
    (out / "corpus.json").write_text(json.dumps(about, indent=1) + "\n")


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Iterator[np.ndarray]:
    """Tokens of each text behind an end-of-text token: int32[tokens]."""
    backend, lead = tokenizer.backend_tokenizer, [tokenizer.bos_token_id]
    with tqdm(total=len(texts), desc="tokenising", unit="file", leave=False) as bar:
        for start in range(0, len(texts), BATCH_FILES):
            batch = texts[start : start + BATCH_FILES]
            for found in backend.encode_batch_fast(batch, add_special_tokens=False):
                yield np.asarray(lead + found.ids, dtype=np.int32)
            bar.update(len(batch))


def _task_documents(
    tokenizer: PreTrainedTokenizerFast, seed: int, tokens: int
) -> list[tuple[str, np.ndarray]]:
    source, made, got = tasks.Documents(seed), list[tuple[str, np.ndarray]](), 0
    while got < tokens:
        texts = [next(source) for _ in range(BATCH_FILES)]
        for text, part in zip(texts, encode(tokenizer, texts), strict=True):
            if got < tokens:
                made.append((text, part))
                got += len(part)
    return made


def _write_text(path: Path, documents: list[tuple[str, np.ndarray]], tokens: int) -> None:
    """The first documents up to a number of tokens, one a line."""
    got = 0
    with path.open("w", encoding="utf-8") as file:
        for text, part in documents:
            file.write(json.dumps({"text": text}) + "\n")
            got += len(part)
            if got >= tokens:
                break


def _tokenizer(options: CorpusOptions, texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with single digits, trained on the first texts; or the one that is named."""
    if options.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
        if tokenizer.bos_token_id is None:
            raise FlashHeadError(f"--tokenizer {options.tokenizer}: wanted one with a BOS token")
        return tokenizer
    bpe = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample, total = [], 0
    for text in texts:
        sample.append(text)
        total += len(text)
        if total >= TOKENIZER_BYTES:
            break
    examples = itertools.islice(tasks.Documents(options.seed), 200)
    bpe.train_from_iterator([*sample, *examples], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END
    )
