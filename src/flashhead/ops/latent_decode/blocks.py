"""How a latent decode is cut up into programs.

The number of splits follows from the batch and the longest row that the caller allows, never from
lengths on the device.
"""

import dataclasses
import functools

from flashhead.errors import FlashHeadError

MOST_SPLITS = 256
SHARED_BYTES = 227 * 1024
"""Of a program, on compute capability 9.0."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is cut up; None: chosen from the shape.

    Args:
        hopper: the kernel in Gluon for compute capability 9.0 (`hopper`), where it takes the shape.
        heads: of a program, 16 or more, a power of two.
        splits: of each row's tokens.
        tokens: of a tile, 16 or more, a power of two; 64 with `hopper`.
        warps: of a program; 8 with `hopper`.
        stages: tiles that are on their way at once; not with `hopper`.
        fast: nibbles are widened four bytes at once, in assembly of NVIDIA's GPUs; always with
            `hopper`.
    """

    hopper: bool | None = None
    heads: int | None = None
    splits: int | None = None
    tokens: int | None = None
    warps: int | None = None
    stages: int | None = None
    fast: bool | None = None


@dataclasses.dataclass(frozen=True)
class Cut:
    """`Blocks` with every choice made."""

    hopper: bool
    heads: int
    splits: int
    tokens: int
    warps: int
    stages: int
    fast: bool


def choose_splits(programs: int, tiles: int, multiprocessors: int) -> int:
    """Splits that finish first: rounds of all multiprocessors, times tiles of each and 2 for
    starting and merging; of equal ones the fewest.
    """
    most = max(1, min(tiles, MOST_SPLITS))

    def cost(splits: int) -> int:
        rounds = -(-programs * splits // multiprocessors)
        return rounds * (-(-tiles // splits) + 2)

    return min(range(1, most + 1), key=lambda splits: (cost(splits), splits))


@functools.lru_cache(maxsize=4096)
def choose_cut(
    blocks: Blocks,
    rank: int,
    rope: int,
    batch: int,
    heads: int,
    longest: int,
    unfit: str,
    multiprocessors: int,
    limit: int,
    fast: bool,
) -> Cut:
    """Make the choices that `blocks` leaves open.

    Args:
        blocks: what is given.
        rank: numbers of a latent.
        rope: numbers of a rotary key.
        batch: rows.
        heads: of each.
        longest: tokens of the longest row.
        unfit: why `hopper` cannot take this, or "".
        multiprocessors: of the device.
        limit: bytes of shared memory that a program may have.
        fast: whether the device has NVIDIA's assembly.

    Raises:
        FlashHeadError: `hopper` was asked for and cannot.
    """
    hopper = not unfit if blocks.hopper is None else blocks.hopper
    if hopper and unfit:
        raise FlashHeadError(f"blocks.hopper: {unfit}")
    if hopper and (blocks.tokens or 64, blocks.warps or 8) != (64, 8):
        raise FlashHeadError(f"{blocks}: hopper has 64 tokens and 8 warps")
    own, tokens, stages = _tile(blocks, rank, rope, heads, limit)
    if hopper:
        own, tokens = block_heads(blocks, rank, heads), 64
    splits = blocks.splits or choose_splits(
        batch * -(-heads // own), max(1, -(-longest // tokens)), multiprocessors
    )
    wide = _power_of_two(rank) * own >= 16384
    warps = blocks.warps or (8 if hopper or wide else 4)
    return Cut(
        hopper, own, splits, tokens, warps, stages, fast if blocks.fast is None else blocks.fast
    )


def block_heads(blocks: Blocks, rank: int, heads: int) -> int:
    """Heads of a program: so many sums as registers hold."""
    return blocks.heads or max(16, min(32 if rank > 512 else 64, _power_of_two(heads)))


def _tile(blocks: Blocks, rank: int, rope: int, heads: int, limit: int) -> tuple[int, int, int]:
    """Heads, tokens and stages of `_split_kernel`: the largest whose queries and tiles fit into
    `limit` bytes of shared memory; if none does, the smallest.
    """
    padded = _power_of_two(max(16, rank)) + (_power_of_two(max(16, rope)) if rope else 0)
    own = block_heads(blocks, rank, heads)
    for block in [own] if blocks.heads else [n for n in (64, 32, 16) if n <= own]:
        for tokens in [blocks.tokens] if blocks.tokens else (64, 32, 16):
            for stages in [blocks.stages] if blocks.stages else (3, 2):
                tiles = stages - 1 if tokens < 64 else stages  # products of 64 run on
                if 2 * padded * (block + tiles * tokens) + 4096 <= limit:
                    return block, tokens, stages
    return blocks.heads or 16, blocks.tokens or 16, blocks.stages or 2


def _power_of_two(n: int) -> int:
    """The lowest that is not below n."""
    return 1 << (n - 1).bit_length()
