"""The scan on a GPU: codes are widened in registers and multiplied on tensor cores.

One program has a range of one row's tokens and goes through the groups, so that a token's codes,
which lie side by side, are found in the L1 cache. Coordinate 8 / bits * j + i of a key is field i
of byte j, so field i of all bytes meets its own slice of the query:

    scores[tokens, heads] += field_i[tokens, bytes] @ query_i[bytes, heads]

Fields are exact in float16. A query is float16 too, after division by its largest number: its
rounding is far below that of the codes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashhead.ops.latent_decode import triton_launch
from flashhead.ops.latent_select.codes import KeyCodes, rotation

TOKENS = 128
"""Of a program."""
BYTES = 32
"""Of a code at a time, at most: more spill registers."""


@triton.jit(do_not_specialize=["tokens", "stride_cb", "stride_sb"])
def _scan_keys_kernel(
    codes_ptr,
    scale_ptr,
    query_ptr,
    factor_ptr,
    scores_ptr,
    tokens,
    stride_cb,
    stride_sb,
    GROUPS: tl.constexpr,
    SHARE: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """scores[row, head, t] = factor[row, head] * scale[row, t, group] * code . query."""
    row = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.arange(0, BLOCK_H)
    is_token, is_head = t < tokens, h < SHARE
    place = t.to(tl.int64) * GROUPS
    fields: tl.constexpr = 8 // BITS
    middle: tl.constexpr = (2**BITS - 1) / 2
    for group in range(GROUPS):
        sums = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
        own = (row * GROUPS + group) * fields
        for first in range(0, WIDTH, BLOCK_W):
            w = first + tl.arange(0, BLOCK_W)
            is_byte = w < WIDTH
            at = codes_ptr + row * stride_cb + (place + group)[:, None] * WIDTH + w[None, :]
            codes = tl.load(at, mask=is_token[:, None] & is_byte[None, :], other=0).to(tl.int32)
            for i in tl.static_range(fields):
                field = ((codes >> (i * BITS)) & (2**BITS - 1)).to(tl.float32) - middle
                at = query_ptr + ((own + i) * WIDTH + w)[:, None] * SHARE + h[None, :]
                query = tl.load(at, mask=is_byte[:, None] & is_head[None, :], other=0)
                sums = tl.dot(field.to(tl.float16), query, sums)
        scale = tl.load(scale_ptr + row * stride_sb + place + group, mask=is_token, other=0)
        head = (row * GROUPS + group) * SHARE + h
        factor = tl.load(factor_ptr + head, mask=is_head, other=0)
        sums = sums * scale.to(tl.float32)[:, None] * factor[None, :]
        at = scores_ptr + head[None, :] * tokens + t[:, None]
        tl.store(at, sums, mask=is_token[:, None] & is_head[None, :])


def estimate(query: Tensor, keys: KeyCodes, scale: float) -> Tensor:
    """As `reference.estimate`.

    Raises:
        FlashHeadError: tensors that are not on one GPU.
    """
    triton_launch.require_one_gpu(query, keys.codes, keys.scale)
    batch, tokens, groups, width = keys.codes.shape
    share, fields = query.shape[1] // groups, 8 // keys.bits
    turned = query.float() @ rotation(keys.dim, query.device) * scale
    factor = turned.abs().amax(-1).clamp_min(2**-126)
    turned = (turned / factor[..., None]).half()
    padded = torch.nn.functional.pad(turned, (0, width * fields - keys.dim))
    # [batch, groups, fields, width, share]
    slices = padded.view(batch, groups, share, width, fields).permute(0, 1, 4, 3, 2).contiguous()
    codes, scales = (_packed_rows(x) for x in (keys.codes, keys.scale))
    scores = torch.empty(batch, groups * share, tokens, device=query.device)
    _scan_keys_kernel[(triton.cdiv(tokens, TOKENS), batch)](
        codes,
        scales,
        slices,
        factor,
        scores,
        tokens,
        codes.stride(0),
        scales.stride(0),
        GROUPS=groups,
        SHARE=share,
        WIDTH=width,
        BITS=keys.bits,
        BLOCK_T=TOKENS,
        BLOCK_W=min(BYTES, max(16, triton.next_power_of_2(width))),
        BLOCK_H=max(16, triton.next_power_of_2(share)),
    )
    return scores


def _packed_rows(x: Tensor) -> Tensor:
    """As it is where a row's tokens lie together, as in a cache with room; else a copy."""
    return x if x[0].is_contiguous() else x.contiguous()
