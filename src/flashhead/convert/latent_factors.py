"""From statistics to projections: which directions of keys and values a latent keeps.

Rebuilt: with covariance S and Fisher information F the loss of keeping the projection P is
tr(F (1 - P) S (1 - P)') / 2, smallest for the leading eigenvectors q of F^1/2 S F^1/2:
encoder rows q' F^1/2, up-projection columns F^-1/2 q, and the eigenvalue is what each is worth, in
nats, so directions of all layers compete for one budget.

Decoupled: the turning coordinates of pair f are one complex number a KV head, and only complex
mixes across heads commute with the rotation: the same eigenproblem over heads, for each f by
itself, each component costing two numbers. What does not turn shares the latent with the values.
"""

import dataclasses

import torch
from torch import Tensor

from flashhead.convert.latent_statistics import Statistics
from flashhead.errors import FlashHeadError
from flashhead.nn.latent_shape import LatentShape
from flashhead.nn.mixed_bits import Counts

FLOOR = 1e-5
"""Least eigenvalue of the Fisher information, of its largest: sampled, it has noise below."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """One thing that can be kept.

    Args:
        gain: nats a token that it saves.
        pair: the rotary pair of a complex component; None: a number of the latent.
        read: `[n]`, floating or complex: the component is read' x.
        write: `[n]`, likewise: it adds write times the component.
    """

    gain: float
    pair: int | None
    read: Tensor
    write: Tensor

    @property
    def cost(self) -> int:
        """Numbers a token."""
        return 1 if self.pair is None else 2


@dataclasses.dataclass(frozen=True)
class Maps:
    """Projections of one layer, float64; n as in `Statistics`.

    Args:
        shape: with its rank and components.
        read: `[width, n]`: what is kept of x - mean, rotary key first.
        key_up: `[kv_heads * fixed_dim, rank]`.
        value_up: `[kv_heads * value_dim, rank]`.
        mix: `[kv_heads, components, 2]`.
        mean: `[n]`.
    """

    shape: LatentShape
    read: Tensor
    key_up: Tensor
    value_up: Tensor
    mix: Tensor
    mean: Tensor


def pieces(statistics: Statistics, shape: LatentShape) -> list[Piece]:
    """Everything that can be kept, most worth a number first."""
    if shape.rotary == "rebuilt":
        rest = list(range(shape.kv_width))
        found: list[Piece] = []
    else:
        found, turning = [], set()
        for f in range(shape.rotary_dim // 2):
            real = [head * shape.head_dim + f for head in range(shape.kv_heads)]
            imaginary = [place + shape.rotary_dim // 2 for place in real]
            turning |= {*real, *imaginary}
            found += _complex_pieces(statistics, real, imaginary, f)
        rest = [place for place in range(shape.kv_width) if place not in turning]
    found += _real_pieces(statistics, rest)
    return sorted(found, key=lambda piece: -piece.gain / piece.cost)


def whole(shape: LatentShape) -> list[Piece]:
    """Pieces that keep everything as it is: a rebuilt latent of full rank, for trials."""
    eye = torch.eye(shape.kv_width, dtype=torch.float64)
    return [Piece(1.0, None, row, row) for row in eye]


def _real_pieces(statistics: Statistics, places: list[int]) -> list[Piece]:
    root, inverse = _roots(statistics.fisher[places][:, places])
    gains, vectors = torch.linalg.eigh(root @ statistics.covariance[places][:, places] @ root)
    size = float(gains.clamp_min(0).mean().sqrt()) or 1.0  # latents of about 1
    n, made = len(statistics.mean), []
    for gain, vector in zip(gains.tolist(), vectors.T, strict=True):
        read, write = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
        read[places], write[places] = root @ vector / size, inverse @ vector * size
        made.append(Piece(max(0.0, gain) / 2, None, read, write))
    return made


def _complex_pieces(
    statistics: Statistics, real: list[int], imaginary: list[int], pair: int
) -> list[Piece]:
    def over_heads(matrix: Tensor) -> Tensor:
        a = matrix[real][:, real] + matrix[imaginary][:, imaginary]
        b = matrix[imaginary][:, real] - matrix[real][:, imaginary]
        return torch.complex(a, b)

    root, inverse = _roots(over_heads(statistics.fisher))
    gains, vectors = torch.linalg.eigh(root @ over_heads(statistics.covariance) @ root)
    n, made = len(statistics.mean), []
    for gain, vector in zip(gains.tolist(), vectors.T, strict=True):
        read = torch.zeros(n, dtype=torch.complex128)
        write = torch.zeros(n, dtype=torch.complex128)
        size = max(gain, 1e-30) ** 0.5  # components of about 1
        read[real], write[real] = (root @ vector).conj() / size, inverse @ vector * size
        # of |g* e|^2 the real part's half counts
        made.append(Piece(max(0.0, gain) / 4, pair, read, write))
    return made


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Matrix^1/2 and its inverse."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(values[-1].clamp_min(1e-300) * FLOOR)
    roots = values.sqrt().to(vectors.dtype)
    return (vectors * roots) @ vectors.mH, (vectors / roots) @ vectors.mH


def choose(layers: list[list[Piece]], widths: list[int], ranks: str, step: int) -> list[int]:
    """How many pieces of each layer are kept.

    Args:
        layers: of each layer, most worth first.
        widths: numbers a token of each layer in the original cache, over the ratio: the budgets.
        ranks: "uniform" (each layer its own budget) or "budget" (one for all layers).
        step: pieces are taken so many at a time.

    Raises:
        FlashHeadError: a budget that does not hold `step` numbers.
    """
    if min(widths) < step:
        raise FlashHeadError(
            f"kv_ratio: a layer would keep {min(widths)} numbers a token, wanted {step} or more"
        )
    if ranks == "uniform":
        return [_fitting(layer, width, step) for layer, width in zip(layers, widths, strict=True)]
    counts, left = [step] * len(layers), sum(widths)
    left -= sum(piece.cost for layer in layers for piece in layer[:step])
    blocks = []
    for i, layer in enumerate(layers):
        for start in range(step, len(layer), step):
            block = layer[start : start + step]
            cost = sum(piece.cost for piece in block)
            blocks.append((-sum(p.gain for p in block) / cost, i, start, cost, len(block)))
    for _, i, start, cost, length in sorted(blocks):
        if start == counts[i] and cost <= left:
            counts[i] += length
            left -= cost
    return counts


def _fitting(layer: list[Piece], width: int, step: int) -> int:
    count = used = 0
    for start in range(0, len(layer), step):
        cost = sum(piece.cost for piece in layer[start : start + step])
        if used + cost > width:
            break
        used += cost
        count = min(start + step, len(layer))
    return count


def maps(
    statistics: Statistics, kept: list[Piece], shape: LatentShape, bits: Counts | None = None
) -> Maps:
    """Projections that keep these pieces; whitened, if they are to be kept in mixed `bits`.

    Raises:
        FlashHeadError: none of them is a number of the latent.
    """
    plain = [piece for piece in kept if piece.pair is None]
    turning = sorted((p for p in kept if p.pair is not None), key=lambda piece: piece.pair or 0)
    if not plain:
        raise FlashHeadError("kv_ratio: nothing is left for a latent; ask for a smaller ratio")
    if bits is not None:
        plain = [_whitened(piece, statistics.covariance) for piece in plain]
    counts = [0] * (shape.rotary_dim // 2 if shape.rotary == "decoupled" else 0)
    for piece in turning:
        counts[piece.pair or 0] += 1
    shape = dataclasses.replace(shape, rank=len(plain), components=tuple(counts), bits=bits or ())
    heads, split = shape.kv_heads, shape.kv_heads * shape.head_dim
    rows, mixes = _rotary_rows(turning, shape, len(statistics.mean))
    read = torch.cat((rows, torch.stack([piece.read for piece in plain])))
    write = torch.stack([piece.write for piece in plain], 1)
    key_up = write[:split].unflatten(0, (heads, -1))[:, shape.head_dim - shape.fixed_dim :]
    return Maps(shape, read, key_up.flatten(0, 1), write[split:], mixes, statistics.mean)


def _whitened(piece: Piece, covariance: Tensor) -> Piece:
    """The same direction, of unit variance."""
    size = float(piece.read @ covariance @ piece.read) ** 0.5 or 1.0
    return dataclasses.replace(piece, read=piece.read / size, write=piece.write * size)


def _rotary_rows(turning: list[Piece], shape: LatentShape, n: int) -> tuple[Tensor, Tensor]:
    """Rows that read real, then imaginary parts; mixes `[kv_heads, components, 2]`."""
    half = shape.rotary_dim // 2
    real, imaginary = torch.zeros(2, len(turning), n, dtype=torch.float64).unbind(0)
    mixes = torch.zeros(shape.kv_heads, len(turning), 2, dtype=torch.float64)
    for j, piece in enumerate(turning):
        for head in range(shape.kv_heads):
            place = head * shape.head_dim + (piece.pair or 0)
            a, b = piece.read[place], piece.write[place]
            real[j, place], real[j, place + half] = a.real, -a.imag
            imaginary[j, place], imaginary[j, place + half] = a.imag, a.real
            mixes[head, j, 0], mixes[head, j, 1] = b.real, b.imag
    return torch.cat((real, imaginary)), mixes
