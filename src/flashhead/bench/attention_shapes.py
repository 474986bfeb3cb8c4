"""Shapes of attention that are timed: full caches and the latent that stands for them; no torch."""

import dataclasses

from flashhead.errors import FlashHeadError

FORMATS = ("bf16", "fp8", "int8", "int4")
"""How latents are kept."""


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """Sizes of one layer's attention.

    Args:
        heads: of the query.
        head_dim: numbers of a query, key or value.
        kv_heads: of the smaller full cache (GQA); the larger has as many as `heads`.
        rank: numbers of a latent.
        rope: numbers of the rotary key beside it; 0: none.

    Raises:
        FlashHeadError: a value out of range.
    """

    heads: int
    head_dim: int
    kv_heads: int
    rank: int
    rope: int

    def __post_init__(self) -> None:
        limits = {"heads": 256, "head_dim": 256, "kv_heads": 256, "rank": 1024}
        for name, most in limits.items():
            if not 1 <= getattr(self, name) <= most:
                raise FlashHeadError(f"{name}={getattr(self, name)}: wanted 1 to {most}")
        if not 0 <= self.rope <= 128:
            raise FlashHeadError(f"rope={self.rope}: wanted 0 to 128")
        if self.heads % self.kv_heads:
            raise FlashHeadError(f"kv_heads={self.kv_heads}: wanted a divisor of {self.heads}")

    def full_bytes(self, kv_heads: int) -> int:
        """Bytes of a token's keys and values in bf16."""
        return 2 * 2 * kv_heads * self.head_dim


SHAPES = {
    "mha-7b": AttentionShape(32, 128, 8, 1024, 64),
    "mha-7b-512": AttentionShape(32, 128, 8, 512, 64),
    "deepseek-v2-lite": AttentionShape(16, 128, 16, 512, 64),
    "deepseek-v3": AttentionShape(128, 128, 128, 512, 64),
    "smollm2-135m": AttentionShape(9, 64, 3, 192, 0),
}


def parse_shape(text: str) -> AttentionShape:
    """A name of `SHAPES`, or `heads=32,head_dim=128,kv_heads=8,rank=1024,rope=64`.

    Raises:
        FlashHeadError: neither.
    """
    if text in SHAPES:
        return SHAPES[text]
    names = [field.name for field in dataclasses.fields(AttentionShape)]
    pairs = dict(part.partition("=")[::2] for part in text.split(","))
    if set(pairs) != set(names) or not all(value.isdecimal() for value in pairs.values()):
        wanted = ",".join(f"{name}=N" for name in names)
        raise FlashHeadError(f"shape {text!r}: wanted one of {', '.join(SHAPES)} or {wanted}")
    return AttentionShape(**{name: int(value) for name, value in pairs.items()})
