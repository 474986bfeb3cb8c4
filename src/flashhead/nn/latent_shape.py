"""The sizes of a latent attention, as a folder writes them down."""

import dataclasses
from typing import Any

from flashhead.errors import FlashHeadError

ROTARY = ("rebuilt", "decoupled")


@dataclasses.dataclass(frozen=True)
class LatentShape:
    """Sizes and switches of one `LatentAttention`.

    Args:
        hidden_size: d of the residual stream.
        heads: query heads.
        kv_heads: heads of keys and values; divides `heads`.
        head_dim: coordinates of a query and of a key.
        value_dim: coordinates of a value.
        rank: r, numbers of the latent that a token keeps.
        rotary_dim: coordinates of a key that turn, from the first on; even.
        rotary: "rebuilt" (turning coordinates are rebuilt from the latent where they are read) or
            "decoupled" (a small rotary key is kept beside the latent, and nothing is rebuilt).
        components: decoupled only: complex components kept for each of the rotary_dim / 2 pairs.
        scale: of the scores.
        window: tokens that a query sees, itself among them; None: all before it.
        query_bias: a bias in the query projection.
        output_bias: a bias in the output projection.
        encoder: "hidden" (the latent is linear in the hidden state) or "keys" (linear in
            normed keys and values: models that norm their keys).
        norm: RMSNorm on the latent.
        key_constant: a constant part of the keys, which no cache holds.
        bits: numbers of the latent that the kind mixed keeps in 8, 4 and 2 bits; (): not made for
            it.

    Raises:
        FlashHeadError: sizes that do not fit each other.
    """

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    rank: int
    rotary_dim: int
    rotary: str = "rebuilt"
    components: tuple[int, ...] = ()
    scale: float = 1.0
    window: int | None = None
    query_bias: bool = False
    output_bias: bool = False
    encoder: str = "hidden"
    norm: bool = False
    key_constant: bool = True
    bits: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._require_sizes()
        if self.rotary not in ROTARY:
            raise FlashHeadError(f"rotary={self.rotary!r}: wanted one of {', '.join(ROTARY)}")
        if self.encoder not in ("hidden", "keys"):
            raise FlashHeadError(f"encoder={self.encoder!r}: wanted hidden or keys")
        if self.heads % self.kv_heads:
            raise FlashHeadError(f"kv_heads={self.kv_heads}: wanted a divisor of {self.heads}")
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise FlashHeadError(
                f"rotary_dim={self.rotary_dim}: wanted an even number, {self.head_dim} at most"
            )
        pairs = self.rotary_dim // 2 if self.rotary == "decoupled" else 0
        if len(self.components) != pairs or any(
            not 0 <= count <= self.kv_heads for count in self.components
        ):
            raise FlashHeadError(
                f"components={self.components}: wanted {pairs} counts from 0 to {self.kv_heads}"
            )
        if self.rank > self.kv_width:
            raise FlashHeadError(
                f"rank={self.rank}: wanted at most {self.kv_width}, all of keys and values"
            )
        if self.bits:
            self._require_bits()

    def _require_sizes(self) -> None:
        least = {"hidden_size": 1, "heads": 1, "kv_heads": 1, "head_dim": 1, "value_dim": 1}
        for name, low in {**least, "rank": 1, "rotary_dim": 0}.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= 1 << 20:
                raise FlashHeadError(f"{name}={value!r}: wanted an integer from {low} to {1 << 20}")
        if self.window is not None and (type(self.window) is not int or self.window < 1):
            raise FlashHeadError(f"window={self.window!r}: wanted a positive integer or None")
        if not isinstance(self.scale, float) or not 0 < self.scale < float("inf"):
            raise FlashHeadError(f"scale={self.scale!r}: wanted a positive number")

    def _require_bits(self) -> None:
        divisors = (1, 2, 4)
        whole = len(self.bits) == 3 and all(
            type(n) is int and n >= 0 and n % d == 0
            for n, d in zip(self.bits, divisors, strict=True)
        )
        if not whole or sum(self.bits) != self.rank or self.rotary != "rebuilt":
            raise FlashHeadError(
                f"bits={self.bits}: wanted counts in 8, 4 and 2 bits, the second even, the third a "
                f"multiple of 4, {self.rank} in all, with rebuilt keys"
            )

    @property
    def counts(self) -> tuple[int, int, int] | None:
        """`bits`, or None if the latent was not made for them."""
        return (self.bits[0], self.bits[1], self.bits[2]) if self.bits else None

    @property
    def kv_width(self) -> int:
        """Numbers a token that keys and values of all heads would take."""
        return self.kv_heads * (self.head_dim + self.value_dim)

    @property
    def rotary_width(self) -> int:
        """Numbers a token of the decoupled rotary key."""
        return 2 * sum(self.components)

    @property
    def width(self) -> int:
        """Numbers a token in the cache."""
        return self.rank + self.rotary_width

    @property
    def fixed_dim(self) -> int:
        """Coordinates of a head's key that come from the latent."""
        return self.head_dim - (self.rotary_dim if self.rotary == "decoupled" else 0)

    def to_json(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            **dataclasses.asdict(self),
            "components": list(self.components),
            "bits": list(self.bits),
        }

    @classmethod
    def from_json(cls, values: Any) -> "LatentShape":
        """Read what `to_json` wrote.

        Raises:
            FlashHeadError: a field that is missing, unknown or out of range.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            wanted = ", ".join(sorted(names))
            raise FlashHeadError(f"flashhead_latent: a layer's fields: wanted {wanted}")
        lists = {name: values[name] for name in ("components", "bits")}
        for name, value in lists.items():
            if not isinstance(value, list) or any(type(c) is not int for c in value):
                raise FlashHeadError(f"{name}={value!r}: wanted a list of integers")
        for name in ("query_bias", "output_bias", "norm", "key_constant"):
            if type(values[name]) is not bool:
                raise FlashHeadError(f"{name}={values[name]!r}: wanted true or false")
        return cls(**{**values, **{name: tuple(value) for name, value in lists.items()}})
