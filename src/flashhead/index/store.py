"""An index on disk: one safetensors file beside the weights, and what describes it for config.json.

The `flashhead` section says which head the index was built from by SHA-256 of its bytes, so that an
index never meets other weights, and gives the size and SHA-256 of the index file itself, so that a
truncated or altered one is refused.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flashhead.errors import FlashHeadError
from flashhead.index.checks import REMEDY, metadata_int
from flashhead.index.clusters import ClustersIndex
from flashhead.index.codes import CodesIndex
from flashhead.index.shard import require_rows, shard_codes

INDEX_FILE = "flashhead/index.safetensors"
"""In a folder of its own: engines read every safetensors file beside config.json as weights."""
FORMAT_VERSION = 2
SAMPLE_ROWS = 64
_KINDS: dict[str, type[CodesIndex] | type[ClustersIndex]] = {
    "codes": CodesIndex,
    "clusters": ClustersIndex,
}
_READ_BYTES = 1 << 24


def save_index(
    index: CodesIndex | ClustersIndex, weight: Tensor, sample: Tensor | None, folder: Path
) -> dict[str, Any]:
    """Write an index to `folder / INDEX_FILE`.

    Args:
        index: the index of `weight`.
        weight: floating `[V, d]`.
        sample: floating `[n, d]`, hidden states kept to measure the crossover with on the user's
            machine, or None.
        folder: an existing folder.

    Returns:
        The `flashhead` section for config.json.
    """
    tensors = {name: tensor.contiguous() for name, tensor in index.tensors().items()}
    states = torch.empty(0, weight.shape[1]) if sample is None else sample
    tensors["sample"] = states[:SAMPLE_ROWS].to(torch.bfloat16).contiguous()
    path = folder / INDEX_FILE
    path.parent.mkdir()
    save_file(tensors, path)
    return {
        "format_version": FORMAT_VERSION,
        "index": index.kind,
        "vocab_size": index.vocab_size,
        "hidden_size": index.hidden_size,
        "head_dtype": str(weight.dtype).removeprefix("torch."),
        "head_sha256": tensor_sha256(weight),
        "index_bytes": path.stat().st_size,
        "index_sha256": _file_sha256(path),
        "parameters": index.metadata(),
    }


def load_index(
    folder: Path, section: dict[str, Any], weight: Tensor, first_row: int | None = None
) -> tuple[CodesIndex | ClustersIndex, Tensor]:
    """Read the index of `folder` and its sample of hidden states (`bfloat16[n, d]`).

    Args:
        folder: a folder that `save_index` wrote to.
        section: the `flashhead` section of its config.json.
        weight: floating `[V, d]`, the head that the index must belong to, or some of its rows.
        first_row: of the rows, where they are not all: only codes can be cut.

    Raises:
        FlashHeadError: version, kind, shape, checksum or file do not fit; the line says which and
            what to do.
    """
    path = folder / INDEX_FILE
    version = section.get("format_version")
    if version != FORMAT_VERSION:
        raise FlashHeadError(
            f"{path}: format version {version!r}, this release reads {FORMAT_VERSION}: {REMEDY}"
        )
    kind = section.get("index")
    if kind not in _KINDS:
        raise FlashHeadError(f"{path}: index {kind!r}, wanted one of {', '.join(_KINDS)}: {REMEDY}")
    shape = [metadata_int(section, "vocab_size", 1), metadata_int(section, "hidden_size", 1)]
    first, rows = first_row or 0, len(weight)
    if first_row is None and shape != list(weight.shape):
        raise FlashHeadError(
            f"{path}: built from a head {shape}, this head is {list(weight.shape)}: {REMEDY}"
        )
    if first + rows > shape[0] or weight.shape[1:] != (shape[1],):
        raise FlashHeadError(
            f"{path}: built from a head {shape}, wanted rows {first} to {first + rows} of "
            f"{list(weight.shape[1:])} dimensions: {REMEDY}"
        )
    _check_file(path, section)
    whole = rows == shape[0]
    if whole:
        _check_head(path, section, weight)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FlashHeadError(f"{path}: not readable ({error}): {REMEDY}") from error
    sample = tensors.pop("sample", torch.empty(0, shape[1], dtype=torch.bfloat16))
    if sample.dim() != 2 or sample.shape[1] != shape[1] or not torch.isfinite(sample).all():
        raise FlashHeadError(f"{path}: tensor 'sample' does not fit the head: {REMEDY}")
    parameters = section.get("parameters")
    if not isinstance(parameters, dict):
        raise FlashHeadError(f"{path}: config.json has no index parameters: {REMEDY}")
    index = _KINDS[kind].from_tensors(
        tensors, {**parameters, "vocab_size": shape[0], "hidden_size": shape[1]}
    )
    if whole:
        return index, sample
    if not isinstance(index, CodesIndex):
        raise FlashHeadError(f"{path}: a {kind} index cannot be cut into ranks: convert to codes")
    index = shard_codes(index, first, first + rows)
    require_rows(index, weight)
    return index, sample


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes in row-major order."""
    digest = hashlib.sha256()
    flat = tensor.detach().cpu().contiguous().view(-1)
    for part in flat.split(_READ_BYTES):
        digest.update(part.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_file(path: Path, section: dict[str, Any]) -> None:
    if not path.is_file():
        raise FlashHeadError(f"{path}: missing, but config.json names an index: {REMEDY}")
    size, wanted = path.stat().st_size, metadata_int(section, "index_bytes", 1)
    if size != wanted:
        raise FlashHeadError(
            f"{path}: {size:,} bytes, wanted {wanted:,} (truncated?): copy it again, or {REMEDY}"
        )
    if _file_sha256(path) != section.get("index_sha256"):
        raise FlashHeadError(
            f"{path}: SHA-256 differs from config.json's: copy it again, or {REMEDY}"
        )


def _check_head(path: Path, section: dict[str, Any], weight: Tensor) -> None:
    """Compare the head's checksum, in the dtype it was saved in
    (the user may load it in another).
    """
    dtype = getattr(torch, str(section.get("head_dtype")), None)
    if not isinstance(dtype, torch.dtype):
        raise FlashHeadError(
            f"{path}: head dtype {section.get('head_dtype')!r} is unknown: {REMEDY}"
        )
    if tensor_sha256(weight.to(dtype)) != section.get("head_sha256"):
        raise FlashHeadError(
            f"{path}: built from other weights (the head's SHA-256 differs): {REMEDY}"
        )


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
