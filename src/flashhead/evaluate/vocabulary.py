"""What the rows of a head and the hidden states of a text are like: what helps a codes index.

norms        one scale a row serves rows of unlike norms, but errors grow with the norm: a few
             long rows are candidates more often
mean share   share of sum ||h||^2 along the direction that the index stores exactly: it costs
             no bits
dimension    participation ratio (sum l)^2 / sum l^2 of the variances l_i of a logit in the
             eigenbasis of C^1/2 S C^1/2 (C: hidden states less that direction, S: rows): d for
             a flat spectrum, where the bits of transform coding gain nothing
"""

import dataclasses

import torch
from torch import Tensor

from flashhead.evaluate.baselines import row_blocks
from flashhead.index.calibrate import hidden_moments

PERCENTILES = (0, 1, 25, 50, 75, 99, 100)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Figures of one head and one text.

    Args:
        rows: V.
        dimensions: d.
        norms: percentiles of the rows' norms, in the order of `PERCENTILES`.
        zero_rows: rows that are all zero.
        duplicate_rows: rows that equal an earlier one, zero rows included.
        mean_share: share of the energy along the exact direction, 0 to 1.
        effective_dimension: participation ratio, 1 to d.
    """

    rows: int
    dimensions: int
    norms: tuple[float, ...]
    zero_rows: int
    duplicate_rows: int
    mean_share: float
    effective_dimension: float


def vocabulary(weight: Tensor, direction: Tensor, hidden: Tensor) -> Vocabulary:
    """Look at a head.

    Args:
        weight: `bf16/f16/f32[V, d]`.
        direction: `float32[d]`, unit vector of the exact coefficient (`index.exact[0]`).
        hidden: floating `[n, d]`, hidden states of a text.
    """
    weight = weight.detach()
    blocks = list(row_blocks(*weight.shape))
    norms = torch.cat([weight[block].float().norm(dim=1) for block in blocks]).sort().values
    places = [round(p / 100 * (len(norms) - 1)) for p in PERCENTILES]
    states = hidden.double()
    along = (states @ direction.double()).square().sum()
    energy = states.square().sum()
    return Vocabulary(
        rows=weight.shape[0],
        dimensions=weight.shape[1],
        norms=tuple(norms[places].tolist()),
        zero_rows=int((norms == 0).sum()),
        duplicate_rows=len(norms) - _distinct_rows(weight),
        mean_share=float(along / energy) if energy > 0 else 0.0,
        effective_dimension=_participation(_spectrum(weight, hidden)),
    )


def _distinct_rows(weight: Tensor) -> int:
    """Number of distinct rows, by a random 64-bit fingerprint of each."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.int32 if weight.element_size() == 4 else torch.int16
    keys = torch.randint(-(2**62), 2**62, (weight.shape[1],), generator=generator)
    prints = []
    for block in row_blocks(*weight.shape):
        bits = (weight[block] + 0.0).view(kind).long()  # + 0.0: one zero, without its sign
        prints.append((bits * keys).sum(1))  # modulo 2^64
    return len(torch.cat(prints).unique())


def _spectrum(weight: Tensor, hidden: Tensor) -> Tensor:
    """Variances of a logit by eigendirection, ascending: float64[d - 1]."""
    rows = weight.shape[0]
    blocks = list(row_blocks(*weight.shape))
    mean = torch.stack([weight[block].double().sum(0) for block in blocks]).sum(0) / rows
    moments = hidden_moments(hidden, mean)
    values, vectors = torch.linalg.eigh(moments.second_moment)
    half = (moments.complement @ (vectors * values.clamp_min(0).sqrt())).float()
    inner = torch.zeros(half.shape[1], half.shape[1], dtype=torch.float64)
    for block in blocks:
        part = (weight[block].float() - mean.float()) @ half
        inner += (part.T @ part).double()
    return torch.linalg.eigvalsh(inner / rows).clamp_min(0)


def _participation(variances: Tensor) -> float:
    squares = float(variances.square().sum())
    return float(variances.sum()) ** 2 / squares if squares > 0 else 0.0
