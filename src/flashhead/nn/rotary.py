"""Rotary angles by index, shared by all layers that turn alike.

A score depends only on the distance of its two tokens, and unmasked tokens of a row are
consecutive, so a token's place in the cache can stand for its position: left padding moves both by
the same.
"""

import torch
from torch import Tensor


class RotaryTable:
    """Cosines and sines of every index, made when first needed (arXiv 2104.09864).

    Args:
        frequencies: float32[pairs], radians a token. Pairs are halves: i turns with i + pairs.
        scale: both are multiplied by it (YaRN's attention factor).
    """

    def __init__(self, frequencies: Tensor, scale: float = 1.0) -> None:
        # a model on the meta device only has sizes
        self.frequencies = frequencies.detach().float()
        if not frequencies.is_meta:
            self.frequencies = self.frequencies.cpu()
        self.scale = float(scale)
        self._cos = self._sin = torch.empty(0, len(frequencies))

    @classmethod
    def of_base(cls, dim: int, base: float = 10000.0) -> "RotaryTable":
        """The usual geometric frequencies of `dim` rotated coordinates."""
        return cls(base ** -(torch.arange(0, dim, 2).float() / dim))

    def at(self, start: int, stop: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of indexes [start, stop), in the dtype and on the device of `like`.

        Returns:
            two of `[stop - start, pairs]`.
        """
        if len(self._cos) < stop or self._cos.device != like.device:
            length = max(256, 1 << (stop - 1).bit_length(), len(self._cos))
            # the model's own tables are float32 too: the same rounding, the same logits
            index = torch.arange(length, device=like.device).float()
            angles = index[:, None] * self.frequencies.to(like.device)
            self._cos, self._sin = angles.cos() * self.scale, angles.sin() * self.scale
        return self._cos[start:stop].to(like.dtype), self._sin[start:stop].to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first 2 * pairs coordinates of `x`, leave the rest.

    Args:
        x: floating `[..., tokens, dim]`.
        cos: `[tokens, pairs]`.
        sin: `[tokens, pairs]`.
    """
    pairs = cos.shape[-1]
    re, im, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return torch.cat((re * cos - im * sin, im * cos + re * sin, rest), -1)
