"""The heads FlashHead is measured against: float32 truth, and weight-only quantised heads.

`float32_logits` is the truth: float32 logits of the same bf16 weights. The quantised heads are
plain rounding to nearest of symmetric integers with one scale a group of `group` consecutive
weights of a row,

    w ~ scale * code,  scale = max|w| / (2^(bits-1) - 1),  code in [-2^(bits-1), 2^(bits-1) - 1],

multiplied with the unrounded hidden state in float32: what a weight-only kernel computes without
its own bf16 rounding of the result, so the baselines are shown at their best. Everything runs in
blocks of rows of the head, because a float32 copy of Gemma's head alone is 0.7 GB.
"""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from flashhead.errors import FlashHeadError

BLOCK_WEIGHTS = 2**24
"""Weights converted to float32 at a time (64 MB)."""


def row_blocks(vocab_size: int, hidden_size: int) -> Iterator[slice]:
    """Blocks of rows of a head, each of at most BLOCK_WEIGHTS weights."""
    rows = max(1, BLOCK_WEIGHTS // hidden_size)
    for start in range(0, vocab_size, rows):
        yield slice(start, min(vocab_size, start + rows))


def float32_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Float32 logits; equals `hidden.float() @ weight.float().T + bias.float()`.

    Args:
        hidden: `bf16/f32[n, d]`, hidden states.
        weight: `bf16/f32[V, d]`, rows of the head.
        bias: `bf16/f32[V]` or None.

    Returns:
        `float32[n, V]`.
    """
    vocab_size, d = weight.shape
    states = hidden.float()
    logits = torch.empty(states.shape[0], vocab_size, dtype=torch.float32)
    for block in row_blocks(vocab_size, d):
        logits[:, block] = states @ weight[block].float().T
    return logits if bias is None else logits.add_(bias.float())


@dataclasses.dataclass(frozen=True)
class QuantizedHead:
    """A head rounded to symmetric integers.

    Args:
        codes: `int8[V, d]`, whatever the bits: this is for accuracy, not for speed.
        scales: `float32/bf16[V, groups]`.
        bits: bits a weight that a packed head would store.
        group: weights a scale; the last group of a row may be shorter.
        bias: `bf16/f32[V]` or None.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    group: int
    bias: Tensor | None

    @property
    def bytes_read(self) -> int:
        """Bytes of the packed head, all read for every token."""
        vocab_size, d = self.codes.shape
        bias = 0 if self.bias is None else self.bias.numel() * self.bias.element_size()
        return (
            vocab_size * ((d * self.bits + 7) // 8)
            + self.scales.numel() * self.scales.element_size()
            + bias
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits `float32[n, V]` of `bf16/f32[n, d]` hidden states."""
        vocab_size, d = self.codes.shape
        states = hidden.float()
        logits = torch.empty(states.shape[0], vocab_size, dtype=torch.float32)
        for block in row_blocks(vocab_size, d):
            logits[:, block] = (
                states @ dequantized(self.codes[block], self.scales[block], self.group).T
            )
        return logits if self.bias is None else logits.add_(self.bias.float())


def dequantized(codes: Tensor, scales: Tensor, group: int) -> Tensor:
    """Rows that the codes stand for: float32[rows, d]."""
    d = codes.shape[1]
    return codes.float() * scales.float().repeat_interleave(group, dim=1)[:, :d]


def quantize_head(
    weight: Tensor, bits: int, group: int | None = None, bias: Tensor | None = None
) -> QuantizedHead:
    """Round a head to symmetric integers of `bits` bits.

    Args:
        weight: `bf16/f32[V, d]`.
        bits: 2 to 8.
        group: weights a scale (stored in bf16), or None for one float32 scale a row.
        bias: `bf16/f32[V]` or None, kept as it is.

    Raises:
        FlashHeadError: `bits` or `group` out of range.
    """
    if not 2 <= bits <= 8:
        raise FlashHeadError(f"bits={bits}: wanted 2 to 8")
    if group is not None and group < 1:
        raise FlashHeadError(f"group={group}: wanted 1 or more, or None for one scale a row")
    weight = weight.detach()  # of a Parameter, the graph of every block would be kept
    vocab_size, d = weight.shape
    width = d if group is None else group
    groups = -(-d // width)
    scale_dtype = torch.float32 if group is None else torch.bfloat16
    codes = torch.empty(vocab_size, d, dtype=torch.int8)
    scales = torch.empty(vocab_size, groups, dtype=scale_dtype)
    top = 2 ** (bits - 1) - 1
    for block in row_blocks(vocab_size, d):
        rows = torch.nn.functional.pad(weight[block].float(), (0, groups * width - d))
        grouped = rows.view(-1, groups, width)
        scales[block] = (grouped.abs().amax(2) / top).to(scale_dtype)
        step = scales[block].float()[:, :, None]
        rounded = (grouped / torch.where(step > 0, step, 1.0)).round().clamp(-top - 1, top)
        codes[block] = rounded.view(-1, groups * width)[:, :d].to(torch.int8)
    return QuantizedHead(codes, scales, bits, width, bias)
