"""Screening by a low-rank factor of the head (SVD-softmax, Shim et al., NeurIPS 2017).

    W ~ A B,  A: [V, r], B: [r, d],    s = A (B h) for all rows;
    the best K rows are scored exactly, the others keep s.

`svd` is the published one: B holds the best right singular directions of W. `svd-hidden` is the
best that rank r can do for the logits of the model's own hidden states: with C = E[h h'], B holds
the leading right singular vectors of W C^1/2, times C^-1/2 (C = 1 gives the plain one).

A is stored in bf16, or in int8 with one float32 scale a row; B in bf16. A is the regression of the
logits on the stored B, A = W C B' (B C B')^-1, so that rounding B costs nothing but its direction.
Bytes are r/d of the head in bf16, half that in int8; ranks are set by bytes, so that both types are
compared at equal ones.
"""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from flashhead.evaluate.baselines import QuantizedHead, float32_logits, quantize_head, row_blocks
from flashhead.evaluate.measure import Chunk, Family, Figures, Head
from flashhead.evaluate.probed import row_bytes

FRACTIONS = (1 / 16, 1 / 8, 1 / 4)
"""Of the head's bytes, for the factor A."""
RESCORED = (1024, 128)
"""Rows of the head for one that is scored exactly: V / 1,024 and V / 128 of them."""

RIDGE = 0.01
"""Share of the mean variance that the second moment of hidden states gets in every direction."""


@dataclasses.dataclass(frozen=True)
class LowRank:
    """A factor of the head.

    Args:
        rows: A, `bfloat16[V, r]` or rounded to int8.
        basis: B, `bfloat16[r, d]`.
        bias: `bf16/f32[V]` or None.
    """

    rows: Tensor | QuantizedHead
    basis: Tensor
    bias: Tensor | None

    @property
    def bytes_read(self) -> int:
        """Bytes of both factors and the bias, read for every token."""
        bias = 0 if self.bias is None else self.bias.nbytes
        factor = self.rows.bytes_read if isinstance(self.rows, QuantizedHead) else self.rows.nbytes
        return factor + self.basis.nbytes + bias

    def logits(self, hidden: Tensor) -> Tensor:
        """Low-rank logits `float32[n, V]` of `bf16/f32[n, d]`."""
        latent = hidden.float() @ self.basis.float().T
        if isinstance(self.rows, QuantizedHead):
            logits = self.rows.logits(latent)
        else:
            logits = float32_logits(latent, self.rows)
        return logits if self.bias is None else logits.add_(self.bias.float())


def low_rank(
    weight: Tensor,
    directions: Tensor,
    second_moment: Tensor,
    rank: int,
    dtype: str,
    bias: Tensor | None = None,
) -> LowRank:
    """Factor a head.

    Args:
        weight: `bf16/f32[V, d]`.
        directions: of `screening_directions(weight, second_moment)`.
        second_moment: C, `float64[d, d]`.
        rank: r, 1 to d.
        dtype: of A, "bf16" or "int8".
        bias: `bf16/f32[V]` or None.
    """
    weight = weight.detach()
    basis = directions[:rank].bfloat16()
    moved = second_moment @ basis.double().T
    inverse = (moved @ torch.linalg.inv(basis.double() @ moved)).float()  # [d, r]
    rows = torch.cat([weight[block].float() @ inverse for block in row_blocks(*weight.shape)])
    stored = rows.bfloat16() if dtype == "bf16" else quantize_head(rows, 8)
    return LowRank(stored, basis, bias)


def screening_directions(weight: Tensor, second_moment: Tensor) -> Tensor:
    """B at full rank, the strongest direction first: float64[d, d].

    Args:
        weight: `bf16/f32[V, d]`.
        second_moment: C, `float64[d, d]`, positive definite.
    """
    weight = weight.detach()
    gram = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
    for block in row_blocks(*weight.shape):
        rows = weight[block].float()
        gram += (rows.T @ rows).double()
    values, vectors = torch.linalg.eigh(second_moment)
    root = vectors * values.sqrt() @ vectors.T
    strongest = torch.linalg.eigh(root @ gram @ root).eigenvectors.flip(1)
    return strongest.T @ (vectors * values.rsqrt() @ vectors.T)


def hidden_second_moment(states: Tensor) -> Tensor:
    """C of hidden states `[n, d]`, plus a share of its mean variance everywhere: float64[d, d]."""
    states = states.double()
    moment = states.T @ states / len(states)
    d = moment.shape[0]
    return moment + RIDGE * moment.trace() / d * torch.eye(d, dtype=torch.float64)


def low_rank_family(name: str, head: Head, second_moment: Tensor) -> Family:
    """Rows `<name>-<dtype>-r<r>-k<K>` at several shares of the head's bytes."""
    vocab_size, d = head.weight.shape
    directions = screening_directions(head.weight, second_moment)
    factors = {}
    for dtype, dims_a_share in (("bf16", d), ("int8", 2 * d)):
        for fraction in FRACTIONS:
            rank = max(1, round(fraction * dims_a_share))
            factors[dtype, rank] = low_rank(
                head.weight, directions, second_moment, rank, dtype, head.bias
            )
    counts = sorted({max(1, vocab_size // one_of) for one_of in RESCORED})

    def measure(chunk: Chunk) -> Iterator[tuple[str, Figures]]:
        for (dtype, rank), factor in factors.items():
            logits = factor.logits(chunk.hidden)
            best = logits.topk(counts[-1], dim=1).indices
            for K in counts:
                tokens = best[:, :K]
                logits.scatter_(1, tokens, chunk.exact.gather(1, tokens))
                read = torch.full((len(logits),), factor.bytes_read + K * row_bytes(head))
                row = f"{name}-{dtype}-r{rank}-k{K}"
                number = torch.full((len(logits),), K)
                yield row, chunk.compare(row, logits, read, candidates=number)

    rows = {
        f"{name}-{dtype}-r{rank}-k{K}": (f"{name}-{dtype}-k{K}", f"r={rank}")
        for dtype, rank in factors
        for K in counts
    }
    return Family(name, rows, measure)
