"""The heads FlashHead is measured against: float32 truth, and weight-only quantised heads.

`float32_logits` is the truth: float32 logits of the same bf16 weights. The quantised heads are
plain rounding to nearest with one scale a group of `group` consecutive weights of a row, to
symmetric integers or to float8_e4m3fn (4 exponent and 3 mantissa bits, largest value 448):

    int: w ~ scale * code,  scale = max|w| / (2^(bits-1) - 1),  -2^(bits-1) <= code < 2^(bits-1)
    fp8: w ~ scale * code,  scale = max|w| / 448,               code the nearest float8

multiplied with the unrounded hidden state in float32: what a weight-only kernel computes without
its own bf16 rounding of the result, so the baselines are shown at their best. Everything runs in
blocks of rows of the head, because a float32 copy of Gemma's head alone is 0.7 GB.
"""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from flashhead.errors import FlashHeadError

BLOCK_WEIGHTS = 2**22
"""Weights converted to float32 at a time (16 MB; blocks of 64 MB take a third longer)."""
FP8_MAX = 448.0
"""Largest float8_e4m3fn."""


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
        `float32[n, V]`, on the device of `hidden`.
    """
    vocab_size, d = weight.shape
    states = hidden.float()
    logits = torch.empty(states.shape[0], vocab_size, dtype=torch.float32, device=states.device)
    for block in row_blocks(vocab_size, d):
        logits[:, block] = states @ weight[block].float().T
    return logits if bias is None else logits.add_(bias.float())


@dataclasses.dataclass(frozen=True)
class QuantizedHead:
    """A head rounded to few bits.

    Args:
        codes: `int8[V, d]` whatever the bits, or `bfloat16[V, d]` that holds float8 values (all of
            them exactly; torch widens bf16 three times as fast): for accuracy, not for speed.
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
            codes, scales = self.codes[block].float(), self.scales[block].float()
            if scales.shape[1] == 1:  # n scaled logits a row are fewer than d scaled weights
                logits[:, block] = (states @ codes.T).mul_(scales[:, 0])
            else:
                logits[:, block] = states @ _scaled(codes, scales, self.group).T
        return logits if self.bias is None else logits.add_(self.bias.float())


def _scaled(codes: Tensor, scales: Tensor, group: int) -> Tensor:
    """Rows that the codes stand for: float32[rows, d]; may write over `codes`."""
    rows, d = codes.shape
    if d % group:
        return codes * scales.repeat_interleave(group, dim=1)[:, :d]
    return codes.view(rows, -1, group).mul_(scales[:, :, None]).view(rows, d)


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


def quantize_head_fp8(weight: Tensor, bias: Tensor | None = None) -> QuantizedHead:
    """Round a head to float8_e4m3fn with one float32 scale a row.

    Args:
        weight: `bf16/f32[V, d]`.
        bias: `bf16/f32[V]` or None, kept as it is.
    """
    weight = weight.detach()
    vocab_size, d = weight.shape
    codes = torch.empty(vocab_size, d, dtype=torch.bfloat16)
    scales = torch.empty(vocab_size, 1)
    for block in row_blocks(vocab_size, d):
        rows = weight[block].float()
        step = rows.abs().amax(1, keepdim=True) / FP8_MAX
        scales[block] = step
        unit = (rows / torch.where(step > 0, step, 1.0)).clamp_(-FP8_MAX, FP8_MAX)
        codes[block] = unit.to(torch.float8_e4m3fn).bfloat16()
    return QuantizedHead(codes, scales, 8, d, bias)
