"""Checks of what a saved index claims: the files come from strangers."""

from typing import Any

import torch
from torch import Tensor

from flashhead.errors import FlashHeadError

REMEDY = "convert the model again"


def check_tensor(
    tensors: dict[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> Tensor:
    """The tensor `name` if it has this dtype and shape; FlashHeadError else."""
    if name not in tensors:
        raise FlashHeadError(f"the index has no tensor {name!r}: {REMEDY}")
    tensor = tensors[name]
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        got = f"{tensor.dtype}{list(tensor.shape)}"
        raise FlashHeadError(
            f"index tensor {name!r} is {got}, wanted {dtype}{list(shape)}: {REMEDY}"
        )
    return tensor


def metadata_int(metadata: dict[str, Any], name: str, least: int) -> int:
    """The integer `name` of the metadata, at least `least`; FlashHeadError else."""
    value = metadata.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise FlashHeadError(
            f"index metadata {name!r} is {value!r}, wanted an integer >= {least}: {REMEDY}"
        )
    return value


def metadata_list(metadata: dict[str, Any], name: str) -> list[Any]:
    """The list `name` of the metadata; FlashHeadError else."""
    value = metadata.get(name)
    if not isinstance(value, list):
        raise FlashHeadError(f"index metadata {name!r} is {value!r}, wanted a list: {REMEDY}")
    return value
