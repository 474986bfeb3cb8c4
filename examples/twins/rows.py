"""A stream of tokens in rows, in an order that depends on a seed alone."""

import torch
from torch import Tensor

from flashhead.errors import FlashHeadError


class Rows:
    """A stream of tokens in rows of `context` and one more, in an order of its own each epoch.

    Args:
        stream: int32[tokens].
        context: of a row.
        seed: of the order.

    Raises:
        FlashHeadError: less than one row.
    """

    def __init__(self, stream: Tensor, context: int, seed: int = 0) -> None:
        self.stream, self.context, self.seed = stream, context, seed
        self.count = (len(stream) - 1) // context
        if self.count < 1:
            raise FlashHeadError(f"text of {len(stream)} tokens: wanted more than {context}")
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def at(self, index: Tensor) -> Tensor:
        """Rows `int64[n, context + 1]` of these numbers, on the stream's device."""
        places = index.to(self.stream.device)[:, None] * self.context
        return self.stream[places + torch.arange(self.context + 1, device=places.device)].long()

    def batch(self, step: int, rows: int) -> Tensor:
        """Rows of a step; epochs follow each other without a gap."""
        wanted = [divmod(i, self.count) for i in range(step * rows, (step + 1) * rows)]
        return self.at(torch.tensor([int(self._of(epoch)[place]) for epoch, place in wanted]))

    def _of(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.count, generator=generator)
        return self._order
