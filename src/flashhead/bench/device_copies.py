"""Heads on a device in several copies, so that a rotation of them does not fit its L2 cache."""

import dataclasses
import time
from typing import Any

import torch
from torch import Tensor, nn

from flashhead.bench.device_timing import copies_needed
from flashhead.bench.synthetic import Problem
from flashhead.index.build_clusters import FittedClusters, build_clusters, store_clusters
from flashhead.index.build_codes import build_codes_expecting
from flashhead.index.clusters import ClustersIndex
from flashhead.index.codes import CodesIndex
from flashhead.index.kmeans import cluster_members, mean_rows
from flashhead.nn.head import FlashHead
from flashhead.nn.tuning import Crossover
from flashhead.options import ClustersOptions, CodesOptions

PUBLISHED = ClustersOptions(metric="spherical", centroid_dtype="bf16", cluster_size=16)
PROBES = (256, 512)
ITERATIONS = 2
"""Of k-means on real rows; more find better clusters, and cost the same to search."""

ALWAYS = Crossover(logits=64, token=64)
"""The search runs at every batch size, also where the dense product is faster: that is measured."""


@dataclasses.dataclass(frozen=True)
class Rotation:
    """Copies of one searched head; call i uses copy i modulo their number.

    Args:
        heads: equal, on different memory.
        index: of the first.
        seconds: that building the index took.
        notes: JSON-able, about the index.
    """

    heads: list[FlashHead]
    index: CodesIndex | ClustersIndex
    seconds: float
    notes: dict[str, Any]


class Weights:
    """Copies of a head's weight, made when they are first asked for."""

    def __init__(self, weight: Tensor) -> None:
        self._copies = [weight]

    def get(self, count: int) -> list[Tensor]:
        """The first `count` copies: `bf16[V, d]` each."""
        while len(self._copies) < count:
            self._copies.append(self._copies[0].clone())
        return self._copies[:count]


def codes_rotation(
    problem: Problem, weights: Weights, options: CodesOptions, l2_bytes: int
) -> Rotation:
    """Build the codes index of a problem where its weight is, and copies of its head."""
    started = time.perf_counter()
    index, expected = build_codes_expecting(problem.weight, options, problem.calibration)
    notes = {
        "bits": index.options.bits,
        "planes": index.planes,
        "kl_budget": index.options.kl_budget,
        "int8_kl_expected": expected.int8_kl,
        "scan_bytes": index.scan_bytes,
        "index_bytes": sum(tensor.nbytes for tensor in index.tensors().values()),
    }
    seconds = time.perf_counter() - started
    heads = _heads(weights, index, l2_bytes)
    return Rotation(heads, index, seconds, notes)


def clusters_rotations(problem: Problem, weights: Weights, l2_bytes: int) -> dict[int, Rotation]:
    """The published clusters at each number of probes, on the same index.

    Rows that are made up are put into clusters at random: a search costs what it always costs, and
    finds nothing.
    """
    started = time.perf_counter()
    options = dataclasses.replace(PUBLISHED, iterations=ITERATIONS)
    if problem.synthetic:
        index = _random_clusters(problem.weight, options)
    else:
        index = build_clusters(problem.weight, options, progress=True)
    seconds = time.perf_counter() - started
    index = index.to(problem.weight.device)
    notes = {
        "assignment": "random" if problem.synthetic else f"k-means, {ITERATIONS} iterations",
        "agreement_means_something": not problem.synthetic,
        "scan_bytes": index.scan_bytes,
    }
    found = {}
    for probes in PROBES:
        own = dataclasses.replace(index, options=dataclasses.replace(options, probes=probes))
        heads = _heads(weights, own, l2_bytes)
        found[probes] = Rotation(heads, own, seconds, notes)
    return found


def _random_clusters(weight: Tensor, options: ClustersOptions) -> ClustersIndex:
    size = options.cluster_size
    assert size is not None
    shuffled = torch.randperm(len(weight), generator=torch.Generator().manual_seed(options.seed))
    cluster_of = torch.empty_like(shuffled)
    cluster_of[shuffled] = torch.arange(len(weight)) // size
    members = cluster_members(cluster_of, size)
    means = mean_rows(weight, members.to(weight.device)).cpu()
    norms = means.norm(dim=1).clamp_min(1e-30)
    zeros = torch.zeros(len(members))
    fitted = FittedClusters(means / norms[:, None], zeros, norms, zeros, members, cluster_of, 0)
    return store_clusters(fitted, options)


def _heads(weights: Weights, index: CodesIndex | ClustersIndex, l2_bytes: int) -> list[FlashHead]:
    heads = []
    for number, weight in enumerate(weights.get(copies_needed(index.scan_bytes, l2_bytes))):
        own = index if number == 0 else _cloned(index)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        heads.append(FlashHead(linear, own, crossover=ALWAYS))
    return heads


def _cloned(index: Any) -> Any:
    return dataclasses.replace(
        index, **{name: tensor.clone() for name, tensor in index.tensors().items()}
    )
