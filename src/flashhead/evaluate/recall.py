"""How deep in an index's ranking the true winner lies.

The rank of a token is one more than the number of rows (or clusters) that an index scores above
it. Recall at a depth is the share of positions whose float32 winner has at most this rank: what a
search that always took so many rows would find.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from flashhead.evaluate.baselines import float32_logits
from flashhead.evaluate.estimates import Estimates, stage_names
from flashhead.index.clusters import ClustersIndex
from flashhead.ops.dispatch import resolve_impl
from flashhead.ops.probe.api import probe

DEPTHS = (1, 4, 16, 64, 256, 1024, 4096)
RECALLS = (0.95, 0.99, 0.999)
CHUNK_ROWS = 16


@dataclasses.dataclass(frozen=True)
class Recall:
    """Ranks of the float32 winner by stage of a codes index.

    Args:
        ranks: `int64[S, n]`, rank among the scan's estimates, then once every row has each plane.
    """

    ranks: Tensor

    def document(self) -> dict[str, Any]:
        """JSON-able: recall at every depth, by stage."""
        stages, positions = self.ranks.shape
        names = stage_names(stages)
        curves = {name: recall_at(own) for name, own in zip(names, self.ranks, strict=True)}
        return {"positions": positions, "depths": list(DEPTHS), "stages": curves}


def winner_ranks(chunk: Estimates) -> Tensor:
    """Ranks of the float32 winners of a chunk: int64[S, n], by stage."""
    winner = chunk.truth.argmax(1)[None, :, None].expand(len(chunk.estimate), -1, -1)
    return (chunk.estimate > chunk.estimate.gather(2, winner)).sum(2) + 1


def recall_at(ranks: Tensor, depths: Iterable[int] = DEPTHS) -> list[float]:
    """Share of ranks `int64[n]` that are at most each depth."""
    return [(ranks <= depth).double().mean().item() for depth in depths]


def depth_for(ranks: Tensor, recall: float) -> int | None:
    """Least depth with this recall; None if the positions are too few to tell.

    Args:
        ranks: `int64[n]`.
        recall: below 1; it takes n >= 1 / (1 - recall) positions.
    """
    if len(ranks) * (1 - recall) < 1 - 1e-9:  # 1 - 0.999 is a little less than 0.001
        return None
    return int(ranks.sort().values[math.ceil(recall * len(ranks) - 1e-9) - 1])


def cluster_ranks(
    index: ClustersIndex,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    *,
    impl: str = "auto",
) -> Tensor:
    """Rank of the winner's cluster among all: the probes its position needs, int64[n].

    Args:
        index: clusters of `weight`.
        weight: floating `[V, d]`.
        bias: floating `[V]` or None.
        hidden: floating `[n, d]`.
        impl: "auto", "cpu" or "reference".
    """
    impl = resolve_impl(impl, weight.device)
    ranks = []
    for states in hidden.split(CHUNK_ROWS):
        scores, _ = probe(
            states,
            index.centroids,
            index.centroid_scale,
            index.centroid_offset,
            index.common,
            1,
            impl=impl,
        )
        winner = float32_logits(states, weight.detach(), bias).argmax(1)
        own = scores.gather(1, index.cluster_of[winner].long()[:, None])
        ranks.append((scores > own).sum(1) + 1)
    return torch.cat(ranks)


def clusters_document(index: ClustersIndex, ranks: Tensor) -> dict[str, Any]:
    """JSON-able: the probes that each recall needs, null where the positions cannot tell."""
    return {
        "clusters": index.clusters,
        "cluster_size": index.options.cluster_size,
        "positions": len(ranks),
        "probes_for_recall": {str(recall): depth_for(ranks, recall) for recall in RECALLS},
    }
