"""The clusters index at many numbers of probes, alone and with codes behind it.

Scores do not depend on the number of probes P: clusters are scored and sorted once, and the rows of
P probes are those of fewer probes and some more. Logits are the estimates of all tokens with the
probed ones overwritten, exactly what `nn.search.search_clusters` returns at that P.

`clusters-codes` does not score probed rows exactly at once. They read their codes first (base and
all planes of the codes index, which state their own standard error sigma_v). The best estimate
among them, u, is scored exactly, and then only

    { v probed : s_v + z sigma_v >= logit_u },

those that can win among the probed; the others keep the estimate of their codes, and what is not
probed that of its cluster. Codes are counted as if they lay in the order of the clusters, so that
a probed cluster is one read.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from flashhead.evaluate.estimates import index_z
from flashhead.evaluate.measure import Chunk, Family, Figures, Head
from flashhead.index.clusters import ClustersIndex
from flashhead.index.codes import CodesIndex
from flashhead.ops.probe.api import estimates, probe
from flashhead.ops.refine.api import refine
from flashhead.ops.scan.api import scan, variances
from flashhead.ops.scan.query import CodesPlan, make_plan, make_query

PROBES = (64, 128, 256, 512, 1024)


def clusters_family(
    name: str, head: Head, indexes: dict[str, ClustersIndex], probes: tuple[int, ...] = PROBES
) -> Family:
    """Rows `<series>-p<P>` of every index, best clusters first.

    Args:
        name: of the family.
        head: that the indexes are of.
        indexes: by series.
        probes: ascending; more than there are clusters probes all.
    """

    def measure(chunk: Chunk) -> Iterator[tuple[str, Figures]]:
        for series, index in indexes.items():
            sweep = _Sweep(chunk, index, max(probes))
            for P in probes:
                counts = sweep.advance(P)
                read = index.scan_bytes + sweep.list_bytes(P) + counts * row_bytes(head)
                row = f"{series}-p{P}"
                yield row, chunk.compare(row, sweep.logits, read, candidates=counts)

    rows = {f"{series}-p{P}": (series, f"P={P}") for series in indexes for P in probes}
    return Family(name, rows, measure)


class _Sweep:
    """Clusters of a chunk in the order of their scores, and logits after the first P of them.

    Args:
        chunk: whose hidden states are searched.
        index: searched by its reference, whose product serves a whole chunk at once.
        probes: most clusters that will be asked for.
    """

    def __init__(self, chunk: Chunk, index: ClustersIndex, probes: int) -> None:
        self.index, self.exact, self.probed = index, chunk.exact, 0
        scores, self.order = probe(
            chunk.hidden,
            index.centroids,
            index.centroid_scale,
            index.centroid_offset,
            index.common,
            probes,
            impl="reference",
        )
        self.logits = estimates(
            scores, index.cluster_of, index.estimate_scale, index.estimate_offset
        )
        self.rows = torch.zeros(len(chunk.hidden), dtype=torch.int64)
        always = index.always.long()
        self.logits[:, always] = self.exact[:, always]

    def tokens(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Tokens of clusters first ... last - 1 of every row of the chunk.

        Returns:
            `int64[n, k]`, where a free place repeats the first token of its cluster, and
            `bool[n, k]`, whether it is none.
        """
        members = self.index.members[self.order[:, first:last]]
        held = members >= 0
        tokens = torch.where(held, members, members[:, :, :1])
        return tokens.flatten(1).long(), held.flatten(1)

    def advance(self, probes: int) -> Tensor:
        """Probe up to `probes` clusters; returns the rows scored exactly by now: int64[n]."""
        tokens, held = self.tokens(self.probed, probes)
        self.logits.scatter_(1, tokens, self.exact.gather(1, tokens))
        self.rows += held.sum(1)
        self.probed = probes
        home = self.index.cluster_of[self.index.always.long()]
        inside = (self.order[:, :probes, None] == home).any(1).sum(1)
        return self.rows + len(home) - inside

    def list_bytes(self, probes: int) -> int:
        """Bytes of the lists of members of `probes` clusters."""
        return min(probes, self.index.clusters) * self.index.probe_bytes


def clusters_codes_family(
    head: Head,
    clusters: ClustersIndex,
    codes: CodesIndex,
    impl: str,
    probes: tuple[int, ...] = PROBES,
) -> Family:
    """Rows `clusters-codes-p<P>`: probed rows read their codes first, see the module.

    Args:
        head: that both indexes are of.
        clusters: without tokens that are always scored.
        codes: the z of its failure probability is used.
        impl: of the codes' operations.
        probes: ascending.

    Raises:
        ValueError: `clusters` scores tokens always.
    """
    if len(clusters.always):
        raise ValueError(f"clusters.always={clusters.always.tolist()}: wanted none")
    z, plan = index_z(codes), make_plan(codes)
    fixed_bytes = clusters.scan_bytes + codes.transform.nbytes + codes.exact.nbytes

    def measure(chunk: Chunk) -> Iterator[tuple[str, Figures]]:
        sweep = _Sweep(chunk, clusters, max(probes))
        coded = _read_codes(chunk, head, codes, plan, sweep, max(probes), impl)
        for P in probes:
            places = P * clusters.members.shape[1]
            tokens, values, sigma, held = (part[:, :places] for part in coded)
            exact = chunk.exact.gather(1, tokens)
            best = values.argmax(1, keepdim=True)
            chosen = values + z * sigma >= exact.gather(1, best)
            chosen |= tokens == tokens.gather(1, best)
            sweep.logits.scatter_(1, tokens, torch.where(chosen, exact, values))
            candidates = (chosen & held).sum(1)
            read = fixed_bytes + sweep.list_bytes(P) + held.sum(1) * _code_bytes(codes)
            read = read + candidates * row_bytes(head)
            row = f"clusters-codes-p{P}"
            yield row, chunk.compare(row, sweep.logits, read, candidates=candidates)

    rows = {f"clusters-codes-p{P}": ("clusters-codes", f"P={P}") for P in probes}
    return Family("clusters-codes", rows, measure)


def _read_codes(
    chunk: Chunk,
    head: Head,
    codes: CodesIndex,
    plan: CodesPlan,
    sweep: _Sweep,
    probes: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens of the probed clusters, their finest estimates and standard errors, and which places
    hold a token: int64, float32, float32, bool `[n, k]`.

    The scan estimates all rows and most are not looked at: bytes are counted, not timed.
    """
    bias = None if head.bias is None else head.bias.float()[None]
    query = make_query(chunk.hidden, codes, plan, codes.options.failure_probability)
    base = scan(query, codes, plan, bias, impl=impl)
    tokens, held = sweep.tokens(0, probes)
    values = torch.empty(tokens.shape)
    for n, rows in enumerate(tokens):
        values[n] = base[n, rows]
        for plane in range(1, plan.stages):
            values[n] = refine(query, n, codes, plan, plane, rows, values[n], impl=impl)
    variance = variances(query, codes, plan.stages - 1).gather(1, tokens)
    return tokens, values, variance.sqrt(), held


def _code_bytes(codes: CodesIndex) -> int:
    """Bytes of one row's base codes, scales, coefficient and planes."""
    base = codes.base.shape[1] * codes.base.shape[3]
    scales = codes.scale.shape[0] * codes.scale.itemsize
    return base + scales + codes.direction.itemsize + codes.planes * codes.refine_row_bytes


def row_bytes(head: Head) -> int:
    """Bytes of a row of the head, and of its bias in float32."""
    return head.weight.shape[1] * head.weight.element_size() + (0 if head.bias is None else 4)
