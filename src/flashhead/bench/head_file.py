"""A head alone in one safetensors file, for machines that have no room or no network for its model.

Tensors `weight` [V, d], `hidden` [n, d] and `calibration` [m, d], each bfloat16, float16 or
float32, and the metadata `name`. The file may come from a stranger: the header is checked before
anything is allocated, and nothing but safetensors is read.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flashhead.bench.synthetic import Problem
from flashhead.errors import FlashHeadError

TENSORS = ("weight", "hidden", "calibration")
DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
MOST_BYTES = 2**35
"""Largest file that is read, 32 GB: a head of 2^20 rows and 16,384 dimensions."""
MOST_NAME = 80


def read_head_file(path: Path, device: str = "cpu") -> Problem:
    """Read a head file onto a device, as bfloat16.

    Raises:
        FlashHeadError: no such safetensors file, or a tensor or the name is missing, of the wrong
            type or shape, too large, or not finite.
    """
    try:
        with safe_open(path, framework="pt", device=device) as file:
            name = _require_header(path, file)
            tensors = {key: file.get_tensor(key).to(torch.bfloat16) for key in TENSORS}
    except (SafetensorError, OSError) as error:
        raise FlashHeadError(f"{path}: not a readable safetensors file ({error})") from error
    for key, tensor in tensors.items():
        # a sum of finite bfloat16 values cannot overflow float64, and needs no mask in memory
        if not torch.isfinite(tensor.sum(dtype=torch.float64)):
            raise FlashHeadError(f"{path}: tensor {key!r} holds NaN or infinity")
    return Problem(name, **tensors, synthetic=False)


def write_head_file(problem: Problem, path: Path) -> None:
    """Write a head file whole or not at all."""
    tensors = {key: getattr(problem, key).detach().cpu().contiguous() for key in TENSORS}
    partial = path.with_name(f".{path.name}.partial")
    save_file(tensors, partial, metadata={"name": problem.name})
    partial.replace(path)


def _require_header(path: Path, file: safe_open) -> str:
    """Check what the header says; returns the name."""
    found = set(file.keys())
    if found != set(TENSORS):
        raise FlashHeadError(
            f"{path}: tensors {', '.join(sorted(found)) or 'none'}; wanted {', '.join(TENSORS)}"
        )
    slices = {key: file.get_slice(key) for key in TENSORS}
    shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
    dtypes = {key: part.get_dtype() for key, part in slices.items()}
    total = 0
    for key, shape in shapes.items():
        width = shapes["weight"][-1:]
        if len(shape) != 2 or 0 in shape or shape[1:] != width or shape[1] < 2:
            wanted = f"[{'V' if key == 'weight' else 'n'}, d], d = {list(width)} and no 0"
            raise FlashHeadError(f"{path}: tensor {key!r} has shape {list(shape)}, wanted {wanted}")
        if dtypes[key] not in DTYPE_BYTES:
            wanted = ", ".join(DTYPE_BYTES)
            raise FlashHeadError(f"{path}: tensor {key!r} is {dtypes[key]}, wanted {wanted}")
        total += shape[0] * shape[1] * DTYPE_BYTES[dtypes[key]]
    if total > MOST_BYTES:
        raise FlashHeadError(f"{path}: {total:,} bytes of tensors, wanted at most {MOST_BYTES:,}")
    name = (file.metadata() or {}).get("name", "")
    if not (name.isprintable() and 0 < len(name) <= MOST_NAME):
        raise FlashHeadError(
            f"{path}: metadata name {name[:MOST_NAME]!r}, wanted 1 to {MOST_NAME} printable letters"
        )
    return name
