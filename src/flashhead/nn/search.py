"""The searches: which operation follows which, for one index."""

import torch
from torch import Tensor

from flashhead.index.clusters import ClustersIndex
from flashhead.index.codes import CodesIndex
from flashhead.nn.output import HeadOutput
from flashhead.ops.probe.api import candidate_rows, estimates, probe
from flashhead.ops.refine.api import refine
from flashhead.ops.rescore.api import rescore
from flashhead.ops.scan.api import scan
from flashhead.ops.scan.query import CodesPlan, make_query
from flashhead.ops.select.api import select


def search_codes(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: CodesIndex,
    plan: CodesPlan,
    impl: str,
) -> HeadOutput:
    """Scan all rows coarsely, refine the survivors, score the last few exactly.

    Each of the two selections may leave rows at an estimate for half of the KL budget.

    Args:
        hidden: floating `[n, d]`, finite.
        weight: bfloat16, float16 or float32 `[V, d]`.
        bias: `float32[V]` or None.
        index: codes of `weight`.
        plan: `make_plan(index)`.
        impl: "cpu" or "reference".
    """
    z, budget = index.options.z, index.options.kl_budget / 2
    query = make_query(hidden, index, plan, impl=impl)
    logits = scan(query, index, plan, bias, impl=impl)
    row_bytes = weight.shape[1] * weight.element_size()
    fixed_bytes = index.scan_bytes + (0 if bias is None else 4 * index.vocab_size)
    counts: list[tuple[int, bool, int]] = []
    for n in range(hidden.shape[0]):
        approximate = logits[n]
        survivors, upper = select(
            approximate, index.error[0], index.scale, query.base_variance[n], z, budget, impl=impl
        )
        refined = refine(query, n, index, survivors, approximate[survivors], impl=impl)
        chosen, refined_upper = select(
            refined,
            index.error[1][survivors],
            index.scale[survivors],
            query.refined_variance[n],
            z,
            budget,
            impl=impl,
        )
        candidates = survivors[chosen]
        exact = rescore(hidden[n], weight, bias, candidates, impl=impl)
        approximate[survivors] = refined
        approximate[candidates] = exact
        certified = bool(exact.max() >= max(upper, refined_upper))
        read = (
            fixed_bytes
            + survivors.numel() * index.refine_row_bytes
            + candidates.numel() * row_bytes
        )
        counts.append((candidates.numel(), certified, read))
    candidates_of, certified_of, bytes_of = ([entry[i] for entry in counts] for i in range(3))
    return HeadOutput(
        logits,
        torch.tensor(candidates_of, dtype=torch.int64),
        torch.tensor(certified_of, dtype=torch.bool),
        torch.tensor(bytes_of, dtype=torch.int64),
    )


def search_clusters(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, index: ClustersIndex, impl: str
) -> HeadOutput:
    """Score the tokens of the best clusters exactly and estimate the rest by their cluster.

    Nothing is certified: the bounds of a cluster are too loose to exclude it.

    Args:
        hidden: floating `[n, d]`, finite.
        weight: bfloat16, float16 or float32 `[V, d]`.
        bias: `float32[V]` or None.
        index: clusters of `weight`.
        impl: "cpu" or "reference".
    """
    scores, clusters = probe(
        hidden,
        index.centroids,
        index.centroid_scale,
        index.centroid_offset,
        index.common,
        index.options.probes,
        impl=impl,
    )
    logits = estimates(scores, index.cluster_of, index.estimate_scale, index.estimate_offset)
    row_bytes = weight.shape[1] * weight.element_size() + (0 if bias is None else 4)
    fixed_bytes = index.scan_bytes + clusters.shape[1] * index.probe_bytes
    counts = torch.zeros(hidden.shape[0], dtype=torch.int64)
    for n in range(hidden.shape[0]):
        rows = candidate_rows(index.members, clusters[n], index.always).long()
        logits[n, rows] = rescore(hidden[n], weight, bias, rows, impl=impl)
        counts[n] = rows.numel()
    never = torch.zeros(hidden.shape[0], dtype=torch.bool)
    return HeadOutput(logits, counts, never, fixed_bytes + counts * row_bytes)
