"""Probe the clusters of a head: which to score exactly, and an estimate for all other tokens.

    score_j = h.common + scale_j * (h.centroids_j) + offset_j
    clusters = the `probes` best scores
    candidates = members of those clusters and the tokens always scored
    logit of any other token of cluster j ~ score_j * estimate_scale_j + estimate_offset_j

`index.clusters` says where the tensors come from. `impl="reference"` is eager torch and the
specification; `impl="cpu"` reads the stored bytes of the centroids in a Numba kernel;
`impl="triton"` does so on a GPU. An implementation that cannot run is an error.

`search` is all of it at once on a GPU, without the lists of candidates.
"""

import importlib
from types import ModuleType

import torch
from torch import Tensor

from flashhead.errors import FlashHeadError
from flashhead.index.clusters import ClustersIndex
from flashhead.ops.probe import reference

IMPLEMENTATIONS = ("reference", "cpu", "triton")


def probe(
    hidden: Tensor,
    centroids: Tensor,
    centroid_scale: Tensor,
    centroid_offset: Tensor,
    common: Tensor,
    probes: int,
    *,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Scores of all clusters and the best `probes` of them; rows are independent.

    Equals
        scores = hidden @ (centroids * centroid_scale[:, None] + common).T + centroid_offset
        clusters = scores.topk(min(probes, C)).indices

    Args:
        hidden: `float32[n, d]` or `bfloat16[n, d]`.
        centroids: `int8[C, d]`, `bfloat16[C, d]`, or int4 packed as in `index.clusters`,
            `uint8[C, ceil(d/2)]`.
        centroid_scale: `float32[C]`.
        centroid_offset: `float32[C]`.
        common: `float32[d]`.
        probes: clusters to take; all C if there are fewer.
        impl: "reference", "cpu" or "triton".

    Returns:
        scores `float32[n, C]` and clusters `int64[n, min(probes, C)]`, best first. Of equal scores
        "triton" takes the lowest clusters, in order.

    Raises:
        FlashHeadError: shapes or dtypes do not fit, or `impl` is unknown or cannot run here.
    """
    _check(hidden, centroids, centroid_scale, centroid_offset, common)
    if probes < 1:
        raise FlashHeadError(f"probes={probes}: wanted 1 or more")
    if impl == "triton":
        kernels = _triton_module("triton")
        scores = kernels.cluster_scores(hidden, centroids, centroid_scale, centroid_offset, common)
        clusters = kernels.best_clusters(scores, min(probes, scores.shape[1]))[0].long()
        order = scores.gather(1, clusters).sort(dim=1, descending=True, stable=True).indices
        return scores, clusters.gather(1, order)
    hidden = hidden.float()
    if impl == "reference":
        scores = reference.cluster_scores(
            hidden, centroids, centroid_scale, centroid_offset, common
        )
    elif impl == "cpu":
        if hidden.device.type != "cpu" or centroids.device.type != "cpu":
            got = f"{hidden.device} and {centroids.device}"
            raise FlashHeadError(f"impl='cpu': tensors are on {got}, wanted cpu (impl='reference')")
        try:
            from flashhead.ops.probe import cpu
        except ImportError as error:
            raise FlashHeadError(
                f"impl='cpu' needs numba ({error}): pip install 'flashhead[cpu]'"
            ) from error
        scores = cpu.cluster_scores(hidden, centroids, centroid_scale, centroid_offset, common)
    else:
        raise FlashHeadError(f"impl={impl!r}: wanted one of {', '.join(IMPLEMENTATIONS)}")
    return scores, scores.topk(min(probes, scores.shape[1]), dim=1).indices


def search(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: ClustersIndex,
    estimated: Tensor,
    *,
    winner_only: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Tokens and logits as `nn.search.search_clusters` gives them, in four Triton kernels.

    Equals, but that of equal scores the lowest clusters are probed, with rows the candidates,
        logits = estimates(scores, ...)
        logits[rows] = weight[rows].float() @ hidden.float() + bias[rows]
        tokens = logits.argmax(1)

    Args:
        hidden: bfloat16, float16 or float32 `[n, d]`, finite.
        weight: bfloat16, float16 or float32 `[V, d]`, contiguous.
        bias: `float32[V]` or None.
        index: clusters of `weight`, on the same GPU.
        estimated: `estimated_tokens(index)`, made once.
        winner_only: without the logits; nothing of V elements is then written.

    Returns:
        tokens `int64[n]`, and logits `float32[n, V]` or None.

    Raises:
        FlashHeadError: shapes, dtypes or devices do not fit, or triton is missing.
    """
    _check(hidden, index.centroids, index.centroid_scale, index.centroid_offset, index.common)
    shape = (index.vocab_size, index.hidden_size)
    wanted = {"weight": (weight, shape), "estimated": (estimated, (index.clusters,))}
    if bias is not None:
        wanted["bias"] = (bias, shape[:1])
    for name, (tensor, size) in wanted.items():
        dtypes = _SEARCH_DTYPES[name]
        if tuple(tensor.shape) != size or tensor.dtype not in dtypes or not tensor.is_contiguous():
            got = f"{tensor.dtype}{list(tensor.shape)}"
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise FlashHeadError(f"{name} is {got}, wanted contiguous {names} {list(size)}")
    return _triton_module("triton_search").search(
        hidden, weight, bias, index, estimated, winner_only=winner_only
    )


def estimated_tokens(index: ClustersIndex) -> Tensor:
    """Lowest token of each cluster that is not always scored, -1 if there is none: `int32[C]`.

    Of the tokens that a cluster would leave at its estimate it is the one that argmax takes.
    """
    return reference.estimated_tokens(index.members, index.always)


def candidate_rows(members: Tensor, clusters: Tensor, always: Tensor) -> Tensor:
    """Rows of the head that one query scores exactly, ascending, each once.

    Args:
        members: `int32[C, size]`, padded with -1.
        clusters: `int64[P]`, the probed clusters of one row.
        always: `int32[k]`, tokens scored whatever the probe says.

    Returns:
        `int32[r]`.
    """
    return reference.candidate_rows(members, clusters, always)


def estimates(
    scores: Tensor, cluster_of: Tensor, estimate_scale: Tensor, estimate_offset: Tensor
) -> Tensor:
    """Estimated logits of all tokens from the scores of their clusters: `float32[n, V]`.

    Args:
        scores: `float32[n, C]` from `probe`.
        cluster_of: `int32[V]`.
        estimate_scale: `float32[C]`.
        estimate_offset: `float32[C]`.
    """
    return reference.estimates(scores, cluster_of, estimate_scale, estimate_offset)


_SEARCH_DTYPES = {
    "weight": (torch.bfloat16, torch.float16, torch.float32),
    "bias": (torch.float32,),
    "estimated": (torch.int32,),
}


def _triton_module(name: str) -> ModuleType:
    """A module of kernels by name; FlashHeadError if triton is missing."""
    try:
        return importlib.import_module(f"flashhead.ops.probe.{name}")
    except ImportError as error:
        raise FlashHeadError(f"impl='triton' needs triton ({error}): pip install triton") from error


def _check(
    hidden: Tensor, centroids: Tensor, scale: Tensor, offset: Tensor, common: Tensor
) -> None:
    d = common.numel()
    width = -(-d // 2) if centroids.dtype == torch.uint8 else d
    known = centroids.dtype in (torch.int8, torch.bfloat16, torch.uint8)
    if not known or centroids.dim() != 2 or centroids.shape[1] != width:
        got = f"{centroids.dtype}{list(centroids.shape)}, common has {d} dimensions"
        raise FlashHeadError(
            f"centroids are {got}: wanted int8 or bfloat16 [C, d], or uint8 [C, ceil(d/2)]"
        )
    count = len(centroids)
    if hidden.dim() != 2 or hidden.shape[1] != d or not hidden.is_floating_point():
        got = f"{hidden.dtype}{list(hidden.shape)}"
        raise FlashHeadError(f"hidden is {got}, wanted floating [n, {d}]")
    wanted = {
        "centroid_scale": (scale, count),
        "centroid_offset": (offset, count),
        "common": (common, d),
    }
    for name, (tensor, length) in wanted.items():
        if tuple(tensor.shape) != (length,) or tensor.dtype != torch.float32:
            got = f"{tensor.dtype}{list(tensor.shape)}"
            raise FlashHeadError(f"{name} is {got}, wanted float32[{length}]")
