"""Balanced k-means: every row in a cluster, at most `cluster_size` rows each.

Balance is kept by prices (an auction, Bertsekas 1988): every row bids for its best
cluster at current prices among the nearest few, and a full cluster keeps the highest bids. Products
run in bf16, a block of rows at a time.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from flashhead.options import ClustersOptions

NEAREST = 16
"""Clusters a row may bid for in one auction."""
BID_STEP = 0.02
"""Least raise of a bid, as a share of the rows' mean squared norm."""
AUCTION_ROUNDS = 64
AUCTIONS = 8
"""Auctions among the clusters with free places; rows left over then take places in order."""
_BLOCK_SCORES = 2**25

Advance = Callable[[int], Any]


def balanced_kmeans(features: Tensor, options: ClustersOptions, advance: Advance) -> Tensor:
    """Cluster of every row, at most `cluster_size` rows each: int64[V]."""
    rows, size = len(features), options.cluster_size
    assert size is not None
    generator = torch.Generator().manual_seed(options.seed)
    first = torch.randperm(rows, generator=generator)[: -(-rows // size)]
    centroids = features[first].float()
    norms = torch.stack(
        [block.float().square().sum() for block in features.split(rows_a_block(features.shape[1]))]
    )
    step = BID_STEP * float(norms.sum()) / rows
    cluster_of = torch.zeros(rows, dtype=torch.int64)
    for _ in range(options.iterations):
        cluster_of = _assign(features, centroids, size, step, advance)
        centroids = mean_rows(features, cluster_members(cluster_of, size))
        if options.metric == "spherical":
            centroids = torch.nn.functional.normalize(centroids, dim=1)
    return cluster_of


def _assign(
    features: Tensor, centroids: Tensor, size: int, step: float, advance: Advance
) -> Tensor:
    """Near-best assignment with at most `size` rows a cluster: int64[V]."""
    cluster_of = torch.full((len(features),), -1)
    free = torch.full((len(centroids),), size)
    rows = torch.arange(len(features))
    for attempt in range(AUCTIONS):
        open_clusters = free.nonzero()[:, 0]
        nearest, values = _nearest(
            features, rows, centroids[open_clusters], advance if attempt == 0 else None
        )
        with _one_thread():
            owner = _auction(nearest, values, free[open_clusters], step)
        placed = owner >= 0
        cluster_of[rows[placed]] = open_clusters[owner[placed]]
        free -= torch.bincount(cluster_of[rows[placed]], minlength=len(free))
        rows = rows[~placed]
        if len(rows) == 0:
            return cluster_of
    cluster_of[rows] = torch.repeat_interleave(torch.arange(len(free)), free)[: len(rows)]
    return cluster_of


def _nearest(
    features: Tensor, rows: Tensor, centroids: Tensor, advance: Advance | None
) -> tuple[Tensor, Tensor]:
    """Nearest centroids of these rows, and x.c - |c|^2/2: int64[n, T], float32[n, T]."""
    half = centroids.square().sum(1, keepdim=True) / 2
    high = half.bfloat16()  # two bf16 columns hold |c|^2/2 to 16 bits
    low = (half - high.float()).bfloat16()
    table = torch.cat([centroids.bfloat16(), -high, -low], 1).T
    count = min(NEAREST, len(centroids))
    block_rows = min(len(rows), rows_a_block(len(centroids)))
    scores = torch.empty(block_rows, len(centroids), dtype=torch.bfloat16)  # fresh pages cost more
    indices, values = [], []
    for block in rows.split(block_rows):
        chunk = torch.nn.functional.pad(features[block], (0, 2), value=1.0)
        best = torch.mm(chunk, table, out=scores[: len(block)]).topk(count, dim=1)
        indices.append(best.indices)
        values.append(best.values.float())
        if advance is not None:
            advance(len(block))
    return torch.cat(indices), torch.cat(values)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """For many small steps: on a busy machine, waiting for a second thread costs 30 x the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _auction(nearest: Tensor, values: Tensor, capacity: Tensor, step: float) -> Tensor:
    """Owner cluster of every row, or -1 where the rounds ran out first: int64[n].

    All rows without a cluster bid at once, what keeps a row from its second-best cluster plus
    `step`; a cluster keeps the highest bids, and its price is the lowest one kept once it is full.
    """
    owner = torch.full((len(nearest),), -1)
    paid = torch.zeros(len(nearest), dtype=torch.float32)
    price = torch.zeros(len(capacity), dtype=torch.float32)
    for _ in range(AUCTION_ROUNDS):
        rows = (owner < 0).nonzero()[:, 0]
        if len(rows) == 0:
            break
        options = nearest[rows]
        best = (values[rows] - price[options]).topk(min(2, options.shape[1]), dim=1)
        target = options.gather(1, best.indices[:, :1])[:, 0]
        owner[rows] = target
        paid[rows] = price[target] + best.values[:, 0] - best.values[:, -1] + step
        bidden = torch.zeros(len(capacity), dtype=torch.bool)
        bidden[target] = True
        holders = bidden[owner].nonzero()[:, 0]
        order = holders[paid[holders].argsort(descending=True, stable=True)]
        order = order[owner[order].argsort(stable=True)]
        held = owner[order]
        counts = torch.bincount(held, minlength=len(capacity))
        rank = torch.arange(len(order)) - (counts.cumsum(0) - counts)[held]
        last = rank == capacity[held] - 1
        price[held[last]] = paid[order[last]]
        owner[order[rank >= capacity[held]]] = -1
    return owner


def cluster_members(cluster_of: Tensor, size: int) -> Tensor:
    """Tokens of every cluster in ascending order, then -1: int64[C, size]."""
    rows = len(cluster_of)
    order = cluster_of.argsort(stable=True)
    counts = torch.bincount(cluster_of, minlength=-(-rows // size))
    members = torch.full((len(counts), size), -1)
    held = cluster_of[order]
    members[held, torch.arange(rows) - (counts.cumsum(0) - counts)[held]] = order
    return members


def mean_rows(rows: Tensor, members: Tensor) -> Tensor:
    """Mean of the rows of every cluster: float32[C, k]."""
    means = []
    for block in members.split(rows_a_block(members.shape[1] * max(1, rows.shape[1]))):
        used = block >= 0
        total = (rows[block.clamp_min(0)].float() * used[:, :, None]).sum(1)
        means.append(total / used.sum(1, keepdim=True))
    return torch.cat(means)


def rows_a_block(columns: int) -> int:
    """Rows of so many columns that make up one block."""
    return max(1, _BLOCK_SCORES // max(1, columns))
