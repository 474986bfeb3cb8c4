"""Where a model comes from and under which licence, as its own files say.

A licence is looked for in the model card's front matter, in config.json, in the licence's text, and
in a GGUF file's metadata, in this order. What none of them says is "unknown", never guessed.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from flashhead.errors import FlashHeadError
from flashhead.models import EMBEDDED, cache_dir

HUB_IDS = {
    "gemma-3-270m": "google/gemma-3-270m",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
"""Of the embedded models."""
TEXTS = (
    (r"Apache License\s+Version 2\.0", "apache-2.0"),
    (r"LLAMA 3\.3 COMMUNITY LICENSE", "llama3.3"),
    (r"LLAMA 3\.2 COMMUNITY LICENSE", "llama3.2"),
    (r"LLAMA 3\.1 COMMUNITY LICENSE", "llama3.1"),
    (r"META LLAMA 3 COMMUNITY LICENSE", "llama3"),
    (r"Gemma Terms of Use", "gemma"),
    (r"MIT License|Permission is hereby granted, free of charge", "mit"),
)
"""What a licence's text says of itself, and the hub's name of it."""
TEXT_BYTES = 20_000


@dataclasses.dataclass(frozen=True)
class License:
    """A licence by the hub's names.

    Args:
        id: such as "apache-2.0", "other" or "unknown".
        name: of one that the hub has no id for, or None.
        link: to its text, or None.
        found_in: the file that says so; "" where none does.
    """

    id: str
    name: str | None = None
    link: str | None = None
    found_in: str = ""


UNKNOWN = License("unknown")


def license_of(source: str) -> License:
    """Licence of a model.

    Args:
        source: embedded name, folder, `.gguf` file or hub id; of a hub id the card is fetched.

    Returns:
        What was found, or `UNKNOWN`.
    """
    path = _local(source)
    if path is None:
        return _of_card(_fetched_card(source), source)
    if path.is_dir():
        return _of_folder(path, hub_id_of(source))
    return _of_gguf(path)


def hub_id_of(source: str) -> str | None:
    """`owner/name` of a model on the hub, as far as its name or place says; None: not known."""
    path = _local(source)
    if path is None:
        return source if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) else None
    for name, hub_id in HUB_IDS.items():
        if path == cache_dir() / "models" / name:
            return hub_id
    for part in path.absolute().parts:
        found = re.fullmatch(r"models--([\w.-]+?)--([\w.-]+)", part)  # the hub's own cache
        if found:
            return "/".join(found.groups())
    return None


def label_of(source: str) -> str:
    """What people call it: its hub id, or the name of its folder or file without the path."""
    return hub_id_of(source) or Path(source).expanduser().resolve().name


def _local(source: str) -> Path | None:
    if source in EMBEDDED:
        return cache_dir() / "models" / source
    path = Path(source).expanduser()
    return path if path.exists() else None


def _of_folder(folder: Path, hub_id: str | None) -> License:
    card = folder / "README.md"
    if card.is_file():
        found = _of_card(card.read_text(encoding="utf-8"), hub_id)
        if found != UNKNOWN:
            return found
    config = folder / "config.json"
    named = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if isinstance(named.get("license"), str):
        return License(named["license"], found_in="config.json")
    texts = [p for pattern in ("LICEN[SC]E*", "*TERMS*") for p in sorted(folder.glob(pattern))]
    for path in texts:
        with path.open("rb") as file:
            text = file.read(TEXT_BYTES).decode("utf-8", "replace")
        for pattern, name in TEXTS:
            if re.search(pattern, text, re.IGNORECASE):
                return License(name, found_in=path.name)
    if texts:
        return License("other", texts[0].name, texts[0].name, texts[0].name)
    return UNKNOWN


def _of_card(text: str | None, hub_id: str | None) -> License:
    """Licence in a card's front matter; a link to a file beside it is made one to the hub."""
    from huggingface_hub import ModelCard

    if text is None:
        return UNKNOWN
    data = ModelCard(text, ignore_metadata_errors=True).data
    named, link = data.get("license"), data.get("license_link")
    if isinstance(named, list):
        named = named[0] if len(named) == 1 else "other"
    if not isinstance(named, str):
        return UNKNOWN
    if isinstance(link, str) and "://" not in link and hub_id is not None:
        link = f"https://huggingface.co/{hub_id}/blob/main/{link}"
    return License(named, data.get("license_name"), link, "README.md")


def _fetched_card(hub_id: str) -> str | None:
    """A model card from the hub or its cache; None: there is none, or the hub does not answer."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    http_error: type[BaseException] = HfHubHTTPError.__bases__[0]  # of the hub's HTTP library
    try:
        return Path(hf_hub_download(hub_id, "README.md")).read_text(encoding="utf-8")
    except (OSError, ValueError, http_error):
        return None


def _of_gguf(path: Path) -> License:
    from gguf import GGUFReader

    try:
        reader: Any = GGUFReader(path)
    except ValueError as error:
        raise FlashHeadError(f"{path}: not a GGUF file ({error})") from error
    field = reader.fields.get("general.license")
    return UNKNOWN if field is None else License(str(field.contents()), found_in=path.name)
