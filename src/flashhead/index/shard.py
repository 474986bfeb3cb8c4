"""Part of a codes index: the rows that one rank of a vocabulary-parallel head holds.

The transform, the bit widths and the error model are the whole head's, so that the ranks search the
same coordinates; only what is stored row by row is cut.
"""

import dataclasses

from torch import Tensor

from flashhead.errors import FlashHeadError
from flashhead.index.build_codes import row_coefficients
from flashhead.index.codes import BLOCK_ROWS, CodesIndex

_TOLERANCE = 1e-3
"""Of a coefficient against the largest: its sum in another order, on another device."""


def shard_codes(index: CodesIndex, start: int, stop: int) -> CodesIndex:
    """Rows `start` to `stop - 1` of an index.

    Args:
        index: of the whole head.
        start: first row.
        stop: row after the last.

    Raises:
        FlashHeadError: the range is empty or not within the index.
    """
    if not 0 <= start < stop <= index.vocab_size:
        raise FlashHeadError(
            f"rows {start} to {stop}: wanted a range within the index's {index.vocab_size}"
        )
    if (start, stop) == (0, index.vocab_size):
        return index
    words = index.base.shape[1]
    rows = index.base.permute(0, 2, 1, 3).reshape(-1, words, 4)[start:stop]
    blocks = -(-len(rows) // BLOCK_ROWS)
    padded = rows.new_zeros(blocks * BLOCK_ROWS, words, 4)
    padded[: len(rows)] = rows
    return dataclasses.replace(
        index,
        base=padded.view(blocks, BLOCK_ROWS, words, 4).permute(0, 2, 1, 3).contiguous(),
        refine=index.refine[:, start:stop].contiguous(),
        scale=index.scale[:, start:stop].contiguous(),
        direction=index.direction[start:stop].contiguous(),
    )


def require_rows(index: CodesIndex, weight: Tensor) -> None:
    """Check that an index belongs to these rows, where no checksum can: in a rank's part.

    Every row's coefficient along the exact direction is stored; other rows have other ones.

    Args:
        index: of `weight`, or so it is said.
        weight: floating `[V, d]`.

    Raises:
        FlashHeadError: it does not.
    """
    stored = index.direction.to(weight.device)
    found = row_coefficients(weight, index)
    worst = (found - stored).abs().max()
    if not worst <= _TOLERANCE * stored.abs().max():
        raise FlashHeadError(
            "the index was built from other rows of a head (their coefficients along its exact "
            "direction differ): convert the model again"
        )
