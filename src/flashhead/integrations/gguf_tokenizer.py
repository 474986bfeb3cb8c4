"""Proof that a tokenizer made from a GGUF file is the one that the file describes.

A GGUF file holds no `tokenizer.json`: transformers rebuilds one from the vocabulary, merges or
scores and special tokens in its metadata, and some versions do it wrong without a word (5.17 makes
single characters of Gemma's text; 5.18 to 5.22 leave out its BOS unless asked for it). The proof
reads the metadata itself, independently of transformers. It rests on a property of BPE: the merges
that made an entry of the vocabulary apply to its own text too, so a word's entry encodes as itself.

Layout of the file: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
import os
import struct
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from flashhead.errors import FlashHeadError

FIRST_RIGHT = (5, 18)
"""First transformers whose tokenizers pass for both embedded models, once asked for their BOS."""
FIRST_RIGHT_UNASKED = (5, 23)
"""First whose tokenizers pass unasked: what older ones made without a proof is in doubt."""
TESTED = "5.23.0"
PROOF = "tokenizer_proof.json"
"""In a folder whose tokenizer was proved against its GGUF file."""
WORDS = 256
"""Entries of a vocabulary that are encoded."""
NORMAL = 1
"""`tokenizer.ggml.token_type` of ordinary text."""
_FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_SMALL = 1 << 16
"""Bytes that are read without asking how many the file has."""


def require_transformers() -> None:
    """Refuse a transformers that makes wrong tokenizers of GGUF files; imports nothing.

    Raises:
        FlashHeadError: it is older than `FIRST_RIGHT`, or not installed.
    """
    try:
        installed = version("transformers")
    except PackageNotFoundError as error:
        raise FlashHeadError(
            "GGUF files are read by transformers, which is not installed: "
            "pip install 'flashhead[gguf]'"
        ) from error
    if _release(installed) < FIRST_RIGHT:
        right = ".".join(map(str, FIRST_RIGHT))
        raise FlashHeadError(
            f"transformers {installed} makes wrong tokenizers of GGUF files: "
            f"pip install 'transformers>={right}' (a folder made with that opens with yours too)"
        )


def in_doubt(folder: Path) -> bool:
    """Whether a folder made of a GGUF file has no proof and was made by a transformers older than
    `FIRST_RIGHT_UNASKED`.

    Raises:
        FlashHeadError: its config.json is damaged.
    """
    file = folder / "config.json"
    if (folder / PROOF).is_file():
        return False
    try:
        made_with = json.loads(file.read_text(encoding="utf-8")).get("transformers_version")
    except FileNotFoundError:
        return False
    except (ValueError, AttributeError) as error:
        raise FlashHeadError(f"{file} is damaged: remove {folder}, it is made again") from error
    return isinstance(made_with, str) and _release(made_with) < FIRST_RIGHT_UNASKED


def asked_ends(gguf: Path) -> dict[str, bool]:
    """`add_bos_token` and `add_eos_token` of a GGUF file, as arguments for transformers.

    Raises:
        FlashHeadError: as `read_metadata`.
    """
    metadata = read_metadata(gguf)
    added = {f"add_{name}_token": _added(name, metadata) for name in ("bos", "eos")}
    return {name: value for name, value in added.items() if value is not None}


def write_proof(folder: Path) -> None:
    """Write down that a folder's tokenizer was proved, and by which versions."""
    made_with = {name: version(name) for name in ("transformers", "tokenizers")}
    (folder / PROOF).write_text(json.dumps(made_with, indent=2) + "\n", encoding="utf-8")


def prove_tokenizer(tokenizer: Any, gguf: Path) -> None:
    """Compare a tokenizer with the metadata of the GGUF file that it was made of.

    Args:
        tokenizer: of transformers.
        gguf: the file.

    Raises:
        FlashHeadError: another BOS or EOS than the file's, BOS or EOS added or left out against the
            file, words of its vocabulary that have another id or fall to pieces, or text that does
            not come back.
    """
    metadata = read_metadata(gguf)
    fault = _fault_of_ends(tokenizer, metadata) or _fault_of_words(tokenizer, metadata)
    if fault:
        raise FlashHeadError(
            f"{gguf}: transformers {version('transformers')} makes a wrong tokenizer of this file "
            f"({fault}): pip install 'transformers=={TESTED}', or take the model's safetensors"
        )


def read_metadata(gguf: Path) -> dict[str, Any]:
    """All metadata of a GGUF file; 262,144 entries take a fraction of a second (gguf's reader: 12).

    Raises:
        FlashHeadError: it is no GGUF file of version 2 or 3, or ends early.
    """
    try:
        with gguf.open("rb") as file:
            magic, layout, _, count = struct.unpack("<4sIQQ", _read(file, 24))
            if magic != b"GGUF" or layout not in (2, 3):
                raise FlashHeadError(f"{gguf}: not a GGUF file of version 2 or 3")
            return {_value(file, _STRING): _value(file) for _ in range(count)}
    except (struct.error, KeyError, UnicodeDecodeError) as error:
        raise FlashHeadError(f"{gguf}: the metadata of this GGUF file is damaged") from error


def _value(file: Any, kind: int | None = None) -> Any:
    """One value; without `kind` its type comes first."""
    if kind is None:
        kind = struct.unpack("<I", _read(file, 4))[0]
    if kind == _STRING:
        return _read(file, struct.unpack("<Q", _read(file, 8))[0]).decode()
    if kind == _ARRAY:
        kind, count = struct.unpack("<IQ", _read(file, 12))
        if kind == _STRING:
            return [_value(file, kind) for _ in range(count)]
        width = struct.calcsize(_FIXED[kind])  # an array of arrays, which no file has, is damage
        return list(struct.unpack(f"<{count}{_FIXED[kind]}", _read(file, count * width)))
    layout = f"<{_FIXED[kind]}"
    return struct.unpack(layout, _read(file, struct.calcsize(layout)))[0]


def _read(file: Any, size: int) -> bytes:
    """So many bytes; a length beyond the file's end is damage, and nothing is allocated for it."""
    if size > _SMALL and size > os.fstat(file.fileno()).st_size - file.tell():
        raise struct.error("beyond the end")
    found: bytes = file.read(size)
    if len(found) < size:
        raise struct.error("beyond the end")
    return found


def _fault_of_ends(tokenizer: Any, metadata: dict[str, Any]) -> str:
    """What is wrong with BOS and EOS; empty: nothing."""
    ids = tokenizer("a")["input_ids"]
    for name, place in (("bos", 0), ("eos", -1)):
        wanted = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if wanted is None:
            continue
        got = getattr(tokenizer, f"{name}_token_id")
        if got != wanted:
            return f"{name.upper()} is token {got}, wanted {wanted}"
        added = _added(name, metadata)
        if added is not None and (len(ids) > 0 and ids[place] == wanted) != added:
            return f"{name.upper()} is {'left out' if added else 'added'} against the file"
    return ""


def _added(name: str, metadata: dict[str, Any]) -> bool | None:
    """Whether text gets a "bos" or "eos"; None: the file does not say."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gemma4" or f"tokenizer.ggml.{name}_token_id" not in metadata:
        return None  # gemma4's flag says yes and means the BOS of the chat template
    added: bool | None = metadata.get(f"tokenizer.ggml.add_{name}_token")
    if added is None and kind == "llama":  # llama.cpp's rule for files that do not say
        return name == "bos"
    return added


def _fault_of_words(tokenizer: Any, metadata: dict[str, Any]) -> str:
    """What is wrong with words; empty: nothing. A vocabulary of bytes or characters has none."""
    words = _words(metadata)
    vocabulary = tokenizer.get_vocab()
    for token, entry in words.items():
        if vocabulary.get(entry) != token:
            return f"{entry!r} is token {vocabulary.get(entry)}, wanted {token}"
    sample = list(words.items())[:: max(1, len(words) // WORDS)]
    broken = []
    for token, entry in sample:
        ids = tokenizer(f"1 {entry[1:]}", add_special_tokens=False)["input_ids"]
        if not ids or ids[-1] != token:
            broken.append(f"{entry!r} becomes {len(ids) - 1} tokens, wanted token {token}")
    if 2 * len(broken) > len(sample):  # a few may have no merges: 1 of 8,650 of Gemma's, else all
        return f"{len(broken)} of {len(sample)} words of its vocabulary fall to pieces: {broken[0]}"
    text = " ".join(entry[1:] for _, entry in sample)
    back = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
    return "" if back.strip() == text else "text does not come back from its tokens"


def _words(metadata: dict[str, Any]) -> dict[int, str]:
    """Ordinary entries of a blank and ASCII letters: one piece under any splitting of text."""
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    if not isinstance(tokens, list) or not all(isinstance(entry, str) for entry in tokens):
        raise FlashHeadError("tokenizer.ggml.tokens: wanted strings")
    kinds = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise FlashHeadError(f"tokenizer.ggml.token_type: wanted {len(tokens)} numbers")
    blank = "Ġ" if metadata.get("tokenizer.ggml.model") == "gpt2" else "▁"
    return {
        token: entry
        for token, (entry, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind == NORMAL and entry[:1] == blank and entry[1:].isascii() and entry[1:].isalpha()
    }


def _release(text: str) -> tuple[int, ...]:
    """Major and minor of a version: (5, 23) of "5.23.0.dev0"."""
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
