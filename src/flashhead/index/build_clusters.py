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

SHRINKAGE = 0.3
"""Share of the mean variance added in every direction: rare tokens live where calibration text
does not."""
RIDGE = 1.0
"""Ridge of the centroid regression, as a share of the calibration states' mean variance. 0.1 fits
text like the calibration's better and other text worse."""


def build_clusters(
    weight: Tensor,
    options: ClustersOptions,
    hidden: Tensor | None = None,
    progress: bool = False,
    bias: Tensor | None = None,
) -> ClustersIndex:
    """Build the clusters index of a head.

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
    weight, mean = _checked_weight(weight, bias)
    rows = weight.shape[0]
    always = torch.tensor(always_scored(options, rows), dtype=torch.int32)
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
        fitted = _fit(weight, bias, members, states, options.metric, bar.update)
    common = fitted.centroids.mean(0)
    centroids, scale = _stored(fitted.centroids - common, options.centroid_dtype)
    return ClustersIndex(
        centroids=centroids,
        centroid_scale=scale,
        centroid_offset=fitted.offset,
        common=common,
        estimate_scale=fitted.estimate_scale,
        estimate_offset=fitted.estimate_offset,
        members=members.int(),
        cluster_of=cluster_of.int(),
        always=always,
        options=options,
        calibration_tokens=0 if states is None else len(states),
    )


@dataclasses.dataclass(frozen=True)
class _Fitted:
    """Scores of clusters, before storing; see ClustersIndex."""

    centroids: Tensor  # float32[C, d]
    offset: Tensor  # float32[C]
    estimate_scale: Tensor  # float32[C]
    estimate_offset: Tensor  # float32[C]


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
) -> _Fitted:
    """Centroids, offsets and estimates of clusters."""
    means = mean_rows(weight, members)
    ones, zeros = torch.ones(len(members)), torch.zeros(len(members))
    level = zeros
    if bias is not None:
        level = mean_rows(bias.detach().float().cpu()[:, None], members)[:, 0]
    if metric == "spherical":
        norms = means.norm(dim=1)
        directions = means / torch.where(norms > 0, norms, ones)[:, None]
        return _Fitted(directions, zeros, norms, level)
    if states is None:
        return _Fitted(means, level, ones, zeros)
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
    return _Fitted(torch.cat(centroids), torch.cat(offsets), ones, -counts.log())


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
    scale = centroids.abs().amax(1) / 127
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (centroids / scale[:, None]).round().to(torch.int8), scale
