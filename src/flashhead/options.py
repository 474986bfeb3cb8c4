"""Options of the two indexes and of sampling, one frozen dataclass each, passed along unchanged."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

from flashhead.errors import FlashHeadError

QUANTIZE = {"w4a16": "W4A16", "w8a16": "W8A16", "w8a8-int8": "INT8", "fp8": "FP8_DYNAMIC"}
"""Layouts of linear layers, by our names, and compressed-tensors' names of them: bits of weights
and activations; fp8 and int8 activations are rounded as they come, one scale a token.
"""
QUANTIZE_GROUPS = (128, 64, 32)
"""Weights that share a scale in 4 bits: the first of these that divides all layers."""
CALIBRATION_TOKENS = 4096
"""Sampled from the model, for an index that is kept."""
T = TypeVar("T", "CodesOptions", "ClustersOptions")


@dataclasses.dataclass(frozen=True)
class CodesOptions:
    """Codes index: what is stored, and how a query searches it.

    Args:
        bits: mean bits a dimension that every query scans, 1 to 4; None: the cheapest expected.
        planes: planes of 2 more bits for the rows that survive, 1 or 2; None: the cheaper expected.
        failure_probability: that a token called certain is not the winner, at most; 0: a
            deterministic bound, which reads several times as much.
        kl_budget: nats of expected KL(dense||flash) a token may lose to rows left at their
            estimate; None: 0.6 times what an int8 head is expected to lose.
        calibration_tokens: tokens sampled from the model to learn where hidden states vary.
        seed: of the rotations and of the sampled text.
    """

    bits: float | None = None
    planes: int | None = None
    failure_probability: float = 1e-6
    kl_budget: float | None = None
    calibration_tokens: int = CALIBRATION_TOKENS
    seed: int = 0

    def __post_init__(self) -> None:
        bits, budget = self.bits, self.kl_budget
        _require("bits", bits, bits is None or 1 <= bits <= 4, "1 to 4, or None")
        _require("planes", self.planes, self.planes in (1, 2, None), "1, 2 or None")
        require_failure_probability(self.failure_probability)
        in_range = budget is None or 0 < budget <= 1
        _require("kl_budget", budget, in_range, "above 0 and at most 1, or None")
        _require_calibration(self.calibration_tokens)


@dataclasses.dataclass(frozen=True)
class ClustersOptions:
    """Clusters index: what is stored and how many clusters a query probes.

    Args:
        cluster_size: tokens a cluster, the same for all (the last ones are padded); None: 16 as
            published, or 32 where `metric="hidden"` then reads no more (V >= 1,024 probes).
        probes: clusters whose tokens are scored exactly.
        centroid_dtype: "int8", "int4" (two a byte; one scale a centroid in both) or "bf16".
        iterations: k-means iterations.
        metric: "hidden" clusters in the metric of the hidden states, "spherical" as published.
        always: token ids that are scored whatever the probe says.
        calibration_tokens: tokens sampled from the model for `metric="hidden"`.
        seed: of the initial centroids and of the sampled text.
    """

    cluster_size: int | None = None
    probes: int = 256
    centroid_dtype: str = "int8"
    iterations: int = 6
    metric: str = "hidden"
    always: tuple[int, ...] = ()
    calibration_tokens: int = CALIBRATION_TOKENS
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "always", tuple(int(token) for token in self.always))
        size = self.cluster_size
        _require("cluster_size", size, size is None or 1 <= size <= 4096, "1 to 4096, or None")
        _require("probes", self.probes, self.probes >= 1, "1 or more")
        _require("iterations", self.iterations, 1 <= self.iterations <= 1000, "1 to 1000")
        known = self.centroid_dtype in ("int8", "int4", "bf16")
        _require("centroid_dtype", self.centroid_dtype, known, "'int8', 'int4' or 'bf16'")
        _require(
            "metric", self.metric, self.metric in ("hidden", "spherical"), "'hidden' or 'spherical'"
        )
        _require("always", self.always, all(token >= 0 for token in self.always), "token ids >= 0")
        _require_calibration(self.calibration_tokens)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen from its logits, in the order in which transformers does it.

    Penalties change raw logits, then come temperature, top_k, top_p, min_p and typical_p, each on
    what the one before it left. `nn/sampling.py` says what is exact, certified or estimated.

    Args:
        temperature: logits are divided by it; 0: greedy, and the filters below are of no effect.
        top_k: keep the k best (and what ties with the last of them); None: all.
        top_p: keep the fewest best tokens whose probabilities sum to this; None or 1: all.
        min_p: keep tokens at least this times as probable as the best; None or 0: all.
        typical_p: keep the tokens whose -log p is closest to the entropy, until their probabilities
            sum to this; None or 1: all.
        repetition_penalty: positive logits of tokens seen (prompt and text) are divided by it,
            negative ones multiplied; 1: none.
        frequency_penalty: subtracted from a logit once per occurrence in the text generated.
        presence_penalty: subtracted once from logits of tokens that occur in the text generated.
        seed: of the noise, 0 to 2^64 - 1: equal seeds and steps give equal tokens.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require_real("temperature", self.temperature, lambda t: t >= 0, "0 (greedy) or more")
        _require_integer("top_k", self.top_k, lambda k: k >= 1, "an integer, 1 or more, or None")
        share = "above 0 and at most 1, or None"
        _require_real("top_p", self.top_p, lambda p: 0 < p <= 1, share)
        _require_real("min_p", self.min_p, lambda p: 0 <= p <= 1, "0 to 1, or None")
        _require_real("typical_p", self.typical_p, lambda p: 0 < p <= 1, share)
        for name in ("temperature", "repetition_penalty", "frequency_penalty", "presence_penalty"):
            _require(name, getattr(self, name), getattr(self, name) is not None, "a number")
        _require_real("repetition_penalty", self.repetition_penalty, lambda r: r > 0, "above 0")
        for name in ("frequency_penalty", "presence_penalty"):
            _require_real(name, getattr(self, name), lambda _: True, "a finite number")
        _require("seed", self.seed, self.seed is not None, "an integer")
        _require_integer("seed", self.seed, lambda s: 0 <= s < 2**64, "an integer, 0 to 2^64 - 1")

    @property
    def penalises(self) -> bool:
        """Whether logits of tokens seen change."""
        penalties = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        return penalties != (1, 0, 0)

    @property
    def filters(self) -> bool:
        """Whether a filter may forbid tokens."""
        shares = (self.top_p or 1) < 1 or (self.min_p or 0) > 0 or (self.typical_p or 1) < 1
        return self.temperature > 0 and (self.top_k is not None or shares)


def _require(name: str, value: object, holds: bool, wanted: str) -> None:
    if not holds:
        raise FlashHeadError(f"{name}={value!r}: wanted {wanted}")


def require_failure_probability(value: float) -> None:
    """Raise FlashHeadError unless it is a probability below one half."""
    _require("failure_probability", value, 0 <= value < 0.5, "0 or above, below 0.5")


def _require_real(name: str, value: Any, holds: Callable[[Any], bool], wanted: str) -> None:
    """A finite number for which `holds`, or None."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    known = value is None or (number and math.isfinite(value) and holds(value))
    _require(name, value, known, wanted)


def _require_integer(name: str, value: Any, holds: Callable[[Any], bool], wanted: str) -> None:
    """An integer for which `holds`, or None."""
    integer = isinstance(value, int) and not isinstance(value, bool)
    _require(name, value, value is None or (integer and holds(value)), wanted)


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
