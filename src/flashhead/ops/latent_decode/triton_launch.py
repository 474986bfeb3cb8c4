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
    choose_rebuilt_cut,
)
from flashhead.ops.latent_decode.reference import KeyUp
from flashhead.ops.latent_decode.rows import Rows
from flashhead.ops.latent_decode.triton import _merge_kernel, _split_kernel
from flashhead.ops.latent_decode.triton_rebuilt import _rebuilt_kernel

IS_INTERPRETED = not isinstance(_split_kernel, triton.JITFunction)
NO_FP8 = "impl='triton': fp8 needs compute capability 8.9 or more"
MERGE_R, MERGE_S = 64, 64
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
    found = Partials(query, latent.width, cut.splits)
    if found.empty:
        return found.out, found.lse
    if not device[3] and "fp8" in (latent.kind, rotary.kind if rotary else ""):
        raise FlashHeadError(NO_FP8)
    given = (query, latent, rotary, lengths, table, starts, bias, scale)
    with on_device(query):
        launch = hopper_launch.launch if cut.hopper else _launch
        launch(*given, found.partial, found.partial_lse, cut)
        found.merge()
    return found.out, found.lse


class Partials:
    """What the splits of all rows and heads give, and what becomes of it.

    Args:
        query: `[batch, heads, ...]`, of the dtype that comes out.
        rank: numbers of a latent.
        splits: of each row; 1: nothing is merged.
    """

    def __init__(self, query: Tensor, rank: int, splits: int) -> None:
        batch, self.heads = query.shape[:2]
        self.batch, self.rank, self.splits = batch, rank, splits
        self.out = query.new_empty(batch, self.heads, rank)
        self.lse = query.new_empty(batch, self.heads, dtype=torch.float32)
        self.empty = 0 in query.shape[:2]
        self.partial, self.partial_lse = self.out, self.lse
        if splits > 1 and not self.empty:
            shape = (batch, splits, self.heads)
            self.partial = query.new_empty(*shape, rank, dtype=torch.float32)
            self.partial_lse = query.new_empty(shape, dtype=torch.float32)

    def merge(self) -> None:
        """Start the kernel that merges, if there is anything to merge."""
        if self.splits == 1:
            return
        _merge_kernel[(-(-self.rank // MERGE_R), self.heads, self.batch)](
            self.partial,
            self.partial_lse,
            self.out,
            self.lse,
            self.heads,
            self.splits,
            RANK=self.rank,
            BLOCK_S=MERGE_S,
            BLOCK_R=MERGE_R,
            num_warps=4,
        )


def latent_decode_rebuilt(
    query: Tensor,
    latent: Rows,
    up: KeyUp,
    first_index: int,
    lengths: Tensor,
    table: Tensor | None,
    starts: Tensor | None,
    bias: Tensor | None,
    scale: float,
    longest: int,
    blocks: Blocks,
) -> tuple[Tensor, Tensor]:
    """As `rebuilt.latent_decode_rebuilt`, whose checks have been made."""
    require_one_gpu(query, latent, lengths, table, starts, bias, *up.tensors())
    batch, heads, head_dim = query.shape
    share, device = heads // up.kv_heads, _device(query.device)
    if latent.kind == "fp8" and not device[3]:
        raise FlashHeadError(NO_FP8)
    cut = choose_rebuilt_cut(
        blocks, latent.width, head_dim, share, batch * up.kv_heads, longest, *device[:3]
    )
    found = Partials(query, latent.width, cut.splits)
    if found.empty:
        return found.out, found.lse
    turned = up.cos.shape[1]
    fixed = head_dim - 2 * turned
    with on_device(query):
        _rebuilt_kernel[(up.kv_heads, cut.splits, batch)](
            query,
            *_pointers(latent, query),
            up.weight,
            query if up.constant is None else up.constant,
            up.cos,
            up.sin,
            lengths if table is None else table,
            lengths,
            lengths if starts is None else starts,
            query if bias is None else bias,
            found.partial,
            found.partial_lse,
            scale,
            heads,
            query.stride(0),
            query.stride(1),
            *_strides(latent, 0),
            *_bias_strides(bias),
            0 if table is None else table.stride(0),
            cut.splits,
            first_index,
            *_strides(latent, 1),
            SHARE=share,
            PAGE=0 if table is None else latent.codes.shape[1],
            HAS_STARTS=starts is not None,
            HAS_BIAS=bias is not None,
            HAS_CONSTANT=up.constant is not None,
            HEAD_DIM=head_dim,
            TURNED=turned,
            PAIRS=max(16, triton.next_power_of_2(turned)) if turned else 16,
            FIXED=max(16, triton.next_power_of_2(fixed)) if fixed else 0,
            RANK=latent.width,
            **_sizes(latent),
            BLOCK_H=cut.heads,
            BLOCK_N=cut.tokens,
            STAGES=cut.stages,
            FAST=cut.fast,
            num_warps=cut.warps,
        )
        found.merge()
    return found.out, found.lse


def rebuilt_unfit(rank: int, head_dim: int, share: int, device: torch.device) -> str:
    """Why keys of this shape cannot be rebuilt on a device; "" where they can."""
    try:
        choose_rebuilt_cut(Blocks(), rank, head_dim, share, 1, 1, *_device(device)[:3])
    except FlashHeadError as error:
        return str(error)
    return ""


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
        *_bias_strides(bias),
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


def _bias_strides(bias: Tensor | None) -> tuple[int, int]:
    if bias is None:
        return 0, 0
    return bias.stride(0) * (bias.shape[0] > 1), bias.stride(1) * (bias.shape[1] > 1)


def on_device(query: Tensor) -> Any:
    """Context in which kernels start where `query` is."""
    return torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext()


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
