"""Shapes, types and sizes of a model's tensors, from headers alone.

Nothing is loaded: safetensors and GGUF files say shapes and types in their headers, and the hub
serves those of its files.
"""

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

from flashhead.errors import FlashHeadError

HEADER_LIMIT_BYTES = 100_000_000
"""What the safetensors format allows."""
DTYPES_OF_BITS = {
    64: ("F64", "I64", "U64"),
    32: ("F32", "I32", "U32"),
    16: ("F16", "BF16", "I16", "U16"),
    8: ("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"),
    6: ("F6_E2M3", "F6_E3M2"),
    4: ("F4",),
}
BITS = {dtype: bits for bits, dtypes in DTYPES_OF_BITS.items() for dtype in dtypes}
"""Of an element, by its type as safetensors spells it."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Shape and size of a stored tensor."""

    shape: tuple[int, ...]
    size_bytes: float


def read_model(source: str) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Config and tensors of a folder, a `.gguf` file or a hub id.

    Raises:
        FlashHeadError: not a model, no safetensors files, or a damaged one.
    """
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    return _read_gguf(path) if path.exists() else _read_hub(source)


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FlashHeadError(f"{folder}: no config.json there; wanted a Hugging Face model folder")
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise FlashHeadError(f"{folder}: no model*.safetensors there; wanted a safetensors model")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FlashHeadError(f"{config_file}: not JSON ({error})") from error
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        found = read_safetensors(file)
        require_whole(file, found)
        tensors |= found
    return config, tensors


def read_safetensors(file: Path) -> dict[str, TensorInfo]:
    """Tensors of a safetensors file, from its header: 8 bytes of length, then JSON."""
    try:
        with file.open("rb") as source:
            (length,) = struct.unpack("<Q", source.read(8))
            if length > HEADER_LIMIT_BYTES:
                raise ValueError(f"header of {length:,} bytes")
            header = json.loads(source.read(length))
        header.pop("__metadata__", None)
        return {
            name: tensor_info(entry["dtype"], tuple(entry["shape"]))
            for name, entry in header.items()
        }
    except (ValueError, KeyError, struct.error) as error:
        raise FlashHeadError(f"{file}: not a safetensors file ({error})") from error


def require_whole(file: Path, tensors: dict[str, TensorInfo]) -> None:
    """Check that a safetensors file has the length that its header says.

    Args:
        file: whose header was read.
        tensors: what `read_safetensors` found there.

    Raises:
        FlashHeadError: it is shorter (a download that stopped) or longer.
    """
    with file.open("rb") as source:
        (header_bytes,) = struct.unpack("<Q", source.read(8))
    wanted = 8 + header_bytes + int(sum(info.size_bytes for info in tensors.values()))
    size = file.stat().st_size
    if size != wanted:
        raise FlashHeadError(
            f"{file.name}: {size:,} bytes, its header says {wanted:,} (truncated?)"
        )


def tensor_info(dtype: str, shape: tuple[int, ...]) -> TensorInfo:
    """Size of a tensor; `dtype` as safetensors spells it."""
    elements = 1
    for length in shape:
        elements *= length
    return TensorInfo(shape, elements * BITS[dtype] / 8)


def _read_hub(repo: str) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Config and headers from the hub; the weights stay there."""
    from huggingface_hub import get_safetensors_metadata, hf_hub_download

    config = json.loads(Path(hf_hub_download(repo, "config.json")).read_text(encoding="utf-8"))
    files = get_safetensors_metadata(repo).files_metadata.values()
    return config, {
        name: tensor_info(info.dtype, tuple(info.shape))
        for file in files
        for name, info in file.tensors.items()
    }


def _read_gguf(file: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """A GGUF file as it is once loaded, in bf16; it does not say which layers slide: none here."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except ValueError as error:
        raise FlashHeadError(f"{file}: not a GGUF file ({error})") from error
    arch = reader.fields["general.architecture"].contents()
    names = {
        "hidden_size": "embedding_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
        "num_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
    }
    config = {
        name: reader.fields[f"{arch}.{key}"].contents()
        for name, key in names.items()
        if f"{arch}.{key}" in reader.fields
    }
    tensors = {
        info.name: tensor_info("BF16", tuple(int(n) for n in reversed(info.shape.tolist())))
        for info in reader.tensors
    }
    config["vocab_size"] = max(
        (info.shape[0] for name, info in tensors.items() if name == "token_embd.weight"), default=0
    )
    return config, tensors
