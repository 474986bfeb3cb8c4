"""Building a codes index: moments, transform, bit allocation, then the rows a chunk at a time.

The idea, the formula and the layout are in `codes`, the choice of bits in `choose`.
"""

import dataclasses
import math

import torch
from torch import Tensor
from tqdm import tqdm

from flashhead.errors import FlashHeadError
from flashhead.index.calibrate import HiddenMoments, hidden_moments
from flashhead.index.choose import Expectation, allocate, choose
from flashhead.index.codes import (
    BASE_BITS,
    BLOCK_ROWS,
    UNIT,
    CodesIndex,
    Segment,
    padded_dims,
)
from flashhead.index.quantize import Quantizer, fit_quantizer, quantize
from flashhead.options import CodesOptions

_CHUNK_ROWS = {"cpu": 4096, "cuda": 16384}
"""Rows coded at a time: on a CPU so few that they stay in its caches, and so many that threads that
wait for each other on a busy machine do so seldom.
"""
_COVARIANCE_ROWS = 32768
"""Rows the covariance is taken of, spread over the vocabulary: many times the dimensions."""
_FIT_ROWS = 2048


def build_codes(
    weight: Tensor, options: CodesOptions, hidden: Tensor | None = None, progress: bool = False
) -> CodesIndex:
    """Build the codes index of a head.

    Args:
        weight: floating `[V, d]`, the rows of the head.
        options: `bits`, `planes`, `kl_budget` (each may be left to `choose`) and `seed`.
        hidden: floating `[n, d]`, calibration hidden states of the model (a few thousand), or None:
            every direction counts alike then, and the index needs more bytes for the same fidelity.
        progress: show a progress bar on stderr.

    Returns:
        The index, on the device of `weight`, where it is built.

    Raises:
        FlashHeadError: `weight` is no finite matrix, or `hidden` does not fit it.
    """
    return build_codes_expecting(weight, options, hidden, progress)[0]


def build_codes_expecting(
    weight: Tensor, options: CodesOptions, hidden: Tensor | None = None, progress: bool = False
) -> tuple[CodesIndex, Expectation]:
    """`build_codes`, and what the choice of bits and planes is expected to cost."""
    if weight.dim() != 2 or weight.shape[0] < 1 or not weight.is_floating_point():
        raise FlashHeadError(
            f"head weight is {weight.dtype}{list(weight.shape)}, wanted floating [V, d]"
        )
    weight = weight.detach()
    hidden = None if hidden is None else hidden.detach().to(weight.device)
    mean, covariance = _row_moments(weight)
    moments = hidden_moments(hidden, mean)
    variances, functionals = _spectrum(moments, covariance)
    variances = variances.cpu()  # a few thousand numbers, looked at one by one
    expected = choose(variances, weight, options, hidden)
    options = expected.options
    assert options.bits is not None
    assert options.planes is not None
    order, widths = _ordered(allocate(variances, options.bits), variances)
    transform = _rotated(functionals[order], widths, options.seed).bfloat16()
    exact = torch.stack([moments.direction, mean]).float()
    inverse = _row_transform(transform, exact)
    dims = [count for count, _ in widths]
    some = _centred(_spread_rows(weight, _FIT_ROWS), exact) @ inverse[:, :-1]
    quantizers = [
        fit_quantizer(part, bits, options.planes)
        for part, (_, bits) in zip(some.split(dims, 1), widths, strict=True)
    ]
    parts: list[_Coded] = []
    chunks = weight.split(_chunk_rows(weight))
    for chunk in tqdm(chunks, desc="codes", unit="chunk", disable=not progress, leave=False):
        coordinates = _centred(chunk, exact) @ inverse
        parts.append(_encode(coordinates[:, -1], coordinates[:, :-1].split(dims, 1), quantizers))
    segments = _segments(widths, quantizers, parts)
    index = CodesIndex(
        base=_blocked(torch.cat([part.base for part in parts])),
        refine=torch.cat([_with_factors(part, segments) for part in parts], 1),
        scale=torch.cat([part.scale for part in parts], 1),
        direction=torch.cat([part.direction for part in parts]),
        exact=exact,
        transform=transform,
        segments=segments,
        options=options,
        calibration_tokens=moments.tokens,
    )
    return index, expected


def row_coefficients(weight: Tensor, index: CodesIndex) -> Tensor:
    """What `index.direction` holds of these rows: float32[V].

    Args:
        weight: floating `[V, d]`.
        index: of a head that they are rows of; its transform says which direction.
    """
    device = weight.device
    exact = index.exact.to(device)
    functional = _row_transform(index.transform.to(device), exact)[:, -1]
    chunks = weight.detach().split(_chunk_rows(weight))
    return torch.cat([_centred(chunk, exact) @ functional for chunk in chunks])


@dataclasses.dataclass(frozen=True)
class _Coded:
    """A chunk of n rows: codes as bytes; errors and energies at scale 1, NaN for zero segments."""

    base: Tensor  # uint8[n, words, 4]
    refine: Tensor  # uint8[planes, n, refine_words, 4]
    scale: Tensor  # bfloat16[segments, n]
    direction: Tensor  # float32[n]
    errors: Tensor  # float32[segments, planes + 1, n]
    energy: Tensor  # float32[segments, n]


def _row_moments(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean row, and covariance of rows spread over the vocabulary: float64[d], float64[d, d];
    all rows are checked to be finite.
    """
    total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for chunk in weight.split(_chunk_rows(weight)):
        total += chunk.float().sum(0).double()
    if not torch.isfinite(total).all():
        raise FlashHeadError("head weight holds NaN or infinity: the checkpoint is damaged")
    mean = total / weight.shape[0]
    some = _spread_rows(weight, _COVARIANCE_ROWS).float() - mean.float()
    return mean, (some.T @ some).double() / len(some)


def _chunk_rows(weight: Tensor) -> int:
    return _CHUNK_ROWS["cpu" if weight.device.type == "cpu" else "cuda"]


def _spread_rows(weight: Tensor, most: int) -> Tensor:
    """At most so many rows at equal distances."""
    return weight[:: -(-len(weight) // most)]


def _centred(rows: Tensor, exact: Tensor) -> Tensor:
    """Rows less the stored mean row: float32[n, d]."""
    return rows.float() - exact[1]


def _spectrum(moments: HiddenMoments, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Variances of the whitened coordinates in descending order (float64[D], padded by zeros), and
    their functionals (float64[D, d]).
    """
    d = covariance.shape[0]
    values, vectors = torch.linalg.eigh(moments.second_moment)
    root, inverse_root = values.clamp_min(1e-30).sqrt(), values.clamp_min(1e-30).rsqrt()
    half = moments.complement @ (vectors * root)  # C^1/2 up to a rotation: float64[d, d-1]
    inner = half.T @ covariance @ half
    spectrum, basis = torch.linalg.eigh((inner + inner.T) / 2)
    whiten = (moments.complement @ (vectors * inverse_root) @ basis.flip(1)).T  # float64[d-1, d]
    functionals = whiten.new_zeros(padded_dims(d), d)
    functionals[: d - 1] = whiten
    variances = spectrum.new_zeros(padded_dims(d))
    variances[: d - 1] = spectrum.flip(0).clamp_min(0)
    return variances, functionals


def _ordered(bits: list[int], variances: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
    """Coordinates by falling bit width, `int64[D]`, and (dims, bits) of each segment."""
    units = torch.arange(len(variances)).view(-1, UNIT)
    wide = [b for b in sorted(BASE_BITS, reverse=True) if b in bits]
    picked = [units[torch.tensor([own == b for own in bits])].flatten() for b in wide]
    return torch.cat(picked), [(len(part), b) for part, b in zip(picked, wide, strict=True)]


def _rotated(functionals: Tensor, widths: list[tuple[int, int]], seed: int) -> Tensor:
    """A random rotation inside each segment, of numbers drawn on the CPU: float64[D, d]."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for part in functionals.split([dims for dims, _ in widths]):
        gauss = torch.randn(len(part), len(part), generator=generator, dtype=torch.float64)
        parts.append(torch.linalg.qr(gauss.to(part.device))[0] @ part)
    return torch.cat(parts)


def _row_transform(transform: Tensor, exact: Tensor) -> Tensor:
    """Map of a centred row to its coded coordinates and its exact coefficient: float32[d, D + 1].

    With A the stored (rounded) functionals, rows map by A (A'A)^-1, so that
    A h . A (A'A)^-1 w = h . w exactly.
    """
    functionals = torch.cat([transform.double(), exact[:1].double()])
    return torch.linalg.lstsq(functionals.T @ functionals, functionals.T).solution.float()


def _encode(direction: Tensor, values: tuple[Tensor, ...], quantizers: list[Quantizer]) -> _Coded:
    coded = [quantize(part, own) for part, own in zip(values, quantizers, strict=True)]
    return _Coded(
        base=torch.cat([words for own in coded for words in own.base], 1),
        refine=torch.cat([own.refine for own in coded], 2),
        scale=torch.stack([own.scale for own in coded]),
        direction=direction.clone(),
        errors=torch.stack([own.errors for own in coded]),
        energy=torch.stack([own.energy for own in coded]),
    )


def _blocked(words: Tensor) -> Tensor:
    """Row-major words uint8[V, w, 4] to blocks of 16 rows uint8[ceil(V/16), w, 16, 4];
    missing rows are zero.
    """
    rows, count, _ = words.shape
    blocks = -(-rows // BLOCK_ROWS)
    padded = torch.nn.functional.pad(words, (0, 0, 0, 0, 0, blocks * BLOCK_ROWS - rows))
    return padded.view(blocks, BLOCK_ROWS, count, 4).transpose(1, 2).contiguous()


def _with_factors(part: _Coded, segments: tuple[Segment, ...]) -> Tensor:
    """Planes of a chunk with each row's error factor as a last word.

    The factor will multiply the variance from the query's rounding too, so that is taken into
    account: its step is about sqrt(2 ln n_g) / 127 root mean squares of h_g.
    """
    squares = part.scale.float().square()
    wanted = squares.new_tensor([segment.error[1:] for segment in segments])  # [segments, planes]
    rounding = squares.new_tensor([2 * math.log(s.dims) / 127**2 / 12 * s.energy for s in segments])
    actual = (part.errors[:, 1:].nan_to_num(0) * squares[:, None]).sum(0)  # [planes, n]
    own = rounding @ squares
    modelled = wanted.T @ squares + own
    factor = torch.where(modelled > 0, (actual + own) / modelled, 1.0)
    words = factor.contiguous().view(torch.uint8).view(*factor.shape, 1, 4)
    return torch.cat([part.refine, words], 2)


def _segments(
    widths: list[tuple[int, int]], quantizers: list[Quantizer], parts: list[_Coded]
) -> tuple[Segment, ...]:
    errors = torch.cat([part.errors for part in parts], 2).double()
    energy = torch.cat([part.energy for part in parts], 1)
    mean, worst = errors.nanmean(2).nan_to_num(0), errors.nan_to_num(0).amax(2)
    return tuple(
        Segment(
            dims=dims,
            base_bits=bits,
            step=quantizers[g].step,
            error=tuple(mean[g].tolist()),
            worst=tuple(worst[g].tolist()),
            energy=float(energy[g].nan_to_num(0).max()),
        )
        for g, (dims, bits) in enumerate(widths)
    )
