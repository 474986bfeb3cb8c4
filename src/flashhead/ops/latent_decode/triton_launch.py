"""Launches the kernels of `triton`: what is cut into how many pieces.

The number of splits follows from the batch and the longest row that the caller allows, never from
lengths on the device, so a launch can be captured in a CUDA graph and waits for nothing.
"""

import dataclasses
import functools
from typing import Any

import torch
import triton
from torch import Tensor

from flashhead.errors import FlashHeadError
from flashhead.ops.latent_decode.rows import Rows
from flashhead.ops.latent_decode.triton import _merge_kernel, _split_kernel

IS_INTERPRETED = not isinstance(_split_kernel, triton.JITFunction)
MOST_SPLITS = 256
MERGE_R, MERGE_S = 256, 8
"""Numbers and splits that a step of the merge holds."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is cut up; None: chosen from the shape.

    Args:
        tokens: of a tile, 16 or more.
        heads: of a program, 16 or more.
        splits: of each row's tokens.
        warps: of a program.
        stages: tiles that are on their way at once.
        fast: nibbles are widened four bytes at once, in assembly of NVIDIA's GPUs.
    """

    tokens: int | None = None
    heads: int | None = None
    splits: int | None = None
    warps: int | None = None
    stages: int | None = None
    fast: bool | None = None


def choose_splits(programs: int, tiles: int, multiprocessors: int) -> int:
    """Splits that finish first: rounds of all multiprocessors, times tiles of each and 2 for
    starting and merging; of equal ones the fewest.
    """
    most = max(1, min(tiles, MOST_SPLITS))

    def cost(splits: int) -> int:
        rounds = -(-programs * splits // multiprocessors)
        return rounds * (-(-tiles // splits) + 2)

    return min(range(1, most + 1), key=lambda splits: (cost(splits), splits))


def complete(blocks: Blocks, latent: Rows, batch: int, heads: int, longest: int) -> Blocks:
    """Blocks with every choice made."""
    rank = triton.next_power_of_2(max(16, latent.width))
    own = blocks.heads or max(16, min(32 if rank > 512 else 64, triton.next_power_of_2(heads)))
    tokens = blocks.tokens or (32 if rank > 512 else 64)
    programs = batch * -(-heads // own)
    tiles = max(1, -(-longest // tokens))
    device = latent.codes.device
    return Blocks(
        tokens,
        own,
        blocks.splits or choose_splits(programs, tiles, _multiprocessors(device)),
        blocks.warps or (8 if rank * own >= 16384 else 4),
        blocks.stages or 2,
        _has_assembly(device) if blocks.fast is None else blocks.fast,
    )


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
    chosen = complete(blocks, latent, batch, heads, longest)
    splits = chosen.splits
    assert splits is not None
    assert chosen.heads is not None
    out = query.new_empty(batch, heads, latent.width)
    lse = query.new_empty(batch, heads, dtype=torch.float32)
    if batch == 0 or heads == 0:
        return out, lse
    partial, partial_lse = out, lse
    if splits > 1:
        partial = query.new_empty(batch, splits, heads, latent.width, dtype=torch.float32)
        partial_lse = query.new_empty(batch, splits, heads, dtype=torch.float32)
    grid = (-(-heads // chosen.heads), splits, batch)
    with _on(query.device):
        _split_kernel[grid](
            query,
            *_pointers(latent, query),
            *_pointers(rotary, query),
            query if table is None else table,
            lengths,
            lengths if starts is None else starts,
            query if bias is None else bias,
            partial,
            partial_lse,
            scale,
            heads,
            query.stride(0),
            query.stride(1),
            *_strides(latent, 0),
            *_strides(rotary, 0),
            0 if bias is None else bias.stride(0) * (bias.shape[0] > 1),
            0 if bias is None else bias.stride(1) * (bias.shape[1] > 1),
            0 if table is None else table.stride(0),
            splits,
            *_strides(latent, 1),
            *_strides(rotary, 1),
            PAGE=0 if table is None else latent.codes.shape[1],
            HAS_STARTS=starts is not None,
            HAS_BIAS=bias is not None,
            RANK=latent.width,
            **_sizes(latent),
            ROTARY=0 if rotary is None else rotary.width,
            **{f"ROTARY_{name}": value for name, value in _sizes(rotary).items()},
            BLOCK_H=chosen.heads,
            BLOCK_N=chosen.tokens,
            STAGES=chosen.stages,
            FAST=chosen.fast,
            num_warps=chosen.warps,
        )
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


def _has_assembly(device: torch.device) -> bool:
    return not IS_INTERPRETED and torch.version.hip is None and device.type == "cuda"


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # interpreted: a few splits
    return torch.cuda.get_device_properties(device).multi_processor_count


def _on(device: torch.device) -> Any:
    import contextlib

    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
