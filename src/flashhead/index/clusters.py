"""Clusters index: rows in equal-size clusters, the best clusters of a query scored exactly.

The published FlashHead (arXiv 2603.14591): balanced spherical k-means on the rows, all
C = ceil(V / size) centroids scored, the tokens of the best P clusters ("probes") scored exactly.
`metric="spherical"` builds that. The default, `metric="hidden"`, changes two things, both by what
the model's own hidden states show:

1. Rows are clustered by how far apart their *logits* are: k-means on (w - mean row) S^1/2, where S
   is the second moment of hidden states with the mean direction projected out (`calibrate`), shrunk
   towards the identity.
2. A cluster is worth probing for its best token, not for its average one. The centroid is a
   regression: the affine function h.c + b closest, over calibration states, to the log-sum-exp of
   the cluster's logits. All clusters share one ridge system, so this costs one pass over the logits
   of the calibration states. The score minus log(tokens of the cluster) is then the estimate of
   every token that is not probed: it keeps the cluster's mass.

Layout. Centroids are stored without their mean, `common` (int8: one scale a centroid), so
    score_j = h.common + scale_j * (h.centroids_j) + offset_j
    logit of an unprobed token of cluster j ~ score_j * estimate_scale_j + estimate_offset_j.
V need not divide by the size: free places of `members` are -1, after the tokens of their row.

Building. Balance is kept by prices (an auction, Bertsekas 1988): every row bids for its best
cluster at current prices among the nearest few, and a full cluster keeps the highest bids. Products
run in bf16, a block of rows at a time.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from flashhead.errors import FlashHeadError
from flashhead.index.calibrate import hidden_moments
from flashhead.index.checks import REMEDY, check_tensor, metadata_int
from flashhead.options import ClustersOptions, make_options

SHRINKAGE = 0.3
"""Share of the mean variance added in every direction: rare tokens live where calibration text
does not."""
NEAREST = 16
"""Clusters a row may bid for in one auction."""
BID_STEP = 0.02
"""Least raise of a bid, as a share of the rows' mean squared norm."""
AUCTION_ROUNDS = 64
AUCTIONS = 8
"""Auctions among the clusters with free places; rows left over then take places in order."""
RIDGE = 1.0
"""Ridge of the centroid regression, as a share of the calibration states' mean variance. 0.1 fits
text like the calibration's better and other text worse."""
_BLOCK_SCORES = 2**25

Advance = Callable[[int], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class ClustersIndex:
    """Clusters index of V rows of d dimensions in C clusters.

    Args:
        centroids: `int8[C, d]` or `bfloat16[C, d]`, less `common`, in units of `centroid_scale`.
        centroid_scale: `float32[C]`.
        centroid_offset: `float32[C]`, added to a cluster's score.
        common: `float32[d]`, what all centroids share.
        estimate_scale: `float32[C]`, see `estimate_offset`.
        estimate_offset: `float32[C]`: score * scale + offset estimates the logit of a token that is
            not probed.
        members: `int32[C, size]`, the tokens of a cluster, then -1.
        cluster_of: `int32[V]`, the cluster of a token.
        always: `int32[k]`, tokens that are scored whatever the probe says, ascending.
        options: as built.
        calibration_tokens: hidden states that shaped the index.
    """

    kind: ClassVar[str] = "clusters"
    centroids: Tensor
    centroid_scale: Tensor
    centroid_offset: Tensor
    common: Tensor
    estimate_scale: Tensor
    estimate_offset: Tensor
    members: Tensor
    cluster_of: Tensor
    always: Tensor
    options: ClustersOptions
    calibration_tokens: int

    @property
    def vocab_size(self) -> int:
        """Rows V of the head."""
        return int(self.cluster_of.shape[0])

    @property
    def hidden_size(self) -> int:
        """Dimensions d of the head."""
        return int(self.common.shape[0])

    @property
    def clusters(self) -> int:
        """Clusters C."""
        return int(self.members.shape[0])

    @property
    def scan_bytes(self) -> int:
        """Bytes that every query reads besides what it probes.

        Centroids, their four values, `common`, `always`, and `cluster_of` for the estimates.
        """
        score = (self.centroids, self.centroid_scale, self.centroid_offset, self.common)
        estimate = (self.estimate_scale, self.estimate_offset, self.cluster_of)
        return sum(tensor.nbytes for tensor in (*score, *estimate, self.always))

    @property
    def probe_bytes(self) -> int:
        """Bytes that probing one cluster reads besides its rows: the list of its members."""
        return 4 * int(self.members.shape[1])

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to save, by name."""
        fields = (field.name for field in dataclasses.fields(self))
        return {
            name: getattr(self, name) for name in fields if isinstance(getattr(self, name), Tensor)
        }

    def metadata(self) -> dict[str, Any]:
        """What `from_tensors` needs besides the tensors, as JSON values."""
        options = dataclasses.asdict(self.options)
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "options": options | {"always": list(self.options.always)},
            "calibration_tokens": self.calibration_tokens,
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> "ClustersIndex":
        """Rebuild a saved index.

        Raises:
            FlashHeadError: a tensor or a value is missing, of the wrong type or shape, or points
                outside the head.
        """
        rows = metadata_int(metadata, "vocab_size", 1)
        d = metadata_int(metadata, "hidden_size", 1)
        tokens = metadata_int(metadata, "calibration_tokens", 0)
        saved = metadata.get("options")
        if not isinstance(saved, dict):
            raise FlashHeadError(
                f"index metadata 'options' is {saved!r}, wanted an object: {REMEDY}"
            )
        options = make_options(ClustersOptions, saved)
        size = options.cluster_size
        count = -(-rows // size)
        dtype = torch.int8 if options.centroid_dtype == "int8" else torch.bfloat16
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "centroids": (dtype, (count, d)),
            "centroid_scale": (torch.float32, (count,)),
            "centroid_offset": (torch.float32, (count,)),
            "common": (torch.float32, (d,)),
            "estimate_scale": (torch.float32, (count,)),
            "estimate_offset": (torch.float32, (count,)),
            "members": (torch.int32, (count, size)),
            "cluster_of": (torch.int32, (rows,)),
            "always": (torch.int32, (len(_always(options, rows)),)),
        }
        checked = {name: check_tensor(tensors, name, *wanted) for name, wanted in shapes.items()}
        _check_values(checked, _always(options, rows))
        return cls(**checked, options=options, calibration_tokens=tokens)


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
    always = torch.tensor(_always(options, rows), dtype=torch.int32)
    if options.metric == "spherical" or hidden is None or hidden.shape[0] == 0:
        states = None
    else:
        states = hidden.detach().float().cpu()
    features = _features(weight, mean, states, options.metric)
    steps = rows * (options.iterations + (states is not None))
    with tqdm(
        total=steps, desc="clusters", unit="row", unit_scale=True, disable=not progress, leave=False
    ) as bar:
        cluster_of = _balanced_kmeans(features, options, bar.update)
        members = _members(cluster_of, options.cluster_size)
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


def _always(options: ClustersOptions, rows: int) -> list[int]:
    beyond = [token for token in options.always if token >= rows]
    if beyond:
        raise FlashHeadError(
            f"always={beyond[0]}: wanted token ids below the vocabulary size {rows}"
        )
    return sorted(set(options.always))


def _check_values(tensors: dict[str, Tensor], always: list[int]) -> None:
    """Raise FlashHeadError unless indexes stay inside the head and every token is held once."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise FlashHeadError(f"index tensor {name!r} holds NaN or infinity: {REMEDY}")
    members, cluster_of = tensors["members"], tensors["cluster_of"]
    rows = cluster_of.shape[0]
    if int(members.min()) < -1 or int(members.max()) >= rows:
        raise FlashHeadError(
            f"index tensor 'members' names tokens outside 0 to {rows - 1}: {REMEDY}"
        )
    used = members >= 0
    tokens = members[used].long()
    once = len(tokens) == rows and bool((torch.bincount(tokens, minlength=rows) == 1).all())
    if not once or not used[:, 0].all() or (used[:, 1:] & ~used[:, :-1]).any():
        raise FlashHeadError(
            f"index tensor 'members' does not hold every token exactly once: {REMEDY}"
        )
    if not torch.equal(cluster_of[tokens].long(), used.nonzero()[:, 0]):
        raise FlashHeadError(f"index tensors 'cluster_of' and 'members' disagree: {REMEDY}")
    if tensors["always"].tolist() != always:
        raise FlashHeadError(f"index tensor 'always' and options.always disagree: {REMEDY}")


def _checked_weight(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The head on the CPU, and its mean row float64[d]."""
    if weight.dim() != 2 or 0 in weight.shape or not weight.is_floating_point():
        raise FlashHeadError(
            f"head weight is {weight.dtype}{list(weight.shape)}, wanted floating [V, d]"
        )
    weight = weight.detach().cpu()
    total = torch.zeros(weight.shape[1], dtype=torch.float64)
    for block in weight.split(_block_rows(weight.shape[1])):
        total += block.double().sum(0)
    if not torch.isfinite(total).all():
        raise FlashHeadError("head weight holds NaN or infinity: the checkpoint is damaged")
    if bias is not None and (bias.shape != weight.shape[:1] or not torch.isfinite(bias).all()):
        raise FlashHeadError(
            f"head bias has shape {list(bias.shape)} or NaN, wanted finite [{len(weight)}]"
        )
    return weight, total / len(weight)


def _block_rows(columns: int) -> int:
    return max(1, _BLOCK_SCORES // max(1, columns))


def _features(weight: Tensor, mean: Tensor, states: Tensor | None, metric: str) -> Tensor:
    """Rows in the space that is clustered: bfloat16[V, k]."""
    root = None
    if states is not None:
        moments = hidden_moments(states, mean)
        values, vectors = torch.linalg.eigh(moments.second_moment)
        shrunk = (values + SHRINKAGE * values.mean()) if len(values) else values
        root = (moments.complement @ (vectors * shrunk.clamp_min(0).sqrt())).float()
    blocks = []
    for block in weight.split(_block_rows(weight.shape[1])):
        rows = block.float()
        if metric == "spherical":
            rows = torch.nn.functional.normalize(rows, dim=1)
        else:
            rows = rows - mean.float()
        blocks.append((rows if root is None else rows @ root).bfloat16())
    return torch.cat(blocks)


def _balanced_kmeans(features: Tensor, options: ClustersOptions, advance: Advance) -> Tensor:
    """Cluster of every row, at most `cluster_size` rows each: int64[V]."""
    rows, size = len(features), options.cluster_size
    generator = torch.Generator().manual_seed(options.seed)
    first = torch.randperm(rows, generator=generator)[: -(-rows // size)]
    centroids = features[first].float()
    norms = torch.stack(
        [block.float().square().sum() for block in features.split(_block_rows(features.shape[1]))]
    )
    step = BID_STEP * float(norms.sum()) / rows
    cluster_of = torch.zeros(rows, dtype=torch.int64)
    for _ in range(options.iterations):
        cluster_of = _assign(features, centroids, size, step, advance)
        centroids = _mean_rows(features, _members(cluster_of, size))
        if options.metric == "spherical":
            centroids = torch.nn.functional.normalize(centroids, dim=1)
    return cluster_of


def _assign(
    features: Tensor, centroids: Tensor, size: int, step: float, advance: Advance
) -> Tensor:
    """Near-best assignment with at most `size` rows a cluster: int64[V]."""
    cluster_of = torch.full((len(features),), -1)
    free = torch.full((len(centroids),), size)
    rows = torch.arange(len(features))
    for attempt in range(AUCTIONS):
        open_clusters = free.nonzero()[:, 0]
        nearest, values = _nearest(
            features, rows, centroids[open_clusters], advance if attempt == 0 else None
        )
        with _one_thread():
            owner = _auction(nearest, values, free[open_clusters], step)
        placed = owner >= 0
        cluster_of[rows[placed]] = open_clusters[owner[placed]]
        free -= torch.bincount(cluster_of[rows[placed]], minlength=len(free))
        rows = rows[~placed]
        if len(rows) == 0:
            return cluster_of
    cluster_of[rows] = torch.repeat_interleave(torch.arange(len(free)), free)[: len(rows)]
    return cluster_of


def _nearest(
    features: Tensor, rows: Tensor, centroids: Tensor, advance: Advance | None
) -> tuple[Tensor, Tensor]:
    """Nearest centroids of these rows, and x.c - |c|^2/2: int64[n, T], float32[n, T]."""
    half = centroids.square().sum(1, keepdim=True) / 2
    high = half.bfloat16()  # two bf16 columns hold |c|^2/2 to 16 bits
    low = (half - high.float()).bfloat16()
    table = torch.cat([centroids.bfloat16(), -high, -low], 1).T
    count = min(NEAREST, len(centroids))
    block_rows = min(len(rows), _block_rows(len(centroids)))
    scores = torch.empty(block_rows, len(centroids), dtype=torch.bfloat16)  # fresh pages cost more
    indices, values = [], []
    for block in rows.split(block_rows):
        chunk = torch.nn.functional.pad(features[block], (0, 2), value=1.0)
        best = torch.mm(chunk, table, out=scores[: len(block)]).topk(count, dim=1)
        indices.append(best.indices)
        values.append(best.values.float())
        if advance is not None:
            advance(len(block))
    return torch.cat(indices), torch.cat(values)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """For many small steps: on a busy machine, waiting for a second thread costs 30 x the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _auction(nearest: Tensor, values: Tensor, capacity: Tensor, step: float) -> Tensor:
    """Owner cluster of every row, or -1 where the rounds ran out first: int64[n].

    All rows without a cluster bid at once, what keeps a row from its second-best cluster plus
    `step`; a cluster keeps the highest bids, and its price is the lowest one kept once it is full.
    """
    owner = torch.full((len(nearest),), -1)
    paid = torch.zeros(len(nearest))
    price = torch.zeros(len(capacity))
    for _ in range(AUCTION_ROUNDS):
        rows = (owner < 0).nonzero()[:, 0]
        if len(rows) == 0:
            break
        options = nearest[rows]
        best = (values[rows] - price[options]).topk(min(2, options.shape[1]), dim=1)
        target = options.gather(1, best.indices[:, :1])[:, 0]
        owner[rows] = target
        paid[rows] = price[target] + best.values[:, 0] - best.values[:, -1] + step
        bidden = torch.zeros(len(capacity), dtype=torch.bool)
        bidden[target] = True
        holders = bidden[owner].nonzero()[:, 0]
        order = holders[paid[holders].argsort(descending=True, stable=True)]
        order = order[owner[order].argsort(stable=True)]
        held = owner[order]
        counts = torch.bincount(held, minlength=len(capacity))
        rank = torch.arange(len(order)) - (counts.cumsum(0) - counts)[held]
        last = rank == capacity[held] - 1
        price[held[last]] = paid[order[last]]
        owner[order[rank >= capacity[held]]] = -1
    return owner


def _members(cluster_of: Tensor, size: int) -> Tensor:
    """Tokens of every cluster in ascending order, then -1: int64[C, size]."""
    rows = len(cluster_of)
    order = cluster_of.argsort(stable=True)
    counts = torch.bincount(cluster_of, minlength=-(-rows // size))
    members = torch.full((len(counts), size), -1)
    held = cluster_of[order]
    members[held, torch.arange(rows) - (counts.cumsum(0) - counts)[held]] = order
    return members


def _mean_rows(rows: Tensor, members: Tensor) -> Tensor:
    """Mean of the rows of every cluster: float32[C, k]."""
    means = []
    for block in members.split(_block_rows(members.shape[1] * max(1, rows.shape[1]))):
        used = block >= 0
        total = (rows[block.clamp_min(0)].float() * used[:, :, None]).sum(1)
        means.append(total / used.sum(1, keepdim=True))
    return torch.cat(means)


def _fit(
    weight: Tensor,
    bias: Tensor | None,
    members: Tensor,
    states: Tensor | None,
    metric: str,
    advance: Advance,
) -> _Fitted:
    """Centroids, offsets and estimates of clusters."""
    means = _mean_rows(weight, members)
    ones, zeros = torch.ones(len(members)), torch.zeros(len(members))
    level = zeros
    if bias is not None:
        level = _mean_rows(bias.detach().float().cpu()[:, None], members)[:, 0]
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
    for block in members.split(_block_rows(max(n, d) * members.shape[1])):
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
