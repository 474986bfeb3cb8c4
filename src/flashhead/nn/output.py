"""What a search of the head returns."""

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class HeadOutput:
    """Logits of n hidden states and what they cost.

    Args:
        logits: `float32[n, V]`, complete: exact for the candidates, estimates for the rest.
        tokens: `int64[n]`, the argmax.
        candidates: `int64[n]`, rows of the head scored exactly.
        certified: `bool[n]`, whether no other row can beat the argmax, but for the failure
            probability.
        fallback: `bool[n]`, whether so many rows could win that all were scored exactly.
        bytes_read: `int64[n]`, bytes of head and index read for this row if it were alone, counted.
        upper: `float32[n]`, no row but the candidates has a larger logit, but for the failure
            probability; or None.
        exact: for each hidden state the rows scored exactly, `int32[k]` ascending, or None.
    """

    logits: Tensor
    tokens: Tensor
    candidates: Tensor
    certified: Tensor
    fallback: Tensor
    bytes_read: Tensor
    upper: Tensor | None = None
    exact: list[Tensor] | None = None


@dataclasses.dataclass(frozen=True)
class NextToken:
    """The next tokens of n hidden states, with their certificates.

    Args:
        tokens: `int64[n]`.
        certified: `bool[n]`: the token is the one the dense float32 head gives, but for the failure
            probability.
        fallback: `bool[n]`, whether the dense product had to complete the row.
        candidates: `int64[n]`, rows of the head scored exactly.
        bytes_read: `int64[n]`, bytes of head and index read for this row if it were alone, counted.
    """

    tokens: Tensor
    certified: Tensor
    fallback: Tensor
    candidates: Tensor
    bytes_read: Tensor


@dataclasses.dataclass(frozen=True)
class LogProbs:
    """Log-probabilities of given tokens.

    Args:
        values: `float32[n]`, natural logarithms.
        stderr: `float32[n]`, standard error of the normaliser's estimate, nats; the token's own
            logit is exact. NaN: not known, as no rows were drawn.
        logits: `float32[n]`, exact logits of the tokens.
        log_z: `float32[n]`, log of the normaliser.
    """

    values: Tensor
    stderr: Tensor
    logits: Tensor
    log_z: Tensor


@dataclasses.dataclass
class HeadStatistics:
    """Counters since the last reset: rows of hidden states and what their search read."""

    rows: int = 0
    dense_rows: int = 0
    candidates: int = 0
    certified: int = 0
    fallback: int = 0
    bytes_read: int = 0

    def reset(self) -> None:
        """Set every counter to zero."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, 0)

    def add(self, output: HeadOutput | NextToken) -> None:
        """Count a search."""
        self.rows += len(output.tokens)
        for name in ("candidates", "certified", "fallback", "bytes_read"):
            setattr(self, name, getattr(self, name) + sum(getattr(output, name).tolist()))

    def add_counts(
        self, rows: int, certified: int, fallback: int, candidates: int, bytes_read: int
    ) -> None:
        """Count searches that were counted elsewhere."""
        self.rows += rows
        self.certified += certified
        self.fallback += fallback
        self.candidates += candidates
        self.bytes_read += bytes_read

    def add_dense(self, rows: int, row_bytes: int) -> None:
        """Count rows that took the dense product, which reads the whole head for each alone."""
        self.rows += rows
        self.dense_rows += rows
        self.bytes_read += rows * row_bytes
