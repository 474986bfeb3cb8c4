"""What a search of the head returns."""

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class HeadOutput:
    """Logits of n hidden states and what they cost.

    Args:
        logits: `float32[n, V]`, complete: exact for the candidates, estimates for the rest.
        candidates: `int64[n]`, rows of the head scored exactly.
        certified: `bool[n]`, whether no other row can beat the argmax, at the z of the index.
        bytes_read: `int64[n]`, bytes of head and index read for this row if it were alone, counted.
    """

    logits: Tensor
    candidates: Tensor
    certified: Tensor
    bytes_read: Tensor


@dataclasses.dataclass
class HeadStatistics:
    """Counters since the last reset: rows of hidden states and what their search read."""

    rows: int = 0
    dense_rows: int = 0
    candidates: int = 0
    certified: int = 0
    bytes_read: int = 0

    def reset(self) -> None:
        """Set every counter to zero."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, 0)

    def add(self, output: HeadOutput) -> None:
        """Count a search."""
        self.rows += output.logits.shape[0]
        self.candidates += sum(output.candidates.tolist())
        self.certified += sum(output.certified.tolist())
        self.bytes_read += sum(output.bytes_read.tolist())

    def add_dense(self, rows: int, row_bytes: int) -> None:
        """Count rows that took the dense product, which reads the whole head for each alone."""
        self.rows += rows
        self.dense_rows += rows
        self.bytes_read += rows * row_bytes
