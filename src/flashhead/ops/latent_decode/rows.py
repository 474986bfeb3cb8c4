"""Cached vectors of tokens in few bits: how they are coded, and what a kernel is given.

Coordinates are cut into groups that share one float16 scale, the group's largest magnitude. int4
packs coordinates 2j and 2j + 1 in byte j, low bits first: a group's bytes lie together, so a kernel
reads whole lines, takes one scale a byte, and multiplies even and odd coordinates apart.
"""

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional

from flashhead.errors import FlashHeadError

KINDS = ("bf16", "fp8", "int8", "int4")
_LARGEST = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}
_STORED = {"fp8": torch.uint8, "int8": torch.int8, "int4": torch.uint8}


def quantize(x: Tensor, kind: str, group: int) -> tuple[Tensor, Tensor]:
    """Codes and scales.

    Args:
        x: floating `[..., width]`.
        kind: "fp8", "int8" or "int4".
        group: coordinates that share a scale, even; wider than a row: the row is one group.

    Returns:
        codes uint8 `[..., width / 2]` (int4), int8 or uint8 (fp8) `[..., width]`, each rounded up
        to whole groups; scales float16 `[..., groups]`.
    """
    width, group = x.shape[-1], min(group, x.shape[-1] + x.shape[-1] % 2)
    x = functional.pad(x.float(), (0, -width % group)).unflatten(-1, (-1, group))
    largest = _LARGEST[kind]
    scale = (x.abs().amax(-1) / largest).clamp(2**-24, 65504).half()
    x = (x / scale[..., None].float()).clamp(-largest, largest).flatten(-2)
    if kind == "fp8":
        # bytes: few operations know float8
        return x.to(torch.float8_e4m3fn).view(torch.uint8), scale
    codes = x.round()
    if kind == "int8":
        return codes.to(torch.int8), scale
    nibbles = (codes + 8).to(torch.uint8)
    return nibbles[..., ::2] | (nibbles[..., 1::2] << 4), scale


def dequantize(codes: Tensor, scale: Tensor, width: int, kind: str, dtype: torch.dtype) -> Tensor:
    """The way back: `[..., width]`."""
    if kind == "int4":
        pair = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
        values = pair.float() - 8
    else:
        values = (codes.view(torch.float8_e4m3fn) if kind == "fp8" else codes).float()
    groups = scale.shape[-1]
    values = values.unflatten(-1, (groups, -1)) * scale[..., None].float()
    return values.flatten(-2)[..., :width].to(dtype)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Cached vectors of `width` numbers: `[batch, tokens, ...]`, or `[blocks, block_size, ...]`.

    Args:
        codes: as `quantize` makes them; of kind "bf16" the numbers themselves, in any of bfloat16,
            float16 and float32. The last axis is contiguous.
        width: numbers of one vector.
        kind: one of `KINDS`.
        scale: float16 `[..., groups]`; None with kind "bf16".

    Raises:
        FlashHeadError: codes and scale that do not belong together.
    """

    codes: Tensor
    width: int
    kind: str = "bf16"
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise FlashHeadError(f"kind={self.kind!r}: wanted one of {', '.join(KINDS)}")
        got = f"{self.codes.dtype}{list(self.codes.shape)}"
        if self.codes.dim() != 3 or self.codes.stride(2) != 1:
            raise FlashHeadError(f"codes are {got}: wanted 3 axes, the last contiguous")
        if self.scale is None:
            if self.kind != "bf16":
                raise FlashHeadError(f"kind={self.kind!r} without scales")
            if not self.codes.is_floating_point() or self.codes.shape[2] != self.width:
                raise FlashHeadError(f"rows are {got}: wanted floating [.., .., {self.width}]")
            return
        self._require_scale(got, self.scale)

    def _require_scale(self, got: str, scale: Tensor) -> None:
        if self.kind == "bf16":
            raise FlashHeadError("kind='bf16' has no scales")
        count = scale.shape[-1]
        coded = self.codes.shape[2] * (2 if self.kind == "int4" else 1)
        fits = (
            self.codes.dtype == _STORED[self.kind]
            and scale.dtype == torch.float16
            and scale.shape[:-1] == self.codes.shape[:2]
            and scale.stride(-1) == 1
            and count > 0
            and coded % count == 0
            and self.width <= coded < self.width + coded // count
        )
        if not fits:
            raise FlashHeadError(
                f"codes are {got}, scales {scale.dtype}{list(scale.shape)}: wanted what "
                f"quantize gives for {self.width} numbers in {self.kind}"
            )

    @classmethod
    def of(cls, x: Tensor, kind: str = "bf16", group: int = 64) -> "Rows":
        """Keep floating `[.., .., width]` as `kind`; "bf16" keeps the tensor itself."""
        if kind == "bf16":
            return cls(x, x.shape[-1])
        codes, scale = quantize(x, kind, group)
        return cls(codes, x.shape[-1], kind, scale)

    @property
    def group(self) -> int:
        """Coordinates that share a scale; 0: there are no scales."""
        if self.scale is None:
            return 0
        return self.codes.shape[2] * (2 if self.kind == "int4" else 1) // self.scale.shape[-1]

    @property
    def token_bytes(self) -> int:
        """Bytes that one vector takes."""
        scales = 0 if self.scale is None else self.scale.shape[-1] * self.scale.element_size()
        return self.codes.shape[2] * self.codes.element_size() + scales

    def read(self, dtype: torch.dtype) -> Tensor:
        """The vectors: `[.., .., width]`."""
        if self.scale is None:
            return self.codes.to(dtype)
        return dequantize(self.codes, self.scale, self.width, self.kind, dtype)

    def take(self, index: Tensor) -> "Rows":
        """Some of the first axis, in this order, as `[len(index), ...]`."""
        scale = None if self.scale is None else self.scale[index]
        return Rows(self.codes[index], self.width, self.kind, scale)
