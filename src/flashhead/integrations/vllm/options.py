"""Options of the plugin: `quantization_config`, or `flashhead_options` in `--hf-overrides`."""

import dataclasses
from typing import Any

from flashhead.errors import FlashHeadError
from flashhead.options import CodesOptions, make_options

CALIBRATIONS = ("auto", "model", "none")
SPECULATIVE_TARGETS = ("dense", "search", "greedy")
_OWN = ("index", "calibration", "crossover", "impl", "speculative_target")


@dataclasses.dataclass(frozen=True)
class PluginOptions:
    """What a user can choose.

    Args:
        index: folder with an index (`flashhead convert`); None: the model's folder, the cache, or
            a new one.
        calibration: of a new index: "model" samples text from the model once, in a process of its
            own with transformers; "none" does without and reads more bytes; "auto" falls back to
            "none" where transformers cannot load the checkpoint.
        crossover: up to how many rows the index is searched, 0 or a power of two up to 64; None:
            measured once on this machine.
        impl: "auto", "cpu", "triton" or "reference".
        speculative_target: where model runner V1 verifies drafts, it says nothing about its
            requests: "dense" computes all logits; "search" searches, and requests that need every
            logit are refused; "greedy" reads less, and all but plain greedy requests are refused.
        codes: fields of `CodesOptions`.
    """

    index: str | None = None
    calibration: str = "auto"
    crossover: int | None = None
    impl: str = "auto"
    speculative_target: str = "dense"
    codes: CodesOptions = dataclasses.field(default_factory=CodesOptions)

    def __post_init__(self) -> None:
        _require("calibration", self.calibration, CALIBRATIONS)
        _require("speculative_target", self.speculative_target, SPECULATIVE_TARGETS)
        if self.index is not None and not isinstance(self.index, str):
            raise FlashHeadError(f"index={self.index!r}: wanted a folder")


def read_options(values: dict[str, Any]) -> PluginOptions:
    """Options from a dictionary; an unknown name is an error that lists the known ones.

    Raises:
        FlashHeadError: a name or a value is wrong.
    """
    known = sorted({field.name for field in dataclasses.fields(CodesOptions)} | set(_OWN))
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise FlashHeadError(
            f"flashhead option {unknown[0]!r} is unknown: wanted one of {', '.join(known)}"
        )
    own = {name: value for name, value in values.items() if name in _OWN}
    rest = {name: value for name, value in values.items() if name not in _OWN}
    return PluginOptions(codes=make_options(CodesOptions, rest), **own)


def _require(name: str, value: object, wanted: tuple[str, ...]) -> None:
    if value not in wanted:
        raise FlashHeadError(f"{name}={value!r}: wanted one of {', '.join(wanted)}")
