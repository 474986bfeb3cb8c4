"""Building a clusters index: rows into clusters (`kmeans`), then a score for every cluster.

The idea and the layout are in `clusters`.
"""

import dataclasses

import torch
from torch import Tensor
from tqdm import tqdm

from flashhead.errors import FlashHeadError
from flashhead.index.calibrate import hidden_moments
from flashhead.index.clusters import ClustersIndex, always_scored
from flashhead.index.kmeans import (
    Advance,
    balanced_kmeans,
    cluster_members,
    mean_rows,
    rows_a_block,
)
from flashhead.options import ClustersOptions

INT4_CUTS = (1.0, 0.85, 0.7, 0.6)
"""Shares of a centroid's range that its int4 codes may span."""
SHRINKAGE = 0.3
"""Share of the mean variance added in every direction: rare tokens live where calibration text
does not."""
RIDGE = 1.0
"""Ridge of the centroid regression, as a share of the calibration states' mean variance. 0.1 fits
text like the calibration's better and other text worse."""


@dataclasses.dataclass(frozen=True)
class FittedClusters:
    """Clusters and their scores before the centroids are rounded; see ClustersIndex.

    Args:
        centroids: `float32[C, d]`.
        offset: `float32[C]`, added to a cluster's score.
        estimate_scale: `float32[C]`.
        estimate_offset: `float32[C]`.
        members: `int64[C, size]`.
        cluster_of: `int64[V]`.
        calibration_tokens: hidden states that shaped them.
    """

    centroids: Tensor
    offset: Tensor
    estimate_scale: Tensor
    estimate_offset: Tensor
    members: Tensor
    cluster_of: Tensor
    calibration_tokens: int


def build_clusters(
    weight: Tensor,
    options: ClustersOptions,
    hidden: Tensor | None = None,
    progress: bool = False,
    bias: Tensor | None = None,
) -> ClustersIndex:
    """Build the clusters index of a head; equals `store_clusters(fit_clusters(...), options)`.

    Args:
        weight: floating `[V, d]`, the rows of the head.
        options: everything but `probes` and `calibration_tokens` is used here.
        hidden: floating `[n, d]`, calibration hidden states of the model (a few thousand), or None:
            rows are then clustered as they are and centroids are plain means. Ignored by
            `metric="spherical"`.
        progress: show a progress bar on stderr.
        bias: floating `[V]`, the head's bias, or None.

    Raises:
        FlashHeadError: `weight` or `bias` is no finite tensor of these shapes, `hidden` does not
            fit, or `options.always` names a token beyond V.
    """
    options = with_size(options, weight.shape[0])
    return store_clusters(fit_clusters(weight, options, hidden, progress, bias), options)


def with_size(options: ClustersOptions, rows: int) -> ClustersOptions:
    """Options with `cluster_size` filled in.

    P probes of size s read V/s centroids of d bytes and P s rows of 2 d: sizes 16 and 32 cost the
    same at V = 1,024 P. The larger one finds more, as it scores twice the tokens.
    """
    if options.cluster_size is not None:
        return options
    large = options.metric == "hidden" and rows >= 1024 * options.probes
    return dataclasses.replace(options, cluster_size=32 if large else 16)


def fit_clusters(
    weight: Tensor,
    options: ClustersOptions,
    hidden: Tensor | None = None,
    progress: bool = False,
    bias: Tensor | None = None,
) -> FittedClusters:
    """Cluster the rows and fit the scores: the slow part, the same for every `centroid_dtype`.

    Arguments and errors are those of `build_clusters`.
    """
    weight, mean = _checked_weight(weight, bias)
    rows = weight.shape[0]
    options = with_size(options, rows)
    assert options.cluster_size is not None
    always_scored(options, rows)  # a mistake is told before the slow part
    if options.metric == "spherical" or hidden is None or hidden.shape[0] == 0:
        states = None
    else:
        states = hidden.detach().float().cpu()
    features = _features(weight, mean, states, options.metric)
    steps = rows * (options.iterations + (states is not None))
    with tqdm(
        total=steps, desc="clusters", unit="row", unit_scale=True, disable=not progress, leave=False
    ) as bar:
        cluster_of = balanced_kmeans(features, options, bar.update)
        members = cluster_members(cluster_of, options.cluster_size)
        del features
        scores = _fit(weight, bias, members, states, options.metric, bar.update)
    return FittedClusters(*scores, members, cluster_of, 0 if states is None else len(states))


def store_clusters(fitted: FittedClusters, options: ClustersOptions) -> ClustersIndex:
    """Round the centroids to `options.centroid_dtype` and lay out the index.

    Args:
        fitted: of `fit_clusters` with these options, but for `centroid_dtype`, `probes`, `always`.
        options: as the index will name them.

    Raises:
        FlashHeadError: `options.always` names a token beyond V.
    """
    options = dataclasses.replace(options, cluster_size=fitted.members.shape[1])
    common = fitted.centroids.mean(0)
    centroids, scale = _stored(fitted.centroids - common, options.centroid_dtype)
    always = always_scored(options, len(fitted.cluster_of))
    return ClustersIndex(
        centroids=centroids,
        centroid_scale=scale,
        centroid_offset=fitted.offset,
        common=common,
        estimate_scale=fitted.estimate_scale,
        estimate_offset=fitted.estimate_offset,
        members=fitted.members.int(),
        cluster_of=fitted.cluster_of.int(),
        always=torch.tensor(always, dtype=torch.int32),
        options=options,
        calibration_tokens=fitted.calibration_tokens,
    )


def _checked_weight(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The head on the CPU, and its mean row float64[d]."""
    if weight.dim() != 2 or 0 in weight.shape or not weight.is_floating_point():
        raise FlashHeadError(
            f"head weight is {weight.dtype}{list(weight.shape)}, wanted floating [V, d]"
        )
    weight = weight.detach().cpu()
    total = torch.zeros(weight.shape[1], dtype=torch.float64)
    for block in weight.split(rows_a_block(weight.shape[1])):
        total += block.double().sum(0)
    if not torch.isfinite(total).all():
        raise FlashHeadError("head weight holds NaN or infinity: the checkpoint is damaged")
    if bias is not None and (bias.shape != weight.shape[:1] or not torch.isfinite(bias).all()):
        raise FlashHeadError(
            f"head bias has shape {list(bias.shape)} or NaN, wanted finite [{len(weight)}]"
        )
    return weight, total / len(weight)


def _features(weight: Tensor, mean: Tensor, states: Tensor | None, metric: str) -> Tensor:
    """Rows in the space that is clustered: bfloat16[V, k]."""
    root = None
    if states is not None:
        moments = hidden_moments(states, mean)
        values, vectors = torch.linalg.eigh(moments.second_moment)
        shrunk = (values + SHRINKAGE * values.mean()) if len(values) else values
        root = (moments.complement @ (vectors * shrunk.clamp_min(0).sqrt())).float()
    blocks = []
    for block in weight.split(rows_a_block(weight.shape[1])):
        rows = block.float()
        if metric == "spherical":
            rows = torch.nn.functional.normalize(rows, dim=1)
        else:
            rows = rows - mean.float()
        blocks.append((rows if root is None else rows @ root).bfloat16())
    return torch.cat(blocks)


def _fit(
    weight: Tensor,
    bias: Tensor | None,
    members: Tensor,
    states: Tensor | None,
    metric: str,
    advance: Advance,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centroids `float32[C, d]`, offsets, estimate scales and estimate offsets `float32[C]`."""
    means = mean_rows(weight, members)
    ones, zeros = torch.ones(len(members)), torch.zeros(len(members))
    level = zeros
    if bias is not None:
        level = mean_rows(bias.detach().float().cpu()[:, None], members)[:, 0]
    if metric == "spherical":
        norms = means.norm(dim=1)
        directions = means / torch.where(norms > 0, norms, ones)[:, None]
        return directions, zeros, norms, level
    if states is None:
        return means, level, ones, zeros
    centre = states.mean(0)
    centred = (states - centre).double()
    n, d = centred.shape
    gram = centred.T @ centred
    ridge = RIDGE * gram.trace() / d
    ridge = torch.where(ridge > 0, ridge, torch.ones_like(ridge))
    solver = torch.linalg.solve(gram + ridge * torch.eye(d, dtype=torch.float64), centred.T).float()
    centroids: list[Tensor] = []
    offsets: list[Tensor] = []
    start = 0
    for block in members.split(rows_a_block(max(n, d) * members.shape[1])):
        mean = means[start : start + len(block)]
        rest = _log_sum_exp(states, weight, bias, block) - states @ mean.T
        level = rest.mean(0)
        slope = (solver @ (rest - level)).T
        centroids.append(mean + slope)
        offsets.append(level - slope @ centre)
        start += len(block)
        advance(int((block >= 0).sum()))
    counts = (members >= 0).sum(1)
    return torch.cat(centroids), torch.cat(offsets), ones, -counts.log()


def _log_sum_exp(states: Tensor, weight: Tensor, bias: Tensor | None, members: Tensor) -> Tensor:
    """Log-sum-exp of the logits of every cluster: float32[n, clusters]."""
    tokens = members.clamp_min(0)
    logits = (
        (states.to(weight.dtype) @ weight[tokens.flatten()].T)
        .float()
        .view(len(states), *members.shape)
    )
    if bias is not None:
        logits = logits + bias.detach().float().cpu()[tokens]
    return logits.masked_fill(members < 0, -torch.inf).logsumexp(2)


def _stored(centroids: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Centroids as they are stored, and their scales float32[C]."""
    if dtype == "bf16":
        return centroids.bfloat16(), torch.ones(len(centroids))
    if dtype == "int4":
        return _packed_int4(centroids)
    scale = centroids.abs().amax(1) / 127
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (centroids / scale[:, None]).round().to(torch.int8), scale


def _packed_int4(centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Packed int4 centroids `uint8[C, ceil(d/2)]` and their scales float32[C].

    With one scale for a whole centroid the largest coordinate would waste most of the 15 levels, so
    every centroid takes the cut of its range that errs least.
    """
    peak = centroids.abs().amax(1)
    peak = torch.where(peak > 0, peak, torch.ones_like(peak))
    scales = peak / 7 * torch.tensor(INT4_CUTS, dtype=torch.float32)[:, None]  # [cuts, C]
    codes = [(centroids / scale[:, None]).round().clamp(-8, 7) for scale in scales]
    errors = torch.stack(
        [
            (code * scale[:, None] - centroids).square().sum(1)
            for code, scale in zip(codes, scales, strict=True)
        ]
    )
    best = errors.argmin(0)
    each = torch.arange(len(centroids))
    chosen = torch.stack(codes)[best, each].to(torch.int8) + 8
    padded = torch.nn.functional.pad(chosen, (0, chosen.shape[1] % 2)).to(torch.uint8)
    low, high = padded.chunk(2, 1)
    return low | high << 4, scales[best, each]
