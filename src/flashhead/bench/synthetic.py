"""A head without a model: rows and hidden states whose scores are spread as a real head's are.

What a search reads depends on how logits are distributed, not on what tokens mean:

    row_v    = scale_v * (sqrt(1 - 0.4) own_v + sqrt(0.4) shared_c(v)) * lambda^1/2 Q + small r + m
    hidden_i = noise_i Q + mean direction, its part along the target row raised

Q is a random basis of what is orthogonal to the mean direction r; lambda_k falls as a power of k
(`DECAYS`), 64 rows share a direction, norms are log-normal (0.2), logits have a
standard deviation of 3, r holds 30 % of a hidden state's energy. Each hidden state then turns to a
target row, 4.5-8 of these standard deviations above the mean logit, mostly 4.5-5.5, and takes the
rows that resemble it along. On such rows times and bytes mean something; agreement does not.
"""

import dataclasses

import torch
from torch import Tensor

from flashhead.bench.shapes import SHAPES
from flashhead.errors import FlashHeadError

DECAYS = ((640, 1.2), (1024, 1.2), (1152, 1.45), (2048, 1.35), (3072, 1.4))
"""Decay of the spectrum from so many dimensions on. At these about as many rows survive the scan as
on real heads: mean 1,400, median 300, 90 % below 3,000 (Gemma-3-270M, Qwen2.5-Coder-0.5B)."""
LOGIT_SPREAD = 3.0
MEAN_SHARE = 0.3
CLUSTER_ROWS, SHARED = 64, 0.4
NORM_SPREAD = 0.2
LEAST_TARGET, MORE_TARGET = 4.5, 3.5
"""Standard deviations of the target's logit: the least, and what u^2 of a uniform u adds."""
_CHUNK_ROWS = 2**14


@dataclasses.dataclass(frozen=True)
class Problem:
    """A head and hidden states to time it with, all on one device.

    Args:
        name: of the model or the shape.
        weight: `bf16[V, d]`.
        calibration: `bf16[m, d]`, hidden states that shape the index.
        hidden: `bf16[n, d]`, other hidden states, to verify and time with.
        synthetic: whether rows and states are made up.
    """

    name: str
    weight: Tensor
    calibration: Tensor
    hidden: Tensor
    synthetic: bool


def decay_of(d: int) -> float:
    """Decay of the spectrum of a head of d dimensions."""
    return max((own for own in DECAYS if own[0] <= d), default=DECAYS[0])[1]


def shape_of(name: str) -> tuple[int, int]:
    """Rows and dimensions of a known shape; FlashHeadError names the known ones."""
    if name not in SHAPES:
        raise FlashHeadError(f"shape {name!r}: wanted one of {', '.join(SHAPES)}")
    return SHAPES[name]


@torch.no_grad()
def make_problem(
    name: str,
    shape: tuple[int, int],
    *,
    states: int,
    calibration: int,
    device: str = "cpu",
    seed: int = 0,
) -> Problem:
    """Make a head of `shape` (V, d) and its hidden states; equal seeds give equal ones on a device.

    Args:
        name: what the document calls it.
        shape: rows V and dimensions d, d at least 2.
        states: hidden states n to verify and time with.
        calibration: hidden states m to build the index from.
        device: where everything is made.
        seed: of all of it.
    """
    rows, d = shape
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    variances = torch.arange(1, d, dtype=torch.float64, device=device) ** -decay_of(d)
    root = (variances / variances.sum()).sqrt().float() * LOGIT_SPREAD
    rotation = torch.linalg.qr(normal(d, d))[0]
    direction, basis = rotation[:, 0], rotation[:, 1:].T.contiguous()  # [d], [d - 1, d]
    mean = 0.02 * normal(d)
    shared = SHARED**0.5 * normal(-(-rows // CLUSTER_ROWS), d - 1)
    weight = torch.empty(rows, d, dtype=torch.bfloat16, device=device)
    for start in range(0, rows, _CHUNK_ROWS):
        ids = torch.arange(start, min(rows, start + _CHUNK_ROWS), device=device)
        own = (1 - SHARED) ** 0.5 * normal(len(ids), d - 1) + shared[ids // CLUSTER_ROWS]
        own *= root * torch.exp(NORM_SPREAD * normal(len(ids), 1))
        along = 0.015 * normal(len(ids), 1) * direction
        weight[start : start + _CHUNK_ROWS] = (own @ basis + along + mean).bfloat16()
    count = states + calibration
    targets = torch.randint(rows, (count,), generator=generator, device=device)
    uniform = torch.rand(count, 1, generator=generator, device=device)
    wanted = LOGIT_SPREAD * (LEAST_TARGET + MORE_TARGET * uniform.square())
    hidden = _towards(normal(count, d - 1), (weight[targets].float() - mean) @ basis.T, wanted)
    level = (MEAN_SHARE / (1 - MEAN_SHARE) * d) ** 0.5
    found = (hidden @ basis + level * direction).bfloat16()
    return Problem(name, weight, found[states:], found[:states], synthetic=True)


def _towards(noise: Tensor, rows: Tensor, wanted: Tensor) -> Tensor:
    """Noise with its part along each row replaced, so that their products are `wanted`."""
    length = rows.norm(dim=1, keepdim=True)
    unit = rows / length
    return noise + (wanted / length - (noise * unit).sum(1, keepdim=True)) * unit
