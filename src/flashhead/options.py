"""Options of the two indexes, one frozen dataclass each, passed along unchanged; and the names of
the methods that an evaluation compares.
"""

import dataclasses
from typing import Any, TypeVar

from flashhead.errors import FlashHeadError

METHODS = (
    *("flashhead", "codes", "clusters", "clusters-published", "sampled", "clusters-codes"),
    *("svd", "svd-hidden", "bf16", "int8", "fp8", "int4", "int4-g128"),
)
"""What `flashhead eval` can measure, `evaluate.methods` builds it."""
TABLE_METHODS = ("flashhead", "bf16", "int8", "int4")
"""What `flashhead eval head` shows unless it is told otherwise."""
CALIBRATED_METHODS = (
    *("codes", "clusters", "clusters-published", "sampled", "clusters-codes", "svd-hidden"),
)
"""Those that need hidden states sampled from the model."""

T = TypeVar("T", "CodesOptions", "ClustersOptions")


@dataclasses.dataclass(frozen=True)
class CodesOptions:
    """Codes index: what is stored (`bits`, `seed`, calibration) and how a query searches it.

    Args:
        bits: mean bits a dimension that every query scans (survivors read 2 more); None: the
            cheapest expected.
        z: half-width of the confidence interval, in standard errors of a row's estimate.
        kl_budget: nats of expected KL(dense||flash) a token may lose to rows left at their
            estimate.
        calibration_tokens: tokens sampled from the model to learn where hidden states vary.
        seed: of the rotations and of the sampled text.
    """

    bits: float | None = None
    z: float = 4.0
    kl_budget: float = 7e-4
    calibration_tokens: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        _require(
            "bits", self.bits, self.bits is None or 0.25 <= self.bits <= 6, "0.25 to 6, or None"
        )
        _require("z", self.z, 0 < self.z <= 40, "above 0 and at most 40")
        _require("kl_budget", self.kl_budget, 0 < self.kl_budget <= 1, "above 0 and at most 1")
        _require_calibration(self.calibration_tokens)


@dataclasses.dataclass(frozen=True)
class ClustersOptions:
    """Clusters index: what is stored and how many clusters a query probes.

    Args:
        cluster_size: tokens a cluster, the same for all (the last ones are padded).
        probes: clusters whose tokens are scored exactly.
        centroid_dtype: "int8", "int4" (two a byte; one scale a centroid in both) or "bf16".
        iterations: k-means iterations.
        metric: "hidden" clusters in the metric of the hidden states, "spherical" as published.
        always: token ids that are scored whatever the probe says.
        calibration_tokens: tokens sampled from the model for `metric="hidden"`.
        seed: of the initial centroids and of the sampled text.
    """

    cluster_size: int = 16
    probes: int = 256
    centroid_dtype: str = "int8"
    iterations: int = 6
    metric: str = "hidden"
    always: tuple[int, ...] = ()
    calibration_tokens: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "always", tuple(int(token) for token in self.always))
        _require("cluster_size", self.cluster_size, 1 <= self.cluster_size <= 4096, "1 to 4096")
        _require("probes", self.probes, self.probes >= 1, "1 or more")
        _require("iterations", self.iterations, 1 <= self.iterations <= 1000, "1 to 1000")
        known = self.centroid_dtype in ("int8", "int4", "bf16")
        _require("centroid_dtype", self.centroid_dtype, known, "'int8', 'int4' or 'bf16'")
        _require(
            "metric", self.metric, self.metric in ("hidden", "spherical"), "'hidden' or 'spherical'"
        )
        _require("always", self.always, all(token >= 0 for token in self.always), "token ids >= 0")
        _require_calibration(self.calibration_tokens)


def _require(name: str, value: object, holds: bool, wanted: str) -> None:
    if not holds:
        raise FlashHeadError(f"{name}={value!r}: wanted {wanted}")


def _require_calibration(tokens: int) -> None:
    _require("calibration_tokens", tokens, 0 <= tokens <= 10**7, "0 to 10,000,000")


def make_options(cls: type[T], values: dict[str, Any]) -> T:
    """Build an options dataclass; an unknown keyword is an error that lists the known ones."""
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise FlashHeadError(
            f"unknown option {unknown[0]!r}: wanted one of {', '.join(sorted(known))}"
        )
    for field in dataclasses.fields(cls):
        value = values.get(field.name, field.default)
        if field.type is int and (not isinstance(value, int) or isinstance(value, bool)):
            raise FlashHeadError(f"{field.name}={value!r}: wanted an integer")
    try:
        return cls(**values)
    except TypeError as error:
        raise FlashHeadError(f"an option of {cls.__name__} has the wrong type: {error}") from error
