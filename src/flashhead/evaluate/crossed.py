"""Means of errors by position and row, and standard errors that know what is shared.

All rows of a position share its query, and a row's coding error is the same at all positions, so
n * V entries are far fewer independent ones. The variance of the mean is the one clustered both
ways (Cameron, Gelbach & Miller 2011): that of the positions' means, plus that of the rows' means,
less that of independent entries, and never below the last. Neighbouring positions of a text are
taken as independent.

Of one entry a position, those that stand for the same row share its coding error: clustered by row.
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


def grouped_mean(values: Tensor, rows: Tensor) -> Figure:
    """Mean of values `float64[n]`, n >= 2, of which those with equal `rows: int64[n]` depend."""
    n, mean = len(values), float(values.mean())
    _, group = rows.unique(return_inverse=True)
    groups = int(group.max()) + 1
    rest = torch.zeros(groups, dtype=torch.float64).index_add_(0, group, values - mean)
    independent = float(values.var()) / n
    clustered = float(rest.square().sum()) / n**2 * groups / max(1, groups - 1)
    return Figure(mean, math.sqrt(max(clustered, independent)))
