"""Bytes of an index that every query reads: measured in a converted folder, or by formula.

A codes index then reads the rows that may win, whose number depends on the query: that comes on
top, and `flashhead eval head` counts it. A clusters index reads the same for every query.
"""

import math
from pathlib import Path
from typing import Any

from flashhead.errors import FlashHeadError
from flashhead.ledger.files import TensorInfo, read_safetensors
from flashhead.ledger.tokens import Ledger

INDEX_FILE = "flashhead/index.safetensors"
USUAL_BITS = 1.5
"""Bits a dimension where no index says what fits its model: Gemma 3 270M gets 1.25, SmolLM2 2."""
SCANNED = {
    "codes": ("base", "scale", "direction", "exact", "transform"),
    "clusters": (
        *("centroids", "centroid_scale", "centroid_offset", "common", "estimate_scale"),
        *("estimate_offset", "cluster_of", "always"),
    ),
}
"""Tensors that every query reads whole."""


def describe_index(source: Path, config: dict[str, Any], book: Ledger) -> dict[str, Any]:
    """The index of a converted folder, else what a codes index of the usual size reads.

    Returns:
        JSON-able: `kind`, `measured`, `bytes_per_query`, `bytes_fraction` of the head, and for a
        saved index its file size and the `flashhead` section of the config.

    Raises:
        FlashHeadError: the config names an index whose file is missing or damaged.
    """
    section = config.get("flashhead")
    if section is None:
        return expected_index(book)
    file = source / INDEX_FILE
    if not file.is_file():
        raise FlashHeadError(f"{file} is missing: convert the model again")
    tensors = read_safetensors(file)
    kind = "codes" if "base" in tensors else "clusters"
    missing = sorted({*SCANNED[kind], *_EXTRA[kind]} - set(tensors))
    if missing:
        raise FlashHeadError(f"{file}: no tensor {missing[0]!r}: convert the model again")
    size = sum(tensors[name].size_bytes for name in SCANNED[kind])
    if kind == "clusters":
        size += probed_bytes(section, tensors["members"], book)
    return {
        "kind": kind,
        "measured": True,
        "file_bytes": file.stat().st_size,
        "section": section,
        **_per_query(size, book),
    }


def expected_index(book: Ledger) -> dict[str, Any]:
    """What every query would read of a codes index of the usual size; keys as `describe_index`."""
    size = float(codes_bytes(book.vocab_size, book.hidden_size, USUAL_BITS))
    expected = {"kind": "codes", "measured": False, "bits": USUAL_BITS}
    return expected | _per_query(size, book)


_EXTRA = {"codes": ("refine",), "clusters": ("members",)}


def _per_query(size: float, book: Ledger) -> dict[str, float]:
    return {"bytes_per_query": size, "bytes_fraction": size / book.head_bytes}


def codes_bytes(vocab_size: int, hidden_size: int, bits: float, segments: int | None = None) -> int:
    """Bytes that every query reads of a codes index of so many bits a dimension.

    Words of 4 bytes for 32 dimensions x 1 bit; a row has a coefficient in float32 and a scale in
    bf16 for each of its segments: None: 3, or 1 where all dimensions have the same bits.
    """
    units = max(1, math.ceil((hidden_size - 1) / 32))
    words = units + min(3 * units, round((bits - 1) * units))
    rows = math.ceil(vocab_size / 16) * 16
    scales = segments or (1 if bits in (1, 4) else 3)
    transform = units * 32 * hidden_size * 2 + 2 * hidden_size * 4
    return rows * words * 4 + vocab_size * (4 + 2 * scales) + transform


def probed_bytes(section: dict[str, Any], members: TensorInfo, book: Ledger) -> float:
    """Bytes of the probed clusters: their lists of tokens and those tokens' rows of the head."""
    clusters, size = members.shape
    probes = min(int(section["parameters"]["options"]["probes"]), clusters)
    return probes * size * (4 + book.head_bytes / book.vocab_size)
