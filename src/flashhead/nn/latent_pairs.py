"""Which rotary pair each kept component of a decoupled key turns with."""

import torch
from torch import Tensor


class Pairs:
    """Pairs of components in order, as tensors that are copied to a device once.

    Args:
        counts: components kept of each pair.
    """

    def __init__(self, counts: tuple[int, ...]) -> None:
        self._counts = counts
        self._held: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return sum(self._counts)

    def index(self, device: torch.device) -> Tensor:
        """Pair of each component: `int64[components]`."""
        return self._on(device)[0]

    def place(self, like: Tensor) -> Tensor:
        """One where a component is of a pair: `[components, pairs]`, in the dtype of `like`."""
        return self._on(like.device)[1].to(like.dtype)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._held is None or self._held[0].device != device:
            # kept for training too, which takes no inference tensors
            with torch.inference_mode(False):
                counts = torch.tensor(self._counts, device=device)
                index = torch.arange(len(counts), device=device).repeat_interleave(counts)
                place = torch.nn.functional.one_hot(index, len(counts)).float()
            self._held = index, place
        return self._held
