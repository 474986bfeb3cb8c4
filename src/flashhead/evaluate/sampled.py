"""Clusters sampled by their centroid's probability, as published for sampling (arXiv 2603.14591).

P clusters S are drawn without replacement with probabilities phi = softmax(scores of the clusters),
their tokens are scored exactly, and the token is sampled from the softmax over those alone. What
a user gets is the mixture over all draws. With l the exact logits, c(v) the cluster of v and
m_j = sum of p_v over cluster j,

    q_v = E_S [ 1{c(v) in S} e^l_v / sum_{u: c(u) in S} e^l_u ] = p_v w_c(v),
    w_j = E_S [ 1{j in S} / m(S) ],    m(S) = sum_{i in S} m_i

so its distances from p need no more than the weights w of the clusters:

    KL(p||q) = - sum_j m_j ln w_j,    TV = sum_j m_j |1 - w_j| / 2.

Drawing P without replacement is taking the P largest of ln phi_j + G_j with Gumbel noise G. Given
the noise of all clusters but j, whose P-th largest value is kappa, j is in S with probability
1 - exp(-exp(ln phi_j - kappa)), beside the P - 1 largest of the others. Averaging that over a few
seeded draws is an unbiased estimate of w_j that is never zero (Rao-Blackwell), where counting draws
would leave KL infinite. Both distances are convex in w, so that few draws make them a little too
large in expectation, never too small (4 draws against 256, 4,096 clusters: within 1 %). Agreement
is the probability that the best token's cluster is in S, with the same inner expectation: greedy
decoding over sampled clusters.

Nothing is estimated for tokens outside S (their probability in a draw is zero), so the bytes leave
out what the estimates of the clusters index read.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from flashhead.evaluate.measure import Chunk, Family, Figures, Head
from flashhead.evaluate.metrics import argmax
from flashhead.evaluate.probed import PROBES, row_bytes
from flashhead.index.clusters import ClustersIndex
from flashhead.ops.probe.api import probe

DRAWS = 4
LEAST_NOISE = 1e-30
LEAST = 1e-300
"""Least probability that a cluster is drawn with: float64 would make it zero, and KL infinite."""


def sampled_family(
    head: Head,
    indexes: dict[str, ClustersIndex],
    probes: tuple[int, ...] = PROBES,
    draws: int = DRAWS,
    seed: int = 0,
) -> Family:
    """Rows `<series>-p<P>` of every index, clusters drawn instead of the best taken.

    Args:
        head: that the indexes are of.
        indexes: by series, without tokens that are always scored.
        probes: ascending.
        draws: seeded draws that are averaged.
        seed: of the draws.

    Raises:
        ValueError: an index scores tokens always.
    """
    for series, index in indexes.items():
        if len(index.always):
            raise ValueError(f"{series}: always={index.always.tolist()}: wanted none")

    def measure(chunk: Chunk) -> Iterator[tuple[str, Figures]]:
        for series, index in indexes.items():
            generator = torch.Generator().manual_seed(seed + 1_000_003 * chunk.number)
            mass = cluster_mass(chunk.truth.probabilities, index)
            best = index.cluster_of[argmax(chunk.truth.logits)].long()
            log_phi = _scores(chunk.hidden, index).double().log_softmax(1)
            for P, (weights, inside) in zip(
                probes, expected_weights(log_phi, mass, probes, draws, generator), strict=True
            ):
                yield (
                    f"{series}-p{P}",
                    {
                        "agree": inside.gather(1, best[:, None])[:, 0],
                        "kl": -(mass * weights.log()).sum(1),
                        "tv": (mass * (1 - weights).abs()).sum(1) / 2,
                        "bytes_read": _bytes_read(head, index, P).expand(len(mass)),
                    },
                )

    rows = {f"{series}-p{P}": (series, f"P={P}") for series in indexes for P in probes}
    return Family("sampled", rows, measure)


def cluster_mass(probabilities: Tensor, index: ClustersIndex) -> Tensor:
    """Sum of `float32/float64[n, V]` over the tokens of every cluster: float64[n, C].

    A cluster has few tokens, so that sums in float32 lose no more than the metrics do.
    """
    mass = probabilities.new_zeros(len(probabilities), index.clusters)
    return mass.index_add_(1, index.cluster_of, probabilities).double()


def expected_weights(
    log_phi: Tensor, mass: Tensor, probes: tuple[int, ...], draws: int, generator: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """Weights w_j and the probabilities that j is drawn, averaged over draws, for every P.

    Args:
        log_phi: `float64[n, C]`, log-probabilities of the clusters.
        mass: `float64[n, C]`, true probability of their tokens.
        probes: numbers of clusters drawn.
        draws: draws averaged, each shared by all P.
        generator: of the draws.

    Returns:
        `float64[n, C]` twice, for every P.
    """
    count = log_phi.shape[1]
    most = min(max(probes), count)
    weights = [torch.zeros_like(log_phi) for _ in probes]
    inside = [torch.zeros_like(log_phi) for _ in probes]
    for _ in range(draws):
        noise = torch.empty(log_phi.shape).exponential_(generator=generator)
        best = (log_phi - noise.clamp_min_(LEAST_NOISE).double().log_()).topk(
            min(most + 1, count), dim=1
        )
        floors = torch.nn.functional.pad(best.values, (0, 1), value=-torch.inf)
        drawn = mass.gather(1, best.indices)
        kept = torch.nn.functional.pad(drawn.cumsum(1), (1, 0))
        for k, P in enumerate(min(P, count) for P in probes):
            # a cluster outside S replaces the last of S; one in S is there with the others of S
            chance = _chance(log_phi, floors[:, P - 1 : P])
            weight = chance / (mass + kept[:, P - 1 : P])
            own = best.indices[:, :P]
            own_chance = _chance(log_phi.gather(1, own), floors[:, P : P + 1])
            inside[k] += chance.scatter_(1, own, own_chance)
            weights[k] += weight.scatter_(1, own, own_chance / kept[:, P : P + 1])
    return [(w / draws, i / draws) for w, i in zip(weights, inside, strict=True)]


def _chance(log_phi: Tensor, floor: Tensor) -> Tensor:
    """Probability that ln phi_j plus Gumbel noise exceeds `floor`."""
    return torch.expm1(torch.exp(log_phi - floor).neg_()).neg_().clamp_min_(LEAST)


def _scores(hidden: Tensor, index: ClustersIndex) -> Tensor:
    scores, _ = probe(
        hidden,
        index.centroids,
        index.centroid_scale,
        index.centroid_offset,
        index.common,
        1,
        impl="reference",
    )
    return scores


def _bytes_read(head: Head, index: ClustersIndex, probes: int) -> Tensor:
    """Scores, lists of members, and rows at the mean size of a cluster: float64[1]."""
    scored = (index.centroids, index.centroid_scale, index.centroid_offset, index.common)
    probes = min(probes, index.clusters)
    rows = probes * index.vocab_size / index.clusters
    fixed = sum(tensor.nbytes for tensor in scored) + probes * index.probe_bytes
    return torch.tensor([fixed + rows * row_bytes(head)], dtype=torch.float64)
