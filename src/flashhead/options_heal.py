"""Options of healing, checked once and passed along."""

import dataclasses
from typing import Any

from flashhead.errors import FlashHeadError

STAGES = {"a": ("a",), "b": ("b",), "both": ("a", "b")}
SHARE_OF_A = 0.25
"""Of the tokens, when both stages run."""


@dataclasses.dataclass(frozen=True)
class HealOptions:
    """How a folder is healed.

    Args:
        tokens: trained on in all stages, counting repetitions.
        stage: "a", "b" or "both".
        batch_tokens: of one step.
        micro_tokens: of these at a time; gradients of a step are summed. It bounds memory.
        row_tokens: of one row of text.
        text_tokens: different tokens of text, at most.
        text_share: of the time limit that sampling may take.
        minutes: stop with a checkpoint after so long; None: no limit.
        rate_a: largest learning rate of stage a.
        rate_b: of stage b.
        seed: of text and order.

    Raises:
        FlashHeadError: a value out of range.
    """

    tokens: int
    stage: str = "both"
    batch_tokens: int = 16384
    micro_tokens: int = 4096
    row_tokens: int = 512
    text_tokens: int = 10_000_000
    text_share: float = 0.4
    minutes: float | None = None
    rate_a: float = 5e-4
    rate_b: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise FlashHeadError(f"stage={self.stage!r}: wanted one of {', '.join(STAGES)}")
        for name in ("tokens", "batch_tokens", "micro_tokens", "row_tokens", "text_tokens"):
            if getattr(self, name) < 16:
                raise FlashHeadError(f"{name}={getattr(self, name)}: wanted 16 or more")
        for name in ("rate_a", "rate_b"):
            if not 0 < getattr(self, name) < 1:
                raise FlashHeadError(f"{name}={getattr(self, name)}: wanted a number from 0 to 1")

    @property
    def stages(self) -> tuple[str, ...]:
        """Stages in order."""
        return STAGES[self.stage]

    @property
    def rates(self) -> dict[str, float]:
        """Largest learning rate of each stage."""
        return {"a": self.rate_a, "b": self.rate_b}

    def stage_tokens(self, stage: str) -> int:
        """Tokens of one stage."""
        if self.stage != "both":
            return self.tokens
        first = int(self.tokens * SHARE_OF_A)
        return first if stage == "a" else self.tokens - first

    def settings(self) -> dict[str, Any]:
        """What an interrupted run must share with the one that goes on."""
        names = ("tokens", "stage", "batch_tokens", "row_tokens", "rate_a", "rate_b", "seed")
        return {name: getattr(self, name) for name in names}

    def with_minutes(self, minutes: float) -> "HealOptions":
        """The same with another time limit."""
        return dataclasses.replace(self, minutes=minutes)
