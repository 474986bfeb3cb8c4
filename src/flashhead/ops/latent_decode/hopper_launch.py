"""Launches `hopper`, and says what it cannot take."""

import functools

import torch
from torch import Tensor

from flashhead.ops.latent_decode.blocks import SHARED_BYTES, Cut
from flashhead.ops.latent_decode.rows import Rows

CHUNK, GROUP, TOKENS = 128, 64, 64
"""As in `hopper`."""


def unfit(query: Tensor, latent: Rows, rotary: Rows | None, block_heads: int) -> str:
    """Why the kernel cannot run on these; "" where it can."""
    reason = _device_unfit(query.device)
    if reason:
        return reason
    if block_heads not in (16, 32, 64):
        return f"{block_heads} heads a program: wanted 16, 32 or 64"
    if latent.kind != "bf16" and latent.group != GROUP:
        return f"groups of {latent.group} numbers: wanted {GROUP}"
    for rows in (latent, rotary):
        if rows is None:
            continue
        if rows.kind == "bf16" and rows.codes.dtype not in (torch.bfloat16, torch.float16):
            return f"rows of {rows.codes.dtype}: wanted 16 bits"
        size = rows.codes.element_size()
        strides = (*rows.codes.stride()[:2], rows.codes.shape[2])
        if rows.codes.data_ptr() % 16 or any(stride * size % 16 for stride in strides):
            return "rows that do not start at multiples of 16 bytes"
    if rotary is not None and rotary.kind != "bf16":
        return f"a rotary key in {rotary.kind}: wanted 16 bits"
    needed = shared_bytes(latent.width, 0 if rotary is None else rotary.width, block_heads)
    if needed > SHARED_BYTES:
        return f"{needed} bytes of shared memory: wanted {SHARED_BYTES} at most"
    return ""


def shared_bytes(rank: int, rope: int, block_heads: int) -> int:
    """Shared memory of a program: tile, queries, weights, and what reductions take."""
    width = -(-rank // CHUNK) * CHUNK + (_rotary_width(rope) if rope else 0)
    return 2 * ((TOKENS + block_heads) * width + TOKENS * block_heads) + 2048


def launch(
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
    """Start the kernel; arguments as in `triton_launch`, which has made the checks."""
    from flashhead.ops.latent_decode.hopper import _hopper_kernel

    batch, heads = query.shape[:2]
    codes = latent.codes if latent.scale is None else latent.codes.view(torch.int32)
    scales = query if latent.scale is None else latent.scale
    turned = query if rotary is None else rotary.codes
    _hopper_kernel[(-(-heads // cut.heads), cut.splits, batch)](
        query,
        codes,
        scales,
        turned,
        lengths if table is None else table,
        lengths,
        lengths if starts is None else starts,
        query if bias is None else bias,
        out,
        lse,
        scale,
        heads,
        query.stride(0),
        query.stride(1),
        codes.stride(0),
        0 if latent.scale is None else latent.scale.stride(0),
        0 if rotary is None else turned.stride(0),
        0 if bias is None else bias.stride(0) * (bias.shape[0] > 1),
        0 if bias is None else bias.stride(1) * (bias.shape[1] > 1),
        0 if table is None else table.stride(0),
        cut.splits,
        stride_lt=codes.stride(1),
        stride_lst=0 if latent.scale is None else latent.scale.stride(1),
        stride_rt=0 if rotary is None else turned.stride(1),
        PAGE=0 if table is None else codes.shape[1],
        HAS_STARTS=starts is not None,
        HAS_BIAS=bias is not None,
        RANK=latent.width,
        KIND=latent.kind,
        WORDS=0 if latent.scale is None else codes.shape[2],
        GROUPS=0 if latent.scale is None else latent.scale.shape[2],
        ROTARY=0 if rotary is None else rotary.width,
        ROTARY_W=_rotary_width(0 if rotary is None else rotary.width),
        BLOCK_H=cut.heads,
        num_warps=8,
    )


def _rotary_width(rope: int) -> int:
    return 64 if rope <= 64 else 128


@functools.cache
def _device_unfit(device: torch.device) -> str:
    if device.type != "cuda" or torch.version.hip is not None:
        return f"on {device.type}: wanted an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    return "" if capability == (9, 0) else f"compute capability {capability}: wanted 9.0"
