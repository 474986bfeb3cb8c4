"""The searches: which operation follows which, for one index."""

import torch
from torch import Tensor

from flashhead.index.clusters import ClustersIndex
from flashhead.index.codes import CodesIndex
from flashhead.nn.output import HeadOutput
from flashhead.ops.cascade.api import cascade
from flashhead.ops.probe.api import candidate_rows, estimates, probe
from flashhead.ops.rescore.api import rescore
from flashhead.ops.scan.query import CodesPlan


def search_codes(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: CodesIndex,
    plan: CodesPlan,
    impl: str,
    *,
    failure_probability: float | None = None,
    winner_only: bool = False,
    margin: float = 0.0,
) -> HeadOutput:
    """Scan all rows coarsely, refine the survivors plane by plane, score the last few exactly.

    Args:
        hidden: floating `[n, d]`, finite.
        weight: bfloat16, float16 or float32 `[V, d]`.
        bias: `float32[V]`, `float32[1, V]` or `float32[n, V]`, added to the logits, or None.
        index: codes of `weight`.
        plan: `make_plan(index)`.
        impl: "cpu" or "reference".
        failure_probability: None: the index's.
        winner_only: read only what decides the winner; the other logits are coarse estimates.
        margin: nats below the winner down to which all rows are read exactly.
    """
    probability = index.options.failure_probability
    if failure_probability is not None:
        probability = failure_probability
    rows = bias.view(-1, index.vocab_size) if bias is not None else None
    budget = None if winner_only else index.options.kl_budget
    found = cascade(
        hidden, weight, rows, index, plan, probability, budget, impl=impl, margin=margin
    )
    row_bytes = weight.shape[1] * weight.element_size()
    sizes = [index.refine_row_bytes] * index.planes + [row_bytes]
    fixed = index.scan_bytes + (0 if bias is None else 4 * index.vocab_size)
    # numbers of Python: an operator of torch costs more than a few of them
    read = [
        fixed + sum(count * size for count, size in zip(counts, sizes, strict=True))
        for counts in found.read.tolist()
    ]
    return HeadOutput(
        logits=found.scores,
        tokens=found.tokens,
        candidates=found.read[:, -1],
        certified=torch.ones(len(hidden), dtype=torch.bool),
        fallback=found.dense,
        bytes_read=torch.tensor(read, dtype=torch.int64),
        upper=found.upper,
        exact=found.exact,
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
    read = fixed_bytes + counts * row_bytes
    return HeadOutput(logits, logits.argmax(1), counts, never, never, read)
