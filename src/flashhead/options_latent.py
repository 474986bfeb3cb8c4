"""Options of latent attention, checked once and passed along."""

import dataclasses
from pathlib import Path

from flashhead.errors import FlashHeadError
from flashhead.nn.latent_shape import ROTARY
from flashhead.nn.token_store import KINDS

RANKS = ("budget", "uniform")
DEVICES = ("cpu", "cuda")


@dataclasses.dataclass(frozen=True)
class LatentOptions:
    """How attention is made latent.

    Args:
        kv_ratio: numbers a token in the original cache over numbers kept, 1 or more; with "mixed"
            bytes over bytes.
        kv_dtype: how the cache keeps them: "bf16", "fp8", "int8", "int4" or "mixed".
        rotary: "rebuilt" or "decoupled" (`nn.latent`).
        ranks: "budget" (layers compete for one budget) or "uniform".
        calibration: text files; none: text that the model samples.
        calibration_tokens: how much of it is read.
        seed: of the sampling and the statistics.
        device: "cpu" or "cuda", where text is sampled and statistics are taken.

    Raises:
        FlashHeadError: a value out of range.
    """

    kv_ratio: float = 2.0
    kv_dtype: str = "bf16"
    rotary: str = "rebuilt"
    ranks: str = "budget"
    calibration: tuple[Path, ...] = ()
    calibration_tokens: int = 8192
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not 1 <= self.kv_ratio <= 1024:
            raise FlashHeadError(f"kv_ratio={self.kv_ratio}: wanted a number from 1 to 1024")
        choices_of = {
            "kv_dtype": KINDS,
            "rotary": ROTARY,
            "ranks": RANKS,
            "device": DEVICES,
        }
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                raise FlashHeadError(
                    f"{name}={getattr(self, name)!r}: wanted one of {', '.join(choices)}"
                )
        if self.kv_dtype == "mixed" and self.rotary != "rebuilt":
            raise FlashHeadError("kv_dtype='mixed': wanted rotary='rebuilt' with it")
        if self.calibration_tokens < 256:
            raise FlashHeadError(
                f"calibration_tokens={self.calibration_tokens}: wanted 256 or more"
            )
