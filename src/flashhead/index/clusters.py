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

Layout. Centroids are stored without their mean, `common` (integers: one scale a centroid), so
    score_j = h.common + scale_j * (h.centroids_j) + offset_j
    logit of an unprobed token of cluster j ~ score_j * estimate_scale_j + estimate_offset_j.
int4 centroids are two a byte: byte k holds dimension k in its low half and dimension ceil(d/2) + k
in its high half, each plus 8, so that a kernel walks the hidden state in two straight lines. V need
not divide by the size: free places of `members` are -1, after the tokens of their row.
"""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from flashhead.errors import FlashHeadError
from flashhead.index.checks import REMEDY, check_tensor, metadata_int
from flashhead.options import ClustersOptions, make_options

CENTROID_DTYPES = {"int8": torch.int8, "int4": torch.uint8, "bf16": torch.bfloat16}
"""How `options.centroid_dtype` is stored."""


@dataclasses.dataclass(frozen=True, eq=False)
class ClustersIndex:
    """Clusters index of V rows of d dimensions in C clusters.

    Args:
        centroids: `int8[C, d]`, `bfloat16[C, d]` or packed int4 `uint8[C, ceil(d/2)]`, less
            `common`, in units of `centroid_scale`.
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

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(iter(self.tensors().values())).device

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to save, by name."""
        fields = (field.name for field in dataclasses.fields(self))
        return {
            name: getattr(self, name) for name in fields if isinstance(getattr(self, name), Tensor)
        }

    def to(self, device: torch.device) -> "ClustersIndex":
        """The index on a device; itself if it is there."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return self if self.device == device else dataclasses.replace(self, **moved)

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
        if size is None:
            raise FlashHeadError(f"index metadata 'cluster_size' is missing: {REMEDY}")
        count = -(-rows // size)
        dtype = CENTROID_DTYPES[options.centroid_dtype]
        width = -(-d // 2) if dtype == torch.uint8 else d
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "centroids": (dtype, (count, width)),
            "centroid_scale": (torch.float32, (count,)),
            "centroid_offset": (torch.float32, (count,)),
            "common": (torch.float32, (d,)),
            "estimate_scale": (torch.float32, (count,)),
            "estimate_offset": (torch.float32, (count,)),
            "members": (torch.int32, (count, size)),
            "cluster_of": (torch.int32, (rows,)),
            "always": (torch.int32, (len(always_scored(options, rows)),)),
        }
        checked = {name: check_tensor(tensors, name, *wanted) for name, wanted in shapes.items()}
        _check_values(checked, always_scored(options, rows))
        return cls(**checked, options=options, calibration_tokens=tokens)


def always_scored(options: ClustersOptions, rows: int) -> list[int]:
    """Ids of `options.always`, ascending, once each; FlashHeadError if one is beyond `rows`."""
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
