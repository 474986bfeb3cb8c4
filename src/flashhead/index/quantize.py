"""The quantiser of one segment: base code, then planes of 2 more bits, all unbiased.

At unit root mean square, coordinates of a randomly rotated row are nearly Gaussian. The base code
is a uniform quantiser k in 0 .. 2^b - 1 that stands for scale * step * (k - (2^b - 1)/2); the scale
of a row makes <code, row> = ||row||^2. Plane j adds fine * step / 4^j with fine in -1.5 .. 1.5
around the value so far. Plain rounding there would shorten the code (an optimal quantiser's output
is shorter than its input, by 2.5 % at 3 bits, which is 0.3 sigma for a winning row): its thresholds
are moved down by a fraction of a step, fitted so that <code, row> = ||row||^2 on average again.
"""

import dataclasses

import torch
from torch import Tensor

_STEP = {1: 2.507, 2: 1.25, 4: 0.38}
"""Base step in units of the root mean square, by base bits. 1 bit: the scale is then the root mean
square; else a little wider than best for the base alone, for the planes (docs/log.md)."""
_FIT_STEPS = 12


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """What the rows of one segment share.

    Args:
        bits: of the base.
        step: of the base at unit root mean square.
        rounding: for each plane, what is added before the floor, 0.5 or a little more.
    """

    bits: int
    step: float
    rounding: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class CodedSegment:
    """One segment of n rows.

    Args:
        base: `uint8[n, words, 4]` for each run, high bits first.
        refine: `uint8[planes, n, words, 4]`, padded to 4 words.
        scale: `bfloat16[n]`.
        errors: `float32[planes + 1, n]`, squared errors at scale 1, NaN where the scale is zero.
        energy: `float32[n]`, squared length of the whole code at scale 1.
    """

    base: list[Tensor]
    refine: Tensor
    scale: Tensor
    errors: Tensor
    energy: Tensor


def fit_quantizer(values: Tensor, bits: int, planes: int) -> Quantizer:
    """Fit the rounding of each plane on some rows `float32[n, dims]`, by bisection."""
    rounding: tuple[float, ...] = ()
    base = _base(values, bits, _STEP[bits])
    along, rest = values * base.scale, base.rest
    for plane in range(1, planes + 1):
        step, low, high = _STEP[bits] / 4**plane, 0.5, 0.65
        for _ in range(_FIT_STEPS):
            middle = (low + high) / 2
            finer = _finer(rest, _fine(values, rest, step, middle), step)
            low, high = (middle, high) if (along * finer).sum() > 0 else (low, middle)
        rounding += ((low + high) / 2,)
        rest = _finer(rest, _fine(values, rest, step, rounding[-1]), step)
    return Quantizer(bits, _STEP[bits], rounding)


def quantize(values: Tensor, quantizer: Quantizer) -> CodedSegment:
    """Code one segment of n rows, float32[n, dims]."""
    bits, step = quantizer.bits, quantizer.step
    coded = _base(values, bits, step)
    levels, rest = coded.levels.to(torch.uint8), coded.rest
    if bits == 1:
        base = [pack(levels, 1)]
    else:
        base = [pack(levels >> shift & 3, 2) for shift in range(bits - 2, -1, -2)]
    scale = coded.scale[:, 0]
    nonzero = torch.where(scale > 0, 1.0, torch.nan)
    errors = [rest.square().sum(1) * nonzero]
    refine = []
    for plane, rounding in enumerate(quantizer.rounding, start=1):
        fine = _fine(values, rest, step / 4**plane, rounding)
        rest = _finer(rest, fine, step / 4**plane)
        errors.append(rest.square().sum(1) * nonzero)
        words = pack(fine.to(torch.uint8), 2)
        refine.append(torch.nn.functional.pad(words, (0, 0, 0, -words.shape[1] % 4)))
    energy = (coded.unit - rest).square().sum(1) * nonzero
    stacked = torch.stack(refine)
    return CodedSegment(base, stacked, scale.bfloat16(), torch.stack(errors), energy)


def pack(fields: Tensor, width: int) -> Tensor:
    """Fields of `width` bits, uint8[n, dims], to words uint8[n, dims * width / 32, 4]."""
    parts = fields.view(fields.shape[0], -1, 8 // width, 4)
    words = parts[:, :, 0].clone()
    for field in range(1, 8 // width):
        words |= parts[:, :, field] << field * width
    return words


@dataclasses.dataclass(frozen=True)
class _Base:
    """Rows at scale 1, what their base codes leave, and the scale."""

    levels: Tensor  # float32[n, dims], whole numbers
    unit: Tensor  # float32[n, dims]
    rest: Tensor  # float32[n, dims], unit - code
    scale: Tensor  # float32[n, 1], rounded to bf16; 0: a row of zeros


def _base(values: Tensor, bits: int, step: float) -> _Base:
    square = values.square().sum(1, keepdim=True)
    root = (square / values.shape[1]).sqrt()
    top = 2**bits - 1
    levels = values / (torch.where(root > 0, root, 1.0) * step)
    levels = levels.add_((top + 1) / 2).floor_().clamp_(0, top)
    code = (levels - top / 2).mul_(step)
    length = (code * values).sum(1, keepdim=True)
    scale = torch.where(length > 0, square / length, 0.0).bfloat16().float()
    unit = values / torch.where(scale > 0, scale, 1.0)
    return _Base(levels, unit, unit - code, scale)


def _fine(values: Tensor, rest: Tensor, step: float, rounding: float) -> Tensor:
    """Fields 0 to 3 of one plane, rounded away from zero by `rounding`: float32[n, dims]."""
    # a negative value rounds up from `rounding`, a positive one from 1 - rounding
    # tensors: two numbers would come in torch's default dtype
    positive, negative = values.new_tensor([1.5 + rounding, 2.5 - rounding]).unbind()
    offset = torch.where(values >= 0, positive, negative)
    return offset.add_(rest, alpha=1 / step).floor_().clamp_(0, 3)


def _finer(rest: Tensor, fine: Tensor, step: float) -> Tensor:
    """What a plane leaves: float32[n, dims]."""
    return rest.sub(fine, alpha=step).add_(1.5 * step)
