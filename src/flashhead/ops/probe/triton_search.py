"""The published cluster search (arXiv 2603.14591) as a whole on a GPU.

    score     all clusters (`triton`)                                        float32[n, C]
    select    the best of each hidden state (`triton`)                       int32[n, P]
    estimate  logits of all tokens by their clusters, if logits are wanted   float32[n, V]
    exact     logits of the members of those clusters and of `always`, and the winner

Shapes are fixed by the head and n, the host waits for nothing, and the same input gives the same
output, so a CUDA graph can hold all of it.

The winner is the largest of (image of the logit, 0x7fffffff - token) packed in int64: of equal
logits the lowest token wins, as with argmax. Select begins with the best estimate of a cluster
that is not probed, exact raises it by an atomic maximum, and the last program to finish a hidden
state writes its token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashhead.index.clusters import ClustersIndex
from flashhead.ops.probe.triton import (
    BLOCK_D,
    NUM_WARPS,
    best_clusters,
    cluster_scores,
    packed,
    require_one_gpu,
)


@triton.jit
def _estimate_kernel(  # type: ignore[no-untyped-def]
    scores_ptr,
    cluster_of_ptr,
    estimate_scale_ptr,
    estimate_offset_ptr,
    logits_ptr,
    V: tl.constexpr,
    C: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Estimated logits of BLOCK_V tokens of a hidden state."""
    state = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    cluster = tl.load(cluster_of_ptr + token, mask=token < V, other=0)
    score = tl.load(scores_ptr + state * C + cluster)
    scale = tl.load(estimate_scale_ptr + cluster)
    offset = tl.load(estimate_offset_ptr + cluster)
    tl.store(logits_ptr + state * V + token, tl.fma(score, scale, offset), mask=token < V)


@triton.jit(do_not_specialize=["P"])
def _exact_kernel(  # type: ignore[no-untyped-def]
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    members_ptr,
    always_ptr,
    clusters_ptr,
    best_ptr,
    done_ptr,
    tokens_ptr,
    logits_ptr,
    P,
    V: tl.constexpr,
    d: tl.constexpr,
    SIZE: tl.constexpr,
    ALWAYS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LOGITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Logits of BLOCK_R places: SIZE members of each of P clusters, then ALWAYS tokens."""
    state = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_member = place < P * SIZE
    cluster = tl.load(clusters_ptr + state * P + place // SIZE, mask=is_member, other=0)
    token = tl.load(members_ptr + cluster * SIZE + place % SIZE, mask=is_member, other=-1)
    if ALWAYS > 0:
        extra = place - P * SIZE
        is_extra = (extra >= 0) & (extra < ALWAYS)
        token = tl.maximum(token, tl.load(always_ptr + extra, mask=is_extra, other=-1))
    is_token = token >= 0
    row_ptr = weight_ptr + tl.maximum(token, 0)[:, None].to(tl.int64) * d
    dots = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in tl.static_range(0, d, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        hidden = tl.load(hidden_ptr + state * d + k, mask=k < d, other=0).to(tl.float32)
        inside = is_token[:, None] & (k < d)[None, :]
        row = tl.load(row_ptr + k[None, :], mask=inside, other=0).to(tl.float32)
        dots += row * hidden[None, :]
    logit = tl.sum(dots, 1)
    if HAS_BIAS:
        logit += tl.load(bias_ptr + token, mask=is_token, other=0)
    if HAS_LOGITS:
        tl.store(logits_ptr + state * V + token, logit, mask=is_token)
    best = tl.max(tl.where(is_token, packed(logit, token), -0x7FFFFFFFFFFFFFFF), 0)
    tl.atomic_max(best_ptr + state, best)
    if tl.atomic_add(done_ptr + state, 1) == tl.num_programs(1) - 1:
        # read where atomics are done: a cache may hold an older value
        best = tl.atomic_max(best_ptr + state, best)
        tl.store(tokens_ptr + state, 0x7FFFFFFF - (best & 0x7FFFFFFF))


def search(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: ClustersIndex,
    estimated: Tensor,
    *,
    winner_only: bool,
) -> tuple[Tensor, Tensor | None]:
    """Tokens int64[n] and logits float32[n, V], or None with `winner_only`; see `api.search`."""
    biases = () if bias is None else (bias,)
    require_one_gpu(hidden, weight, *biases, estimated, *index.tensors().values())
    (n, d), V, (C, size) = hidden.shape, len(weight), index.members.shape
    P, always, hidden = min(index.options.probes, C), len(index.always), hidden.contiguous()
    scores = cluster_scores(
        hidden, index.centroids, index.centroid_scale, index.centroid_offset, index.common
    )
    affine = (index.estimate_scale, index.estimate_offset)
    clusters, best, done = best_clusters(scores, P, (*affine, estimated))
    tokens = torch.empty(n, dtype=torch.int64, device=hidden.device)
    logits = None
    if not winner_only:
        logits = torch.empty(n, V, dtype=torch.float32, device=hidden.device)
    if n == 0:
        return tokens, logits
    BLOCK_V, BLOCK_R = 1024, 16
    with torch.cuda.device_of(hidden):
        if logits is not None:
            _estimate_kernel[n, triton.cdiv(V, BLOCK_V)](
                scores, index.cluster_of, *affine, logits, V, C, BLOCK_V=BLOCK_V
            )
        _exact_kernel[n, triton.cdiv(P * size + always, BLOCK_R)](
            hidden,
            weight,
            weight if bias is None else bias,
            index.members,
            index.always,
            clusters,
            best,
            done,
            tokens,
            scores if logits is None else logits,
            P,
            V,
            d,
            SIZE=size,
            ALWAYS=always,
            HAS_BIAS=bias is not None,
            HAS_LOGITS=logits is not None,
            BLOCK_R=BLOCK_R,
            BLOCK_D=min(BLOCK_D, triton.next_power_of_2(d)),
            num_warps=NUM_WARPS,
        )
    return tokens, logits
