"""How many tokens a selection keeps, and by how many bits a key they are found."""

import dataclasses

from flashhead.errors import FlashHeadError

BITS = (1, 2, 4)
MOST_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class SelectOptions:
    """A decode step reads so many cached tokens exactly, and codes of the keys of all.

    Args:
        tokens: that are read, the first and the last ones among them; a multiple of `block`.
        block: tokens that are chosen together; a power of two, 256 at most.
        bits: of a number of a key's code: 1, 2 or 4.
        first: tokens at the start that are always read (attention sinks, arXiv 2309.17453), rounded
            up to whole blocks.
        last: tokens at the end that are always read, the newest one among them, rounded up
            likewise; 1 or more.

    Raises:
        FlashHeadError: a value out of range, or no room for a choice.
    """

    tokens: int = 256
    block: int = 1
    bits: int = 2
    first: int = 1
    last: int = 16

    def __post_init__(self) -> None:
        for name, low in (("tokens", 1), ("block", 1), ("bits", 1), ("first", 0), ("last", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < low:
                raise FlashHeadError(f"select: {name}={value!r}: wanted an integer, {low} or more")
        if self.bits not in BITS:
            raise FlashHeadError(f"select: bits={self.bits}: wanted 1, 2 or 4")
        if self.block > MOST_BLOCK or self.block & (self.block - 1):
            raise FlashHeadError(
                f"select: block={self.block}: wanted a power of two, {MOST_BLOCK} at most"
            )
        if self.tokens % self.block:
            raise FlashHeadError(
                f"select: tokens={self.tokens}: wanted a multiple of block={self.block}"
            )
        if self.blocks <= self.first_blocks + self.last_blocks:
            raise FlashHeadError(
                f"select: tokens={self.tokens}: wanted more than the first {self.first} and the "
                f"last {self.last} take in blocks of {self.block}"
            )

    @property
    def blocks(self) -> int:
        """Blocks that are read."""
        return self.tokens // self.block

    @property
    def first_blocks(self) -> int:
        """Blocks at the start that are always read."""
        return -(-self.first // self.block)

    @property
    def last_blocks(self) -> int:
        """Blocks at the end that are always read."""
        return -(-self.last // self.block)
