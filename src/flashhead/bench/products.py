"""torch's weight-only quantised products on the CPU, packed and checked: int8, int4.

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
    weight = weight.detach()
    scales = (weight.abs().amax(1).float() / 127).clamp(min=1e-30).to(weight.dtype)
    codes = torch.empty(weight.shape, dtype=torch.int8)
    for rows, scale, out in zip(
        weight.split(2**14), scales.split(2**14), codes.split(2**14), strict=True
    ):
        out.copy_((rows.float() / scale.float()[:, None]).round().clamp(-127, 127))

    def product(hidden: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(hidden, codes, scales)

    _check(
        "int8", product, codes[:CHECKED_ROWS].float() * scales[:CHECKED_ROWS, None].float(), weight
    )
    return product, codes.numel() + scales.numel() * scales.element_size()


def pack_int4(weight: Tensor) -> tuple[Product, int, int] | None:
    """Torch's int4 CPU product, its bytes and its group size; None when no group divides d.

    Args:
        weight: `bf16/f32[V, d]`.
    """
    weight = weight.detach()
    vocab_size, d = weight.shape
    group = next((size for size in INT4_GROUPS if d % size == 0), None)
    if group is None:
        return None
    rows = -(-vocab_size // INT4_ROWS) * INT4_ROWS
    codes = torch.full((rows, d), 8, dtype=torch.int32)
    scales = torch.ones(rows, d // group, dtype=weight.dtype)
    for start in range(0, vocab_size, 2**14):
        block = slice(start, min(vocab_size, start + 2**14))
        grouped = weight[block].float().view(-1, d // group, group)
        scales[block] = (grouped.abs().amax(2) / 7).clamp(min=1e-30).to(weight.dtype)
        rounded = (grouped / scales[block].float()[:, :, None]).round().clamp(-8, 7)
        codes[block] = rounded.view(-1, d).to(torch.int32) + 8
    first = (codes[:CHECKED_ROWS].float() - 8).view(-1, d // group, group)
    stands_for = (first * scales[:CHECKED_ROWS].float()[:, :, None]).view(-1, d)[:vocab_size]
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    # scale and zero point, group by row by pair
    pairs = torch.stack([scales, torch.zeros_like(scales)], -1).transpose(0, 1).contiguous()

    def product(hidden: Tensor) -> Tensor:
        logits = torch.ops.aten._weight_int4pack_mm_for_cpu(hidden, packed, group, pairs)
        return logits[:, :vocab_size]

    _check("int4", product, stands_for, weight)
    return product, packed.numel() + pairs.numel() * pairs.element_size(), group


def _check(name: str, product: Product, rows: Tensor, weight: Tensor) -> None:
    """Compare with float32; the slack is a small multiple of what F.linear errs in this dtype."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, weight.shape[1], generator=generator).to(weight.dtype)
    truth = hidden.float() @ rows.T
    eager = F.linear(hidden, rows.to(weight.dtype)).float()
    slack = 4 * (eager - truth).abs().max() + torch.finfo(weight.dtype).eps * truth.abs().max()
    error = (product(hidden)[:, : len(rows)].float() - truth).abs().max()
    if not bool(error <= slack):
        raise RuntimeError(
            f"torch's {name} product is off by {error:.3g}, wanted at most {slack:.3g}"
        )
