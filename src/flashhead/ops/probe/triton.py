"""Probe on a GPU: scores of all clusters, and the best of each hidden state.

    score     all clusters, centroids widened in registers     float32[n, C]
    select    the `probes` best, ascending                     int32[n, P]

Shapes are fixed by the head and n, and the host waits for nothing.

Select is one program a hidden state. int32 images of the scores, which order as the scores do, are
searched for the P-th largest two bits at a time: three counts, packed in one int64, cost one
reduction, and the search ends early once a threshold parts exactly P from the rest. Of equal scores
the lowest clusters are taken. The first `MAX_BLOCK_CLUSTERS` images stay in registers; what is
beyond them is read again at every step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashhead.errors import FlashHeadError

MAX_BLOCK_CLUSTERS = 16384
"""Clusters that one step of `_select_kernel` looks at: at most 16 a thread."""

BLOCK_D = 128
NUM_WARPS = 8
"""Of the kernels that read rows. A hidden state has to come in blocks of fewer elements than there
are threads: larger ones go through shared memory, and each step then waits at a barrier.
"""

MAX_CLUSTERS = 2**21 - 1
"""A count has 21 bits of an int64."""


@triton.jit
def _image(value):  # type: ignore[no-untyped-def]
    """Int32 image of float32 with the same order; -0 counts as 0."""
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def packed(value, token):  # type: ignore[no-untyped-def]
    """Int64 whose larger is the larger value, of equal values the lower token."""
    return (_image(value).to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)


@triton.jit
def _images(scores_ptr, cluster, C):  # type: ignore[no-untyped-def]
    """Images of scores; beyond the last cluster what is lower than any."""
    score = tl.load(scores_ptr + cluster, mask=cluster < C, other=0)
    return tl.where(cluster < C, tl.maximum(_image(score), -0x7FFFFFFF), -0x80000000)


@triton.jit
def _counts(images, low, middle, high):  # type: ignore[no-untyped-def]
    """How many images reach each of three thresholds, 21 bits each."""
    reach = (images >= low).to(tl.int64) + ((images >= middle).to(tl.int64) << 21)
    return tl.sum(reach + ((images >= high).to(tl.int64) << 42), 0)


@triton.jit(do_not_specialize=["n"])
def _score_kernel(  # type: ignore[no-untyped-def]
    hidden_ptr,
    centroids_ptr,
    scale_ptr,
    offset_ptr,
    common_ptr,
    scores_ptr,
    n,
    C: tl.constexpr,
    d: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Scores of BLOCK_C clusters for up to BLOCK_N hidden states.

    From the second hidden state on the centroids come from the cache of the multiprocessor.
    """
    cluster = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cluster < C
    scale = tl.load(scale_ptr + cluster, mask=inside, other=0)
    offset = tl.load(offset_ptr + cluster, mask=inside, other=0)
    width: tl.constexpr = (d + 1) // 2 if PACKED else d
    row_ptr = centroids_ptr + cluster.to(tl.int64)[:, None] * width
    state = tl.program_id(0).to(tl.int64) * BLOCK_N
    last = tl.minimum(state + BLOCK_N, n)
    while state < last:
        own_ptr = hidden_ptr + state * d
        dots = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        shared = tl.zeros([BLOCK_D], tl.float32)
        for start in tl.static_range(0, width, BLOCK_D):
            k = start + tl.arange(0, BLOCK_D)
            mask = inside[:, None] & (k < width)[None, :]
            stored = tl.load(row_ptr + k[None, :], mask=mask, other=0)
            hidden = tl.load(own_ptr + k, mask=k < width, other=0).to(tl.float32)
            shared += hidden * tl.load(common_ptr + k, mask=k < width, other=0)
            if PACKED:
                dots += ((stored & 15).to(tl.float32) - 8) * hidden[None, :]
                k += width
                hidden = tl.load(own_ptr + k, mask=k < d, other=0).to(tl.float32)
                shared += hidden * tl.load(common_ptr + k, mask=k < d, other=0)
                dots += ((stored >> 4).to(tl.float32) - 8) * hidden[None, :]
            else:
                dots += stored.to(tl.float32) * hidden[None, :]
        score = tl.sum(dots, 1) * scale + offset + tl.sum(shared, 0)
        tl.store(scores_ptr + state * C + cluster, score, mask=inside)
        state += 1


@triton.jit(do_not_specialize=["P"])
def _select_kernel(  # type: ignore[no-untyped-def]
    scores_ptr,
    estimate_scale_ptr,
    estimate_offset_ptr,
    estimated_ptr,
    clusters_ptr,
    best_ptr,
    done_ptr,
    P,
    C: tl.constexpr,
    WINNER: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The P best clusters of a hidden state; with WINNER the best estimate of the others."""
    state = tl.program_id(0).to(tl.int64)
    scores_ptr += state * C
    images = _images(scores_ptr, tl.arange(0, BLOCK_C), C)
    # the largest threshold that P images reach, from the top bits down
    threshold = tl.full([], -0x80000000, tl.int32)
    reached = tl.full([], C, tl.int64)
    step = tl.full([], 1 << 30, tl.int32)
    while (step > 0) & (reached != P):
        low = threshold + step
        middle = low + step
        high = middle + step
        counts = _counts(images, low, middle, high)
        for start in range(BLOCK_C, C, BLOCK_C):
            beyond = _images(scores_ptr, start + tl.arange(0, BLOCK_C), C)
            counts += _counts(beyond, low, middle, high)
        reached_low = counts & 0x1FFFFF
        reached_middle = (counts >> 21) & 0x1FFFFF
        reached_high = counts >> 42
        if reached_high >= P:
            threshold = high
            reached = reached_high
        elif reached_middle >= P:
            threshold = middle
            reached = reached_middle
        elif reached_low >= P:
            threshold = low
            reached = reached_low
        step = step >> 2
    above = tl.sum((images > threshold).to(tl.int32), 0)
    for start in range(BLOCK_C, C, BLOCK_C):
        beyond = _images(scores_ptr, start + tl.arange(0, BLOCK_C), C)
        above += tl.sum((beyond > threshold).to(tl.int32), 0)
    ties = P - above  # taken of those at the threshold, the lowest clusters
    clusters_ptr += state * P
    best = tl.full([], -0x7FFFFFFFFFFFFFFF, tl.int64)
    above_before = tl.full([], 0, tl.int32)
    equal_before = tl.full([], 0, tl.int32)
    for start in range(0, C, BLOCK_C):
        cluster = start + tl.arange(0, BLOCK_C)
        inside = cluster < C
        image = _images(scores_ptr, cluster, C)
        is_above = image > threshold
        is_equal = (image == threshold) & inside
        pair = (is_above.to(tl.int32) << 16) + is_equal.to(tl.int32)
        through = tl.cumsum(pair, 0)
        equal_through = equal_before + (through & 0xFFFF)
        is_taken = is_above | (is_equal & (equal_through <= ties))
        place = above_before + (through >> 16) + tl.minimum(equal_through, ties) - 1
        tl.store(clusters_ptr + place, cluster, mask=is_taken)
        total = tl.sum(pair, 0)
        above_before += total >> 16
        equal_before += total & 0xFFFF
        if WINNER:
            token = tl.load(estimated_ptr + cluster, mask=inside & ~is_taken, other=-1)
            score = tl.load(scores_ptr + cluster, mask=inside, other=0)
            scale = tl.load(estimate_scale_ptr + cluster, mask=inside, other=0)
            offset = tl.load(estimate_offset_ptr + cluster, mask=inside, other=0)
            rival = packed(tl.fma(score, scale, offset), token)
            rival = tl.where(token >= 0, rival, -0x7FFFFFFFFFFFFFFF)
            best = tl.maximum(best, tl.max(rival, 0))
    if WINNER:
        tl.store(best_ptr + state, best)
        tl.store(done_ptr + state, 0)


IS_INTERPRETED = not isinstance(_score_kernel, triton.JITFunction)
"""Whether TRITON_INTERPRET was set when this module was imported: kernels then run on the CPU."""


def cluster_scores(
    hidden: Tensor, centroids: Tensor, scale: Tensor, offset: Tensor, common: Tensor
) -> Tensor:
    """h.common + scale_j * (h.centroids_j) + offset_j: float32[n, C] of hidden [n, d]."""
    tensors = (hidden, centroids, scale, offset, common)
    require_one_gpu(*tensors)
    (n, d), (C, width) = hidden.shape, centroids.shape
    scores = torch.empty(n, C, dtype=torch.float32, device=hidden.device)
    BLOCK_N, BLOCK_C = 4, 32
    grid = (triton.cdiv(n, BLOCK_N), triton.cdiv(C, BLOCK_C))
    if n > 0:
        with torch.cuda.device_of(hidden):
            _score_kernel[grid](
                *(tensor.contiguous() for tensor in tensors),
                scores,
                n,
                C,
                d,
                PACKED=centroids.dtype == torch.uint8,
                BLOCK_N=BLOCK_N,
                BLOCK_C=BLOCK_C,
                BLOCK_D=min(BLOCK_D, triton.next_power_of_2(width)),
                num_warps=NUM_WARPS,
            )
    return scores


def best_clusters(
    scores: Tensor, probes: int, estimates: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The `probes` best clusters of each hidden state; of equal scores the lowest.

    Args:
        scores: `float32[n, C]`, contiguous.
        probes: clusters to take, at most C.
        estimates: scale `float32[C]`, offset `float32[C]` and token `int32[C]` of the estimate that
            a cluster gives, -1 if it gives none.

    Returns:
        clusters `int32[n, probes]`, ascending. Only with `estimates`: `packed` of the best estimate
        of the other clusters `int64[n]`, and zeros `int32[n]`.
    """
    n, C = scores.shape
    require_one_gpu(scores)
    if C > MAX_CLUSTERS:
        raise FlashHeadError(f"impl='triton': {C} clusters, wanted at most {MAX_CLUSTERS}")
    clusters = torch.empty(n, probes, dtype=torch.int32, device=scores.device)
    best = torch.empty(n, dtype=torch.int64, device=scores.device)
    done = torch.empty(n, dtype=torch.int32, device=scores.device)
    BLOCK_C = min(MAX_BLOCK_CLUSTERS, triton.next_power_of_2(C))
    if n > 0:
        with torch.cuda.device_of(scores):
            _select_kernel[n,](
                scores,
                *(estimates or (scores, scores, clusters)),
                clusters,
                best,
                done,
                probes,
                C,
                WINNER=estimates is not None,
                BLOCK_C=BLOCK_C,
                num_warps=min(32, max(4, BLOCK_C // 512)),
            )
    return clusters, best, done


def require_one_gpu(*tensors: Tensor) -> None:
    """Raise FlashHeadError unless all tensors are on one device that the kernels run on."""
    devices = {tensor.device for tensor in tensors}
    kinds = ("cpu",) if IS_INTERPRETED else ("cuda", "xpu")  # ROCm calls its devices cuda
    if len(devices) != 1 or tensors[0].device.type not in kinds:
        got = ", ".join(sorted(str(device) for device in devices))
        wanted = "cpu under TRITON_INTERPRET" if IS_INTERPRETED else "one GPU"
        raise FlashHeadError(f"impl='triton': tensors are on {got}, wanted {wanted}")
