"""Configs without weights: of eight public models by name, or of a config.json."""

import json
from pathlib import Path
from typing import Any

from flashhead.errors import FlashHeadError
from flashhead.ledger.architecture import Architecture, parse

LARGEST_FILE_BYTES = 10_000_000
ALL = "all"


def known_configs() -> dict[str, dict[str, Any]]:
    """The sizes that public models state in their config.json, by name."""
    text = Path(__file__).with_name("configs.json").read_text(encoding="utf-8")
    configs: dict[str, dict[str, Any]] = json.loads(text)
    return configs


def read_architecture(source: str) -> Architecture:
    """The architecture of a known model or of a config.json.

    Raises:
        FlashHeadError: neither, not JSON, or a config that `parse` refuses.
    """
    known = known_configs()
    if source in known:
        return parse(known[source])
    try:
        if not Path(source).is_file():
            wanted = ", ".join((ALL, *known))
            raise FlashHeadError(f"no such file or name; wanted {wanted}, or a config.json")
        return parse(_read_json(Path(source)))
    except OSError as error:
        raise FlashHeadError(f"--config {source}: cannot be read ({error.strerror})") from error
    except FlashHeadError as error:
        raise FlashHeadError(f"--config {source}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > LARGEST_FILE_BYTES:
        raise FlashHeadError(f"{size:,} bytes are no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise FlashHeadError("not JSON (it nests too deeply)") from error
    except ValueError as error:
        raise FlashHeadError(f"not JSON ({error})") from error
    if not isinstance(config, dict):
        raise FlashHeadError("wanted a JSON object, as a config.json is")
    return config
