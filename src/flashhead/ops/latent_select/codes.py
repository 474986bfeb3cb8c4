"""Keys in 1, 2 or 4 bits a number, good enough to rank tokens by their scores.

A key is turned by one random rotation, which spreads its strong coordinates, and rounded to uniform
mid-rise codes whose step fits a Gaussian number. Its one float16 scale makes the code's projection
onto the key as long as the key, s = |k|^2 / code.k, so that estimates of scores are unbiased
(RaBitQ, arXiv 2405.12497). Bytes a key: dim * bits / 8 + 2.
"""

import dataclasses
import functools

import torch
from torch import Tensor
from torch.nn import functional

from flashhead.errors import FlashHeadError
from flashhead.ops.latent_select.options import BITS

STEPS = {1: 1.5956, 2: 0.9957, 4: 0.3352}
"""In root mean squares of a key: smallest mean square error of a Gaussian (Max, 1960)."""


@functools.cache
def rotation(dim: int, device: torch.device) -> Tensor:
    """The rotation of keys and queries: orthogonal float32 `[dim, dim]`, the same everywhere."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(noise)
    # signs differ between implementations of QR
    return (q * r.diagonal().sign()).float().to(device)


def code_bytes(dim: int, bits: int) -> int:
    """Bytes of one key's code, without its scale."""
    return -(-dim * bits // 8)


def encode(keys: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales.

    Args:
        keys: floating `[..., dim]`.
        bits: 1, 2 or 4.

    Returns:
        uint8 `[..., code_bytes]` (the first coordinates in the lowest bits), float16 `[...]`.
    """
    dim, middle = keys.shape[-1], (2**bits - 1) / 2
    turned = keys.float() @ rotation(dim, keys.device)
    step = turned.square().mean(-1, keepdim=True).sqrt().clamp_min(2**-24) * STEPS[bits]
    codes = (turned / step + middle).round().clamp(0, 2**bits - 1)
    overlap = ((codes - middle) * turned).sum(-1)
    # a key of zeros has a scale of 0
    scale = turned.square().sum(-1) / overlap.clamp_min(2**-24)
    per_byte = 8 // bits
    packed = functional.pad(codes.to(torch.uint8), (0, -dim % per_byte)).unflatten(
        -1, (-1, per_byte)
    )
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=keys.device)
    return (packed << shifts).sum(-1, dtype=torch.uint8), scale.clamp_max(65504).half()


@dataclasses.dataclass(frozen=True)
class KeyCodes:
    """Codes of cached keys.

    Args:
        codes: uint8 `[batch, tokens, groups, code_bytes]`; a group of heads shares its keys.
        scale: float16 `[batch, tokens, groups]`.
        dim: numbers of a key.
        bits: of each.

    Raises:
        FlashHeadError: codes and scales that do not belong together.
    """

    codes: Tensor
    scale: Tensor
    dim: int
    bits: int

    def __post_init__(self) -> None:
        fits = (
            self.bits in BITS
            and self.codes.dim() == 4
            and self.codes.dtype == torch.uint8
            and self.codes.shape[3] == code_bytes(self.dim, self.bits)
            and self.scale.dtype == torch.float16
            and self.scale.shape == self.codes.shape[:3]
        )
        if not fits:
            raise FlashHeadError(
                f"key codes are {self.codes.dtype}{list(self.codes.shape)}, scales "
                f"{self.scale.dtype}{list(self.scale.shape)}: wanted what encode gives for keys of "
                f"{self.dim} numbers in {self.bits} bits"
            )

    @classmethod
    def of(cls, keys: Tensor, bits: int) -> "KeyCodes":
        """Code floating `[batch, tokens, groups, dim]`."""
        if bits not in BITS:
            raise FlashHeadError(f"bits={bits!r}: wanted 1, 2 or 4")
        return cls(*encode(keys, bits), keys.shape[-1], bits)

    @property
    def token_bytes(self) -> int:
        """Bytes that the keys of one token take, of all groups."""
        return self.codes.shape[2] * (self.codes.shape[3] + 2)

    def read(self) -> Tensor:
        """The coded keys, still rotated: float32 `[batch, tokens, groups, dim]`."""
        shifts = torch.arange(0, 8, self.bits, dtype=torch.uint8, device=self.codes.device)
        fields = (self.codes.unsqueeze(-1) >> shifts) & (2**self.bits - 1)
        values = fields.flatten(-2)[..., : self.dim].float() - (2**self.bits - 1) / 2
        return values * self.scale.float().unsqueeze(-1)
