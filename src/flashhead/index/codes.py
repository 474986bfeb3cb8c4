"""Codes index: every row of the head as a few bits a dimension, more bits where logits need them.

The idea. A logit is h.w_v. Three exact facts make it cheap to know approximately:

1. The mean row m adds h.m to every logit: one dot product. Rows are centred.
2. Most of ||h||^2 lies along one direction r, the mean hidden state. The coefficient of every row
   along it is stored as a float32, so it adds no error at all.
3. In what is left, hidden states have a steep second moment C and rows a steep covariance S. In the
   eigenbasis of C^1/2 S C^1/2 the logit is a sum of independent parts with variances lambda_i, and
   the fewest bits for a given error give dimension i about log2(lambda_i / D) / 2 bits ("reverse
   water-filling", Cover & Thomas, Elements of Information Theory, 10.3.3; for vectors known as
   transform coding).

So hidden states are mapped by `transform` (whitening, eigenbasis, then one random rotation inside
each segment of dimensions that share a bit width) and rows by its transposed pseudo-inverse; h.w is
unchanged whatever the transform, even one rounded to bf16.

Bit planes. A query scans `base`: 1, 2 or 4 bits a dimension of every row. Each plane of `refine`
adds 2 bits a dimension for the rows that survive; the last few rows are read as they are. One index
serves every depth, because a plane refines the cell that the planes before it chose.

Why the error is known. A segment of a row is coded at its own scale, so what the quantiser sees is
a point of the unit sphere that the random rotation has made uniform, whatever the row. The scale is
set so that the code's projection onto the row has the row's length (as in RaBitQ, arXiv
2405.12497), and the thresholds of each plane so that it stays so: the error is then orthogonal to
the row and points anywhere else, for a row that is aligned with h like for any other. It adds the
variance ||h_g||^2 e^2 scale^2 / n_g, where e^2 (`Segment.error`) hardly differs between rows. A
dimension without any bit would break this: its error is the row itself, and the winning row is the
one whose parts all point along h. Measured with such dimensions: argmax rows 1-2 sigma off.

Layout. A word is 4 bytes. Of a 1-bit segment it holds 32 dimensions, dimension 4k+j in bit k of
byte j; of a 2-bit field 16 dimensions, dimension 4k+j in bits 2k, 2k+1 of byte j, so that
`(word >> k * width) & mask` are four codes that one dot-product instruction takes. A 4-bit segment
is two runs of 2-bit words, high bits first. `base` is blocked by 16 rows for the scan, `refine` is
row by row for the gather, each segment padded to 4 words; the last word of a row is a float32, its
variance at this plane over what `Segment.error` says. Few coordinates, those beyond the range of
the quantiser, make up most of it there, so it does differ between rows.
"""

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from flashhead.errors import FlashHeadError
from flashhead.index.checks import REMEDY, check_tensor, metadata_int, metadata_list
from flashhead.options import CodesOptions, make_options

UNIT = 32
"""Dimensions that are allocated together."""
BLOCK_ROWS = 16
"""Rows a block of `base`."""
REFINE_BITS = 2
BASE_BITS = (1, 2, 4)
"""What a segment may have."""
MOST_PLANES = 2


@dataclasses.dataclass(frozen=True)
class Segment:
    """Dimensions that share a bit width and a rotation; a row has one scale for them.

    Args:
        dims: number of dimensions, a multiple of 32.
        base_bits: 1, 2 or 4.
        step: step of the base code at scale 1; plane j refines it to step / 4^j.
        error: mean squared error of a row's segment at scale 1: base, then with each plane.
        worst: the largest of any row, for the deterministic bound.
        energy: largest squared length of a row's code at scale 1, for the query's rounding.
    """

    dims: int
    base_bits: int
    step: float
    error: tuple[float, ...]
    worst: tuple[float, ...]
    energy: float

    @property
    def base_words(self) -> int:
        """Words of `base` a row."""
        return self.dims * self.base_bits // 32

    @property
    def refine_words(self) -> int:
        """Words of one plane of `refine` a row, padded to 4."""
        return -(-self.dims // 64) * 4


@dataclasses.dataclass(frozen=True)
class CodesIndex:
    """Codes of V rows of d dimensions; D is d - 1 rounded up to a multiple of 32.

    Args:
        base: `uint8[ceil(V/16), words, 16, 4]`, the codes scanned by every query.
        refine: `uint8[planes, V, refine_words + 1, 4]`, 2 more bits of every dimension a plane, and
            the row's error factor.
        scale: `bfloat16[segments, V]`, scale of a row's segment.
        direction: `float32[V]`, coefficient of a row along the exact direction.
        exact: `float32[2, d]`: the functional whose value multiplies `direction`, and the mean row.
        transform: `bfloat16[D, d]`, hidden state to coded coordinates.
        segments: the bit allocation, in order of the coordinates.
        options: as built; `bits`, `planes` and `kl_budget` are what was chosen.
        calibration_tokens: hidden states that shaped the index.
    """

    kind: ClassVar[str] = "codes"
    base: Tensor
    refine: Tensor
    scale: Tensor
    direction: Tensor
    exact: Tensor
    transform: Tensor
    segments: tuple[Segment, ...]
    options: CodesOptions
    calibration_tokens: int

    @property
    def vocab_size(self) -> int:
        """Rows V of the head."""
        return int(self.direction.shape[0])

    @property
    def hidden_size(self) -> int:
        """Dimensions d of the head."""
        return int(self.exact.shape[1])

    @property
    def planes(self) -> int:
        """Planes of `refine`."""
        return int(self.refine.shape[0])

    @property
    def factor(self) -> Tensor:
        """Error factors of rows at each plane, a view of `refine`: float32[planes, V]."""
        return self.refine.view(torch.float32)[:, :, -1, 0]

    @property
    def scan_bytes(self) -> int:
        """Bytes that every query reads: base codes, scales, direction and the query transform."""
        read = (self.base, self.scale, self.direction, self.transform, self.exact)
        return sum(tensor.nbytes for tensor in read)

    @property
    def refine_row_bytes(self) -> int:
        """Bytes that one plane reads of a row."""
        return int(self.refine.shape[2]) * 4

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(iter(self.tensors().values())).device

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to save, by name."""
        names = ("base", "refine", "scale", "direction", "exact", "transform")
        return {name: getattr(self, name) for name in names}

    def to(self, device: torch.device) -> "CodesIndex":
        """The index on a device; itself if it is there."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return self if self.device == device else dataclasses.replace(self, **moved)

    def metadata(self) -> dict[str, Any]:
        """What `from_tensors` needs besides the tensors, as JSON values."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "options": dataclasses.asdict(self.options),
            "calibration_tokens": self.calibration_tokens,
            "planes": self.planes,
            "segments": [dataclasses.asdict(segment) for segment in self.segments],
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> "CodesIndex":
        """Rebuild a saved index.

        Raises:
            FlashHeadError: a tensor or a value is missing, or has the wrong type or shape.
        """
        rows = metadata_int(metadata, "vocab_size", 1)
        d = metadata_int(metadata, "hidden_size", 1)
        planes = metadata_int(metadata, "planes", 1)
        if planes > MOST_PLANES:
            raise FlashHeadError(f"index has {planes} planes, wanted at most {MOST_PLANES}")
        entries = metadata_list(metadata, "segments")
        segments = tuple(_read_segment(entry, planes) for entry in entries)
        dims = sum(segment.dims for segment in segments)
        if dims != padded_dims(d):
            raise FlashHeadError(
                f"index segments cover {dims} dimensions, wanted {padded_dims(d)}: {REMEDY}"
            )
        words = sum(segment.base_words for segment in segments)
        refine_words = sum(segment.refine_words for segment in segments)
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "base": (torch.uint8, (-(-rows // BLOCK_ROWS), words, BLOCK_ROWS, 4)),
            "refine": (torch.uint8, (planes, rows, refine_words + 1, 4)),
            "scale": (torch.bfloat16, (len(segments), rows)),
            "direction": (torch.float32, (rows,)),
            "exact": (torch.float32, (2, d)),
            "transform": (torch.bfloat16, (dims, d)),
        }
        checked = {name: check_tensor(tensors, name, *wanted) for name, wanted in shapes.items()}
        for name, tensor in checked.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise FlashHeadError(f"index tensor {name!r} holds NaN or infinity: {REMEDY}")
        factor = checked["refine"].view(torch.float32)[:, :, -1, 0]
        if not (torch.isfinite(factor).all() and (factor >= 0).all()):
            raise FlashHeadError(f"index tensor 'refine' holds wrong error factors: {REMEDY}")
        options = make_options(CodesOptions, dict(metadata.get("options") or {}))
        tokens = metadata_int(metadata, "calibration_tokens", 0)
        return cls(**checked, segments=segments, options=options, calibration_tokens=tokens)


def padded_dims(d: int) -> int:
    """Coded dimensions D of a head of d dimensions: d - 1 rounded up to whole units."""
    return max(UNIT, -(-(d - 1) // UNIT) * UNIT)


def _read_segment(entry: Any, planes: int) -> Segment:
    try:
        segment = Segment(
            dims=int(entry["dims"]),
            base_bits=int(entry["base_bits"]),
            step=float(entry["step"]),
            error=tuple(float(value) for value in entry["error"]),
            worst=tuple(float(value) for value in entry["worst"]),
            energy=float(entry["energy"]),
        )
    except (TypeError, ValueError, KeyError) as error:
        raise FlashHeadError(f"index segment {entry!r} is not readable: {REMEDY}") from error
    numbers = (segment.step, segment.energy, *segment.error, *segment.worst)
    if (
        segment.dims < UNIT
        or segment.dims % UNIT
        or segment.base_bits not in BASE_BITS
        or {len(segment.error), len(segment.worst)} != {planes + 1}
        or not all(math.isfinite(number) and number >= 0 for number in numbers)
    ):
        raise FlashHeadError(f"index segment {entry!r} is out of range: {REMEDY}")
    return segment
