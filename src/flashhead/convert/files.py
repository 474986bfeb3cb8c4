"""Which files of a folder are the model's, and whether they are all there and whole.

Decided from names, headers and sizes, without torch: weights are those that the weights' index
names (or `model.safetensors`), everything else is known by its name. What is not known is left out
of checksums and uploads, and said to be.
"""

import dataclasses
import fnmatch
import json
from pathlib import Path
from typing import Any

from flashhead.errors import FlashHeadError
from flashhead.ledger.files import read_safetensors, require_whole
from flashhead.ledger.index import INDEX_FILE

SINGLE_FILE = "model.safetensors"
SHARDS_FILE = "model.safetensors.index.json"
MANIFEST_FILE = "flashhead.sha256.json"
CARD_FILE = "README.md"
MEASURED_FILE = "verify.json"
KNOWN = (
    *("config.json", "*_config.json", SHARDS_FILE, MANIFEST_FILE, CARD_FILE, MEASURED_FILE),
    *("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt"),
    *("merges.txt", "tekken.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "GEMMA_TERMS*", "recipe.yaml"),
)
"""Files beside the weights, by pattern."""
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib")
UNFINISHED = (".partial", ".incomplete", ".tmp", ".lock", ".part")


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """Files of a folder, as paths relative to it with slashes.

    Args:
        kept: the model's, in order of their names.
        left_out: the others, each with the reason.
    """

    kept: tuple[str, ...]
    left_out: dict[str, str]


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
        FlashHeadError: missing, or not a JSON object.
    """
    return _read_json(folder, "config.json")


def weight_files(folder: Path) -> dict[str, set[str]]:
    """Weight files by name, each with the tensors that the weights' index says are in it; none
    are named where one file holds all.

    Raises:
        FlashHeadError: no weights, or an index that is damaged or names a path outside the folder.
    """
    if not (folder / SHARDS_FILE).is_file():
        if not (folder / SINGLE_FILE).is_file():
            raise FlashHeadError(f"{SINGLE_FILE}: missing, and there is no {SHARDS_FILE}")
        return {SINGLE_FILE: set()}
    if (folder / SINGLE_FILE).exists():
        raise FlashHeadError(f"{SINGLE_FILE}: beside {SHARDS_FILE}, which of them is the model?")
    placed = _read_json(folder, SHARDS_FILE).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise FlashHeadError(f"{SHARDS_FILE}: no weight_map in it")
    shards: dict[str, set[str]] = {}
    for tensor, name in placed.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise FlashHeadError(f"{SHARDS_FILE}: {name!r} is no name of a file beside it")
        shards.setdefault(name, set()).add(tensor)
    return shards


def model_files(folder: Path) -> ModelFiles:
    """Tell the files that the model needs from the others.

    Raises:
        FlashHeadError: as `read_config` and `weight_files`.
    """
    weights = {*weight_files(folder), INDEX_FILE}
    code = _modules(folder)
    kept, left_out = [], {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        name = path.relative_to(folder).as_posix()
        if name in weights or name in code or _is_known(name):
            kept.append(name)
        else:
            left_out[name] = _why_not(name)
    return ModelFiles(tuple(kept), left_out)


def check_files(folder: Path) -> str:
    """Check that every file is there and as long as it says itself.

    Returns:
        What was found, for people.

    Raises:
        FlashHeadError: the file that is missing, truncated or damaged.
    """
    config = read_config(folder)
    section = config.get("flashhead")
    shards = check_weights(folder)
    if isinstance(section, dict):
        _check_safetensors(folder, INDEX_FILE, "config.json")
        size = (folder / INDEX_FILE).stat().st_size
        if size != section.get("index_bytes"):
            wanted = section.get("index_bytes")
            raise FlashHeadError(f"{INDEX_FILE}: {size:,} bytes, config.json says {wanted!r}")
    elif (folder / INDEX_FILE).exists():
        raise FlashHeadError("config.json: no flashhead section, but there is an index")
    if not (folder / "tokenizer_config.json").is_file():
        raise FlashHeadError("tokenizer_config.json: missing")
    unfinished = [p.name for p in sorted(folder.rglob("*")) if p.name.endswith(UNFINISHED)]
    if unfinished:
        raise FlashHeadError(f"{unfinished[0]}: left by a run that did not finish")
    index = "no index" if section is None else f"{section.get('index')} index"
    total = sum((folder / name).stat().st_size for name in model_files(folder).kept)
    return f"{len(shards)} weight file{'s'[: len(shards) != 1]}, {index}, {total / 1e6:,.1f} MB"


def check_weights(folder: Path) -> dict[str, set[str]]:
    """Check that every weight file is there, as long as its header says, with the tensors that the
    weights' index puts there.

    Returns:
        As `weight_files`.

    Raises:
        FlashHeadError: the file that is missing, truncated or damaged.
    """
    shards = weight_files(folder)
    for name, tensors in shards.items():
        found = _check_safetensors(folder, name, SHARDS_FILE)
        absent = sorted(tensors - found)
        if absent:
            raise FlashHeadError(f"{name}: no tensor {absent[0]!r}, which {SHARDS_FILE} puts there")
    return shards


def _check_safetensors(folder: Path, name: str, named_by: str) -> set[str]:
    """Names of a file's tensors; its size must be what its header says."""
    path = folder / name
    if not path.is_file():
        raise FlashHeadError(f"{name}: missing, but {named_by} names it")
    try:
        tensors = read_safetensors(path)
    except (FlashHeadError, TypeError, AttributeError) as error:
        raise FlashHeadError(f"{name}: its header is damaged ({error})") from error
    require_whole(path, tensors)
    return set(tensors)


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        read = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FlashHeadError(f"{name}: missing in {folder}") from None
    except ValueError as error:
        raise FlashHeadError(f"{name}: not JSON ({error})") from error
    if not isinstance(read, dict):
        raise FlashHeadError(f"{name}: wanted a JSON object")
    return read


def _modules(folder: Path) -> set[str]:
    """Python files that the configs name (`auto_map`): code of the model's own."""
    found: set[str] = set()
    for path in folder.glob("*config.json"):
        named = _read_json(folder, path.name).get("auto_map")
        for value in named.values() if isinstance(named, dict) else ():
            for place in value if isinstance(value, list) else [value]:
                if isinstance(place, str) and "--" not in place:
                    found.add(f"{place.partition('.')[0]}.py")
    return found


def _is_known(name: str) -> bool:
    """Whether a pattern is that of the whole path: `*` does not reach into folders."""
    return any(
        fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")
        for pattern in KNOWN
    )


def _why_not(name: str) -> str:
    path = Path(name)
    if any(part.startswith(".") for part in path.parts):
        return "hidden"
    if path.suffix == ".py":
        return "code that no config names"
    if path.suffix in PICKLES:
        return "pickled or raw arrays, which nothing here reads"
    if path.suffix == ".safetensors":
        return "weights that the weights' index does not name"
    return "not a file that the model needs"
