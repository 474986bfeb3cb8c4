"""Linear layers that multiply with packed integer weights on a CPU: 4 or 8 bits a weight are read.

The products are torch's own (`_weight_int4pack_mm_for_cpu`, `_weight_int8pack_mm`): activations
stay as they are, a weight is `code * scale` in their dtype, so a layer equals `F.linear` with the
unpacked weight but for the order of its sums. For one to eight rows, a decode step, they read fewer
bytes than a bf16 product; a long prompt takes as long as in bf16, or up to twice as long.
"""

import torch
from torch import Tensor, nn

INT4_GROUPS = (32, 64, 128, 256)
"""Weights that may share a scale, as torch's product takes them."""
INT4_ROWS = 16
"""Its outputs come in multiples of this."""
ALIGNED_BYTES = 64
"""Where the 8-bit product reads from addresses that are no multiple of this, it may crash."""


class Int4Linear(nn.Module):
    """`F.linear(x, codes * scales, bias)` from 4-bit codes, two a byte, and bf16 scales of groups.

    Args:
        codes: `int8[N, K]`, -8 to 7.
        scales: floating `[N, K / group]`.
        bias: `[N]` or None.

    Raises:
        ValueError: a shape that the product does not take (`int4_suits`).
    """

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        rows, columns = codes.shape
        if not int4_suits(rows, columns, scales.shape[1]):
            raise ValueError(
                f"codes {list(codes.shape)}, scales {list(scales.shape)}: wanted rows in multiples "
                f"of {INT4_ROWS} and groups of {', '.join(map(str, INT4_GROUPS))}"
            )
        self.in_features, self.out_features = columns, rows
        self.group = columns // scales.shape[1]
        unsigned = codes.to(torch.int32) + 8  # the product subtracts 8
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
        turned = scales.T.contiguous()
        self.register_buffer("packed", packed)  # uint8[N, K / 2]
        pairs = torch.stack([turned, torch.zeros_like(turned)], -1)
        self.register_buffer("scales_and_zeros", pairs)  # [K / group, N, 2]
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K]` to `[..., N]`, in the dtype of x."""
        flat = x.reshape(-1, self.in_features)
        pairs = self.scales_and_zeros.to(flat.dtype)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.packed, self.group, pairs)
        return _finished(y, x, self.bias)


class Int8Linear(nn.Module):
    """`F.linear(x, codes * scales, bias)` from 8-bit codes and a scale a row.

    Args:
        codes: `int8[N, K]`.
        scales: floating `[N]`.
        bias: `[N]` or None.
    """

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.shape
        # copies, for a tensor mapped from a file lies anywhere
        self.register_buffer("codes", codes.clone(memory_format=torch.contiguous_format))
        self.register_buffer("scales", scales.clone(memory_format=torch.contiguous_format))
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K]` to `[..., N]`, in the dtype of x."""
        flat = x.reshape(-1, self.in_features)
        if torch.compiler.is_compiling() or flat.data_ptr() % ALIGNED_BYTES:
            flat = flat.clone(memory_format=torch.contiguous_format)
        y = torch.ops.aten._weight_int8pack_mm(flat, self.codes, self.scales.to(flat.dtype))
        return _finished(y, x, self.bias)


def int4_suits(rows: int, columns: int, groups: int) -> bool:
    """Whether torch's 4-bit product takes a weight `[rows, columns]` with so many scales a row."""
    return rows % INT4_ROWS == 0 and columns % groups == 0 and columns // groups in INT4_GROUPS


def _finished(y: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    y = y.view(*x.shape[:-1], y.shape[-1])
    return y if bias is None else y + bias
