"""Building a codes index: moments, transform, bit allocation, then the rows a chunk at a time.

The idea, the formula and the layout are in `codes`.
"""

import dataclasses

import torch
from torch import Tensor
from tqdm import tqdm

from flashhead.errors import FlashHeadError
from flashhead.index.calibrate import HiddenMoments, hidden_moments
from flashhead.index.codes import (
    BLOCK_ROWS,
    GROUP,
    REFINE_BITS,
    CodesIndex,
    Segment,
    padded_dims,
    refine_words,
)
from flashhead.options import CodesOptions

SEGMENT_DIMS = 128
"""Most dimensions that one rotation mixes."""
_CHUNK_ROWS = 16384
_STEP = {0: 0.9957, 2: 0.2875, 4: 0.09, 6: 0.025}
"""Fine step, in standard deviations, by base bits. With 0 it is the optimal 2-bit step; else the
optimal 4-, 6-, 8-bit step cut back (4-bit: 0.335) so that the base prefix alone stays within 6 % of
the optimum of its own width."""
_DISTORTION = {0: 1.0, 2: 0.125, 4: 0.0125, 6: 0.0011}
"""Mean squared error of the base code of a unit Gaussian, by base bits."""
_REFINED_DISTORTION = {0: 0.119, 2: 0.0125, 4: 0.0011, 6: 0.0001}
"""The same with the refinement."""
BITS = (1.0, 1.5, 2.0, 2.5)
"""What `bits=None` chooses from."""
CHOICE_STATES = 128
GATHER_COST = 3
"""What a gathered byte counts against a scanned one. Measured time: 1.6 (docs/log.md); the rest is
for text that is harder than what the model samples itself."""


def build_codes(
    weight: Tensor, options: CodesOptions, hidden: Tensor | None = None, progress: bool = False
) -> CodesIndex:
    """Build the codes index of a head.

    Args:
        weight: floating `[V, d]`, the rows of the head.
        options: `bits`, `seed` are used here, the rest by the search.
        hidden: floating `[n, d]`, calibration hidden states of the model (a few thousand), or None:
            every direction counts alike then, and the index needs more bytes for the same fidelity.
        progress: show a progress bar on stderr.

    Raises:
        FlashHeadError: `weight` is no finite matrix, or `hidden` does not fit it.
    """
    if weight.dim() != 2 or weight.shape[0] < 1 or not weight.is_floating_point():
        raise FlashHeadError(
            f"head weight is {weight.dtype}{list(weight.shape)}, wanted floating [V, d]"
        )
    weight = weight.detach()
    mean, covariance = _row_moments(weight)
    moments = hidden_moments(hidden, mean)
    spectrum = _spectrum(moments, covariance)
    if options.bits is None:
        expected = expected_costs(spectrum[0], weight, options, hidden)
        options = dataclasses.replace(options, bits=min(expected, key=expected.__getitem__))
    transform, exact, segments = _design(moments, mean, spectrum, options)
    inverse = _row_transform(transform, exact)
    rows = weight.shape[0]
    parts: list[_Coded] = []
    starts = range(0, rows, _CHUNK_ROWS)
    for start in tqdm(starts, desc="codes", unit="chunk", disable=not progress, leave=False):
        centred = weight[start : start + _CHUNK_ROWS].double().sub_(mean).float()
        parts.append(_encode(centred @ inverse, segments))
    coded = _Coded(*(torch.cat(columns) for columns in zip(*map(_fields, parts), strict=True)))
    return CodesIndex(
        base=_blocked(coded.base),
        refine=coded.refine,
        scale=coded.scale,
        error=torch.stack(
            [coded.base_error.sum(1).sqrt(), coded.refined_error.sum(1).sqrt()]
        ).bfloat16(),
        direction=coded.direction,
        exact=exact,
        transform=transform,
        segments=_with_shares(segments, coded),
        options=options,
        calibration_tokens=moments.tokens,
    )


@dataclasses.dataclass(frozen=True)
class _Coded:
    """A chunk of n rows: codes as bytes, squared errors by segment."""

    base: Tensor  # uint8[n, words, 4]
    refine: Tensor  # uint8[n, refine_words, 4]
    scale: Tensor  # bfloat16[n]
    direction: Tensor  # float32[n]
    base_error: Tensor  # float32[n, segments]
    refined_error: Tensor  # float32[n, segments]


def _fields(coded: _Coded) -> tuple[Tensor, ...]:
    return tuple(getattr(coded, field.name) for field in dataclasses.fields(coded))


def _row_moments(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean row and covariance of the rows: float64[d], float64[d, d];
    one pass, checked to be finite.
    """
    rows, d = weight.shape
    total, square = torch.zeros(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
    for start in range(0, rows, _CHUNK_ROWS):
        chunk = weight[start : start + _CHUNK_ROWS].float().cpu()
        total += chunk.double().sum(0)
        square += (chunk.T @ chunk).double()
    if not (torch.isfinite(total).all() and torch.isfinite(square).all()):
        raise FlashHeadError("head weight holds NaN or infinity: the checkpoint is damaged")
    mean = total / rows
    return mean, square / rows - torch.outer(mean, mean)


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
    functionals = torch.zeros(padded_dims(d), d, dtype=torch.float64)
    functionals[: d - 1] = whiten
    variances = torch.zeros(padded_dims(d), dtype=torch.float64)
    variances[: d - 1] = spectrum.flip(0).clamp_min(0)
    return variances, functionals


def expected_costs(
    variances: Tensor, weight: Tensor, options: CodesOptions, hidden: Tensor | None
) -> dict[float, float]:
    """Cost a token, in scanned bytes, that each of BITS is expected to have, from the dense logits
    of a few calibration states.

    Gathered bytes count GATHER_COST times.

    Args:
        variances: `float64[D]`, of the whitened coordinates.
        weight: floating `[V, d]`.
        options: `z` and `kl_budget` are used.
        hidden: floating `[n, d]`, or None: 2 bits then.
    """
    rows, d = weight.shape
    if hidden is None or hidden.shape[0] == 0:
        return {2.0: 0.0}
    some = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(options.seed))
    states = hidden[some[:CHOICE_STATES]].to(weight.dtype)
    logits = torch.nn.functional.linear(states, weight).float().sort(1, descending=True).values
    mass = torch.softmax(logits, 1)
    left = mass.flip(1).cumsum(1).flip(1)  # probability of this row and all below
    expected = {}
    for bits in BITS:
        segments = _allocate(variances, bits, d)
        base, refined = (
            sum(s.groups * GROUP * s.variance * table[s.base_bits] for s in segments)
            for table in (_DISTORTION, _REFINED_DISTORTION)
        )
        gathered = 0.0
        for variance, size in (
            (base, refine_words(d) * 4 + 2),
            (refined, d * weight.element_size()),
        ):
            by_mass = left * variance / 2 > options.kl_budget / 2
            by_rank = logits >= logits[:, :1] - 2 * options.z * variance**0.5
            gathered += float((by_mass | by_rank).sum(1).double().mean()) * size
        words = sum(s.groups * s.base_bits // 2 for s in segments)
        expected[bits] = rows * (4 * words + 8) + GATHER_COST * gathered
    return expected


def _design(
    moments: HiddenMoments, mean: Tensor, spectrum: tuple[Tensor, Tensor], options: CodesOptions
) -> tuple[Tensor, Tensor, list[Segment]]:
    """Choose transform (bfloat16[D, d]), exact functionals (float32[2, d]) and bit allocation."""
    variances, padded = spectrum
    assert options.bits is not None
    exact = torch.stack([moments.direction, mean]).float()
    segments = _allocate(variances, options.bits, mean.shape[0])
    generator = torch.Generator().manual_seed(options.seed)
    start = 0
    for segment in segments:
        stop = start + segment.groups * GROUP
        gauss = torch.randn(stop - start, stop - start, generator=generator, dtype=torch.float64)
        padded[start:stop] = torch.linalg.qr(gauss)[0] @ padded[start:stop]
        start = stop
    return padded.bfloat16(), exact, segments


def _allocate(variances: Tensor, bits: float, d: int) -> list[Segment]:
    """Reverse water-filling in steps of 2 bits for 16 dimensions, then segments of equal width."""
    groups = variances.view(-1, GROUP).sum(1).tolist()
    base_bits = [0] * len(groups)
    for _ in range(max(1, round(bits * d / 2 / GROUP))):
        gains = [
            group * (_DISTORTION[b] - _DISTORTION[b + 2]) if b < 6 else -1.0
            for group, b in zip(groups, base_bits, strict=True)
        ]
        best = max(range(len(gains)), key=gains.__getitem__)
        if gains[best] < 0:
            break
        base_bits[best] += 2
    segments = []
    start = 0
    while start < len(groups):
        stop = start + 1
        while stop < len(groups) and base_bits[stop] == base_bits[start]:
            stop += 1
        pieces = -(-(stop - start) * GROUP // SEGMENT_DIMS)
        for piece in range(pieces):
            first = start + (stop - start) * piece // pieces
            last = start + (stop - start) * (piece + 1) // pieces
            variance = float(variances[first * GROUP : last * GROUP].mean())
            step = _STEP[base_bits[start]] * variance**0.5
            segments.append(Segment(last - first, base_bits[start], step, variance, 0.0, 0.0))
        start = stop
    return segments


def _row_transform(transform: Tensor, exact: Tensor) -> Tensor:
    """Map of a centred row to its coded coordinates and its exact coefficient: float32[d, D + 1].

    With A the stored (rounded) functionals, rows map by A (A'A)^-1, so that
    A h . A (A'A)^-1 w = h . w exactly.
    """
    functionals = torch.cat([transform.double(), exact[:1].double()])
    return torch.linalg.lstsq(functionals.T @ functionals, functionals.T).solution.float()


def _encode(coordinates: Tensor, segments: list[Segment]) -> _Coded:
    """Quantise rows given by their coordinates, float32[n, D + 1].

    A row's scale is its norm over that of a mean row. The likeliest scale for the segments'
    variances (every coordinate in units of its segment) measured worse: large coordinates overload.
    """
    direction, values = coordinates[:, -1].contiguous(), coordinates[:, :-1]
    energy = sum(segment.variance * segment.groups * GROUP for segment in segments)
    scale = (values.square().sum(1).sqrt() / max(energy, 1e-30) ** 0.5).bfloat16()
    unit = torch.where(scale > 0, scale, torch.ones_like(scale)).float()[:, None]
    base: list[Tensor] = []
    refine: list[Tensor] = []
    base_errors: list[Tensor] = []
    refined_errors: list[Tensor] = []
    start = 0
    for segment in segments:
        stop = start + segment.groups * GROUP
        part, step = values[:, start:stop], max(segment.step, 1e-30)
        top = 2 ** (segment.base_bits + REFINE_BITS) - 1
        code = (part / (step * unit) + (top + 1) / 2).floor_().clamp_(0, top)
        value = (code - top / 2) * step * scale.float()[:, None]
        refined_errors.append((part - value).square().sum(1))
        code = code.to(torch.uint8)
        prefix = code >> REFINE_BITS
        value = (
            (prefix.float() - (2**segment.base_bits - 1) / 2) * (4 * step) * scale.float()[:, None]
        )
        base_errors.append((part - value).square().sum(1))
        levels = range(segment.base_bits - 2, -1, -2)
        base.extend(_pack((prefix >> shift) & 3) for shift in levels)
        refine.append(_pack(code & 3))
        start = stop
    words = torch.cat(refine, 1)
    pad = -words.shape[1] % 4
    return _Coded(
        base=torch.cat(base, 1),
        refine=torch.nn.functional.pad(words, (0, 0, 0, pad)),
        scale=scale,
        direction=direction,
        base_error=torch.stack(base_errors, 1),
        refined_error=torch.stack(refined_errors, 1),
    )


def _pack(fields: Tensor) -> Tensor:
    """Two-bit fields uint8[n, 16 g] to words uint8[n, g, 4]."""
    parts = fields.view(fields.shape[0], -1, 4, 4)
    return parts[:, :, 0] | parts[:, :, 1] << 2 | parts[:, :, 2] << 4 | parts[:, :, 3] << 6


def _blocked(words: Tensor) -> Tensor:
    """Row-major words uint8[V, w, 4] to blocks of 16 rows uint8[ceil(V/16), w, 16, 4];
    missing rows are zero.
    """
    rows, count, _ = words.shape
    blocks = -(-rows // BLOCK_ROWS)
    padded = torch.nn.functional.pad(words, (0, 0, 0, 0, 0, blocks * BLOCK_ROWS - rows))
    return padded.view(blocks, BLOCK_ROWS, count, 4).transpose(1, 2).contiguous()


def _with_shares(segments: list[Segment], coded: _Coded) -> tuple[Segment, ...]:
    base, refined = coded.base_error.double().mean(0), coded.refined_error.double().mean(0)
    base, refined = base / base.sum().clamp_min(1e-30), refined / refined.sum().clamp_min(1e-30)
    return tuple(
        dataclasses.replace(segment, base_share=float(base[i]), refined_share=float(refined[i]))
        for i, segment in enumerate(segments)
    )
