"""Probe in eager torch: the specification, on any device."""

import torch
from torch import Tensor


def cluster_scores(
    hidden: Tensor, centroids: Tensor, scale: Tensor, offset: Tensor, common: Tensor
) -> Tensor:
    """h.common + scale_j * (h.centroids_j) + offset_j: float32[n, C] of hidden float32[n, d]."""
    if centroids.dtype == torch.uint8:
        centroids = unpack_int4(centroids, hidden.shape[1])
    return (hidden @ centroids.float().T) * scale + offset + (hidden @ common)[:, None]


def unpack_int4(packed: Tensor, d: int) -> Tensor:
    """Packed int4 `uint8[C, ceil(d/2)]` to `int8[C, d]` (layout: `index.clusters`)."""
    halves = torch.cat([packed & 15, packed >> 4], 1)[:, :d]
    return halves.to(torch.int8) - 8


def candidate_rows(members: Tensor, clusters: Tensor, always: Tensor) -> Tensor:
    """Members of these clusters and `always`, ascending, each once, without padding: int32[r]."""
    rows = torch.cat([members[clusters].flatten(), always]).sort().values
    rows = torch.unique_consecutive(rows)
    return rows[1:] if len(rows) and rows[0] < 0 else rows


def estimates(scores: Tensor, cluster_of: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """score_j * scale_j + offset_j of every token's cluster j: float32[n, V]."""
    return (scores * scale + offset).index_select(1, cluster_of)


def estimated_tokens(members: Tensor, always: Tensor) -> Tensor:
    """Lowest token of each cluster that is not in `always`, -1 if there is none: int32[C]."""
    none = torch.iinfo(members.dtype).max
    left_out = (members < 0) | torch.isin(members, always)
    lowest = members.masked_fill(left_out, none).amin(1)
    return lowest.masked_fill(lowest == none, -1)
