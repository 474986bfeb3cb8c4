"""Mean of a table of positions x rows, and a standard error that knows they are crossed.

All rows of a position share its query, and a row's coding error is the same at all positions, so
n * V entries are far fewer independent ones. The variance of the mean is the one clustered both
ways (Cameron, Gelbach & Miller 2011): that of the positions' means, plus that of the rows' means,
less that of independent entries, and never below the last. Neighbouring positions of a text are
taken as independent.
"""

import dataclasses
import math

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Figure:
    """A measured value and its standard error."""

    value: float
    stderr: float


class CrossedMean:
    """Mean of a table of positions x rows that arrives by positions.

    Args:
        rows: V.
    """

    def __init__(self, rows: int) -> None:
        self._by_position: list[Tensor] = []
        self._by_row = torch.zeros(rows, dtype=torch.float64)
        self._squares = 0.0

    def add(self, entries: Tensor) -> None:
        """Add entries `float64[n, V]`."""
        self._by_position.append(entries.mean(1))
        self._by_row += entries.sum(0)
        self._squares += float(torch.linalg.vector_norm(entries)) ** 2

    def figure(self) -> Figure:
        """The mean; at least two positions."""
        positions = torch.cat(self._by_position)
        n, rows = len(positions), len(self._by_row)
        mean = float(positions.mean())
        of_positions = float(positions.var()) / n
        of_rows = float((self._by_row / n).var()) / rows if rows > 1 else 0.0
        independent = max(0.0, self._squares / (n * rows) - mean**2) / (n * rows)
        variance = max(of_positions + of_rows - independent, independent)
        return Figure(mean, math.sqrt(variance))
