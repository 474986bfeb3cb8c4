"""torch's weight-only quantised products on the CPU, packed and checked: int8, int4.

The codes are the same on any device (`device_products.py` has the products there).

`pack_int8` and `pack_int4` return a call from `[n, d]` hidden states to `[n, V]` logits, and the
bytes that call reads. Each is compared with the float32 product of the rows its codes stand for
before it is handed out.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Product = Callable[[Tensor], Tensor]
INT4_GROUPS = (128, 64, 32)
"""Group sizes of torch's int4 product, tried from the cheapest."""
INT4_ROWS = 64
"""The packed int4 head has a multiple of this many rows."""
CHECKED_ROWS = 4096


def pack_int8(weight: Tensor) -> tuple[Product, int]:
    """`torch.ops.aten._weight_int8pack_mm` with one scale a row; `weight: bf16/f32[V, d]`."""
    codes, scales = int8_codes(weight)

    def product(hidden: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(hidden, codes, scales)

    check_product("int8", product, int8_rows(codes, scales), weight)
    return product, codes.numel() + scales.numel() * scales.element_size()


def int8_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes `int8[V, d]` and one scale a row in the weight's dtype, on its device."""
    weight = weight.detach()
    scales = (weight.abs().amax(1).float() / 127).clamp(min=1e-30).to(weight.dtype)
    codes = torch.empty_like(weight, dtype=torch.int8)
    for rows, scale, out in zip(
        weight.split(2**14), scales.split(2**14), codes.split(2**14), strict=True
    ):
        out.copy_((rows.float() / scale.float()[:, None]).round().clamp(-127, 127))
    return codes, scales


def int8_rows(codes: Tensor, scales: Tensor) -> Tensor:
    """The first rows that int8 codes stand for: float32[CHECKED_ROWS or fewer, d]."""
    return codes[:CHECKED_ROWS].float() * scales[:CHECKED_ROWS, None].float()


def pack_int4(weight: Tensor) -> tuple[Product, int, int] | None:
    """Torch's int4 CPU product, its bytes and its group size; None when no group divides d.

    Args:
        weight: `bf16/f32[V, d]`.
    """
    vocab_size, d = weight.shape
    group = int4_group(d)
    if group is None:
        return None
    codes, pairs = int4_codes(weight, group, -(-vocab_size // INT4_ROWS) * INT4_ROWS)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)

    def product(hidden: Tensor) -> Tensor:
        logits = torch.ops.aten._weight_int4pack_mm_for_cpu(hidden, packed, group, pairs)
        return logits[:, :vocab_size]

    check_product("int4", product, int4_rows(codes, pairs)[:vocab_size], weight)
    return product, packed.numel() + pairs.numel() * pairs.element_size(), group


def int4_group(d: int) -> int | None:
    """The largest group size that divides d, or None."""
    return next((size for size in INT4_GROUPS if d % size == 0), None)


def int4_codes(weight: Tensor, group: int, rows: int) -> tuple[Tensor, Tensor]:
    """Codes 0 to 15 and the scale and zero point of every group, on the weight's device.

    Args:
        weight: `bf16/f32[V, d]`.
        group: dimensions that share a scale.
        rows: V or more; the rows beyond stand for zeros.

    Returns:
        `int32[rows, d]` and, in the weight's dtype, `[d / group, rows, 2]`.
    """
    weight = weight.detach()
    vocab_size, d = weight.shape
    codes = torch.full((rows, d), 8, dtype=torch.int32, device=weight.device)
    scales = weight.new_ones(rows, d // group)
    for start in range(0, vocab_size, 2**14):
        block = slice(start, min(vocab_size, start + 2**14))
        grouped = weight[block].float().view(-1, d // group, group)
        scales[block] = (grouped.abs().amax(2) / 7).clamp(min=1e-30).to(weight.dtype)
        rounded = (grouped / scales[block].float()[:, :, None]).round().clamp(-8, 7)
        codes[block] = rounded.view(-1, d).to(torch.int32) + 8
    # group by row by pair
    return codes, torch.stack([scales, torch.zeros_like(scales)], -1).transpose(0, 1).contiguous()


def int4_rows(codes: Tensor, pairs: Tensor) -> Tensor:
    """The first rows that int4 codes stand for: float32[CHECKED_ROWS or fewer, d]."""
    scales = pairs[:, :CHECKED_ROWS, 0].T.float()  # [rows, groups]
    grouped = (codes[:CHECKED_ROWS].float() - 8).view(*scales.shape, -1)
    return (grouped * scales[:, :, None]).flatten(1)


def check_product(
    name: str,
    product: Product,
    rows: Tensor,
    weight: Tensor,
    seen: Product = lambda hidden: hidden.float(),
    batch: int = 2,
) -> None:
    """Compare with float32; the slack is a small multiple of what F.linear errs in this dtype.

    Args:
        name: what the error names.
        product: `[batch, d]` to `[batch, V]`.
        rows: `float32[k, d]`, what the codes of the first k rows stand for.
        weight: the head, for its dtype and device.
        seen: the hidden states as the product sees them, float32, if it rounds them too.
        batch: hidden states to compare with.

    Raises:
        RuntimeError: the product is wrong.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch, weight.shape[1], generator=generator).to(weight)
    truth = seen(hidden) @ rows.T
    eager = F.linear(seen(hidden).to(weight.dtype), rows.to(weight.dtype)).float()
    slack = 4 * (eager - truth).abs().max() + torch.finfo(weight.dtype).eps * truth.abs().max()
    error = (product(hidden)[:, : len(rows)].float() - truth).abs().max()
    if not bool(error <= slack):
        raise RuntimeError(
            f"torch's {name} product is off by {error:.3g}, wanted at most {slack:.3g}"
        )
