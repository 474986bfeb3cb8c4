"""Launches the kernels of `triton` and `hopper`.

Nothing depends on lengths on the device, so a launch can be captured in a CUDA graph and waits for
nothing (`blocks`).
"""

import contextlib
import functools
from typing import Any

import torch
import triton
from torch import Tensor

from flashhead.errors import FlashHeadError
from flashhead.ops.latent_decode import hopper_launch
from flashhead.ops.latent_decode.blocks import (
    SHARED_BYTES,
    Blocks,
    Cut,
    block_heads,
    choose_cut,
)
from flashhead.ops.latent_decode.rows import Rows
from flashhead.ops.latent_decode.triton import _merge_kernel, _split_kernel

IS_INTERPRETED = not isinstance(_split_kernel, triton.JITFunction)
MERGE_R, MERGE_S = 256, 8
"""Numbers and splits that a step of the merge holds."""


def latent_decode(
    query: Tensor,
    latent: Rows,
    rotary: Rows | None,
    lengths: Tensor,
    table: Tensor | None,
    starts: Tensor | None,
    bias: Tensor | None,
    scale: float,
    longest: int,
    blocks: Blocks,
) -> tuple[Tensor, Tensor]:
    """As `api.latent_decode`, whose checks have been made."""
    require_one_gpu(query, latent, rotary, lengths, table, starts, bias)
    batch, heads = query.shape[:2]
    unfit = hopper_launch.unfit(query, latent, rotary, block_heads(blocks, latent.width, heads))
    rope, device = 0 if rotary is None else rotary.width, _device(query.device)
    cut = choose_cut(blocks, latent.width, rope, batch, heads, longest, unfit, *device[:3])
    splits = cut.splits
    out = query.new_empty(batch, heads, latent.width)
    lse = query.new_empty(batch, heads, dtype=torch.float32)
    if batch == 0 or heads == 0:
        return out, lse
    partial, partial_lse = out, lse
    if splits > 1:
        partial = query.new_empty(batch, splits, heads, latent.width, dtype=torch.float32)
        partial_lse = query.new_empty(batch, splits, heads, dtype=torch.float32)
    if not device[3] and "fp8" in (latent.kind, rotary.kind if rotary else ""):
        raise FlashHeadError("impl='triton': fp8 needs compute capability 8.9 or more")
    given = (query, latent, rotary, lengths, table, starts, bias, scale, partial, partial_lse)
    with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
        (hopper_launch.launch if cut.hopper else _launch)(*given, cut)
        if splits > 1:
            _merge_kernel[(-(-latent.width // MERGE_R), heads, batch)](
                partial,
                partial_lse,
                out,
                lse,
                heads,
                splits,
                RANK=latent.width,
                BLOCK_S=MERGE_S,
                BLOCK_R=MERGE_R,
                num_warps=4,
            )
    return out, lse


def _launch(
    query: Tensor,
    latent: Rows,
    rotary: Rows | None,
    lengths: Tensor,
    table: Tensor | None,
    starts: Tensor | None,
    bias: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    cut: Cut,
) -> None:
    batch, heads = query.shape[:2]
    _split_kernel[(-(-heads // cut.heads), cut.splits, batch)](
        query,
        *_pointers(latent, query),
        *_pointers(rotary, query),
        query if table is None else table,
        lengths,
        lengths if starts is None else starts,
        query if bias is None else bias,
        out,
        lse,
        scale,
        heads,
        query.stride(0),
        query.stride(1),
        *_strides(latent, 0),
        *_strides(rotary, 0),
        0 if bias is None else bias.stride(0) * (bias.shape[0] > 1),
        0 if bias is None else bias.stride(1) * (bias.shape[1] > 1),
        0 if table is None else table.stride(0),
        cut.splits,
        *_strides(latent, 1),
        *_strides(rotary, 1),
        PAGE=0 if table is None else latent.codes.shape[1],
        HAS_STARTS=starts is not None,
        HAS_BIAS=bias is not None,
        RANK=latent.width,
        **_sizes(latent),
        ROTARY=0 if rotary is None else rotary.width,
        **{f"ROTARY_{name}": value for name, value in _sizes(rotary).items()},
        BLOCK_H=cut.heads,
        BLOCK_N=cut.tokens,
        STAGES=cut.stages,
        FAST=cut.fast,
        num_warps=cut.warps,
    )


def _pointers(rows: Rows | None, unused: Tensor) -> tuple[Tensor, Tensor]:
    if rows is None:
        return unused, unused
    return rows.codes, unused if rows.scale is None else rows.scale


def _strides(rows: Rows | None, axis: int) -> tuple[int, int]:
    if rows is None:
        return 0, 0
    return rows.codes.stride(axis), 0 if rows.scale is None else rows.scale.stride(axis)


def _sizes(rows: Rows | None) -> dict[str, Any]:
    """KIND, codes of a vector and their number padded, groups and theirs."""
    if rows is None:
        return {"KIND": "bf16", "CODES": 0, "W": 16, "GROUPS": 0, "G": 1}
    codes, group, groups = rows.codes.shape[2], 0, 0
    width = max(16, triton.next_power_of_2(codes))
    count = 1
    if rows.scale is not None:
        groups, group = rows.scale.shape[2], rows.group // (2 if rows.kind == "int4" else 1)
        if groups > 1:
            if group & (group - 1):
                raise FlashHeadError(
                    f"impl='triton': groups of {rows.group} numbers: wanted a power of two"
                )
            count = width // group
    return {"KIND": rows.kind, "CODES": codes, "W": width, "GROUPS": groups, "G": count}


def require_one_gpu(*given: Any) -> None:
    """Raise FlashHeadError unless all tensors are on one GPU (or interpreted on the CPU)."""
    tensors = []
    for thing in given:
        tensors += [thing.codes, thing.scale] if isinstance(thing, Rows) else [thing]
    devices = {tensor.device for tensor in tensors if tensor is not None}
    kind = "cpu" if IS_INTERPRETED else "cuda"
    if len(devices) != 1 or next(iter(devices)).type != kind:
        wanted = "cpu under TRITON_INTERPRET" if IS_INTERPRETED else "one GPU"
        got = ", ".join(sorted(str(device) for device in devices))
        raise FlashHeadError(f"impl='triton': tensors are on {got}, wanted {wanted}")


@functools.cache
def _device(device: torch.device) -> tuple[int, int, bool, bool]:
    """Multiprocessors, bytes of shared memory to plan with, whether NVIDIA's assembly runs, and
    whether e4m3 is known.
    """
    multiprocessors, limit, capability = _properties(device)
    if capability >= (10, 0):
        limit //= 2  # Triton keeps a second, transposed copy of what both products read
    nvidia = device.type != "cpu" and torch.version.hip is None
    return multiprocessors, limit, nvidia, not nvidia or capability >= (8, 9)


def _properties(device: torch.device) -> tuple[int, int, tuple[int, int]]:
    """Multiprocessors, shared memory of a program in bytes, compute capability."""
    if device.type != "cuda":
        return 4, SHARED_BYTES, (0, 0)  # interpreted: some splits
    found = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    capability = torch.cuda.get_device_capability(device)
    return found["multiprocessor_count"], found["max_shared_mem"], capability
