"""Select in eager torch: the specification (rule and formula in api.py)."""

import torch
from torch import Tensor

BINS = 1024
BINS_A_NAT = 16.0


def cut_bin(mass: Tensor, loss: Tensor, budget: float) -> int:
    """First bin whose rows may all stay at their estimate.

    Args:
        mass: `float64[BINS]`, number of rows by bin.
        loss: `float64[BINS]`, sum of their half variances.
        budget: nats.
    """
    height = torch.exp(-(torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS_A_NAT)
    tail = (loss * height).flip(0).cumsum(0).flip(0)  # loss of the rows in this bin and below
    allowed = tail <= budget * (mass * height).sum()
    return int((~allowed).sum())


def select(estimates: Tensor, variances: Tensor, z: float, budget: float) -> tuple[Tensor, float]:
    """Positions to look at more closely (int64[k], ascending) and the upper bound of all others."""
    spread = z * variances.sqrt()
    lower = (estimates - spread).max()
    bins = ((estimates.max() - estimates) * BINS_A_NAT).clamp_max(BINS - 1).long()
    mass = torch.bincount(bins, minlength=BINS).double()
    loss = torch.bincount(bins, weights=variances.double() / 2, minlength=BINS)
    chosen = (bins < cut_bin(mass, loss, budget)) | (estimates + spread >= lower)
    rest = (estimates + spread)[~chosen]
    return chosen.nonzero()[:, 0], float(rest.max()) if rest.numel() else float("-inf")
