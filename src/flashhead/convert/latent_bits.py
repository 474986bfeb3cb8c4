"""How many bits each number of a latent gets: reverse water-filling over all layers' directions.

A direction's gain is what it is worth in nats; kept in b bits, `LOSS[b]` of that is lost. With a
price on bits each direction takes the width that loses least, and the price is found at which the
budget is spent.
"""

import math

from flashhead.convert.latent_factors import Piece
from flashhead.errors import FlashHeadError
from flashhead.nn.mixed_bits import BITS, LOSS, SCALE_BITS, Counts

PRICE_STEPS = 60
_WIDTHS = (*BITS, 0)


def choose_bits(
    layers: list[list[Piece]], budgets: list[int], ranks: str, step: int
) -> list[Counts]:
    """Numbers of each layer in 8, 4 and 2 bits.

    Args:
        layers: of each layer, most worth first.
        budgets: bits a token of each layer.
        ranks: "uniform" (each layer its own budget) or "budget" (one for all layers).
        step: numbers of a width are multiples of it; 4 or more.

    Raises:
        FlashHeadError: a budget that does not hold `step` numbers of every layer.
    """
    least = SCALE_BITS + BITS[-1] * step
    if min(budgets) < least:
        raise FlashHeadError(
            f"kv_ratio: a layer would keep {min(budgets)} bits a token, wanted {least} or more"
        )
    if ranks == "uniform":
        return [
            _fill([layer], budget, step)[0] for layer, budget in zip(layers, budgets, strict=True)
        ]
    return _fill(layers, sum(budgets), step)


def lost_nats(layer: list[Piece], counts: Counts) -> float:
    """What a layer loses a token: rounding of what is kept, and what is not."""
    widths = [bits for bits, n in zip(BITS, counts, strict=True) for _ in range(n)]
    widths += [0] * (len(layer) - len(widths))
    return sum(piece.gain * LOSS[bits] for piece, bits in zip(layer, widths, strict=True))


def _fill(layers: list[list[Piece]], budget: int, step: int) -> list[Counts]:
    gains = [_block_gains(layer, step) for layer in layers]
    budget -= SCALE_BITS * len(layers)
    low, high = 1e-30, max(max(blocks) for blocks in gains)
    for _ in range(PRICE_STEPS):
        price = math.sqrt(low * high)
        spent = sum(step * sum(n * b for n, b in zip(_at(blocks, price), BITS, strict=True))
                    for blocks in gains)  # fmt: skip
        low, high = (price, high) if spent > budget else (low, price)
    return [
        (step * counts[0], step * counts[1], step * counts[2])
        for counts in (_at(blocks, high) for blocks in gains)
    ]


def _block_gains(layer: list[Piece], step: int) -> list[float]:
    """Gain a number of each block of `step` directions; a last one that is not whole is dropped."""
    return [
        sum(piece.gain for piece in layer[start : start + step]) / step
        for start in range(0, len(layer) - step + 1, step)
    ]


def _at(gains: list[float], price: float) -> Counts:
    """Blocks in 8, 4 and 2 bits where a bit costs `price` nats; one at least is kept."""
    chosen = [min(_WIDTHS, key=lambda b: LOSS[b] * gain + price * b) for gain in gains]
    counts = [chosen.count(bits) for bits in BITS]
    if not any(counts):
        counts[-1] = 1
    return (counts[0], counts[1], counts[2])
