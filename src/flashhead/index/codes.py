"""Codes index: every row of the head as a few bits a dimension,
more bits where the logits need them.

The idea. A logit is h.w_v. Three exact facts make it cheap to know approximately:

1. The mean row m adds h.m to every logit: one dot product. Rows are centred.
2. Most of ||h||^2 lies along one direction r, the mean hidden state. The coefficient of every row
   along it is stored as a float32, so it adds no error at all.
3. In what is left, hidden states have a steep second moment C and rows a steep covariance S. In the
   eigenbasis of C^1/2 S C^1/2 the logit is a sum of independent parts with variances lambda_i, and
   the fewest bits for a given error give dimension i about log2(lambda_i / D) / 2 bits ("reverse
   water-filling", Cover & Thomas, Elements of Information Theory, 10.3.3; for vectors known as
   transform coding). A uniform b bits in a random rotation, as in RaBitQ (arXiv 2405.12497), spends
   as much on the flat tail as on the head of the spectrum.

So hidden states are mapped by `transform` (whitening, eigenbasis, then a random rotation inside
each segment of dimensions that share a bit width) and rows by its transposed pseudo-inverse; h.w is
unchanged whatever the transform, even one rounded to bf16. Rows are coded by a uniform quantiser
with one step a segment and one scale a row.

Codes are prefix codes: of b+2 bits a dimension the first b (0, 2, 4 or 6: `base`) are scanned for
every row, the last 2 (`refine`) are read for the rows that survive. Error model: inside a segment
of n_g dimensions a coding error of norm e_g points anywhere relative to the query, so it adds the
variance ||h_g||^2 e_g^2 / n_g. Both norms are known, for each row and each query; on real models
the standardised error measures 0.99-1.01 (docs/log.md), the tests bound it.

Layout. 16 consecutive dimensions are a word of 4 bytes: dimension 4k+j is bits 2k, 2k+1 of byte j,
so `(word >> 2k) & 0x03030303` is the four codes that one dot-product instruction takes. `base` is
blocked by 16 rows for the scan, `refine` is row by row for the gather.
"""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from flashhead.errors import FlashHeadError
from flashhead.index.checks import check_tensor, metadata_int, metadata_list
from flashhead.options import CodesOptions, make_options

GROUP = 16
"""Dimensions a word."""
BLOCK_ROWS = 16
"""Rows a block of `base`."""
REFINE_BITS = 2
BASE_BITS = (0, 2, 4, 6)
"""What a segment may have."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """Dimensions that share a bit width, a step and a rotation.

    Args:
        groups: number of 16-dimension groups.
        base_bits: 0, 2, 4 or 6.
        step: fine quantiser step, before the row's scale.
        variance: mean square of a coordinate of a row of unit scale.
        base_share: share of the rows' squared base error that falls in this segment.
        refined_share: the same after the refinement.
    """

    groups: int
    base_bits: int
    step: float
    variance: float
    base_share: float
    refined_share: float


@dataclasses.dataclass(frozen=True)
class CodesIndex:
    """Codes of V rows of d dimensions; D is d - 1 rounded up to a multiple of 16.

    Args:
        base: `uint8[ceil(V/16), words, 16, 4]`, the codes scanned by every query.
        refine: `uint8[V, refine_words, 4]`, 2 more bits of every dimension; refine_words is a
            multiple of 4.
        scale: `bfloat16[V]`, scale of a row.
        error: `bfloat16[2, V]`, norm of a row's coding error from base alone, and with refine.
        direction: `float32[V]`, coefficient of a row along the exact direction.
        exact: `float32[2, d]`: the functional whose value multiplies `direction`, and the mean row.
        transform: `bfloat16[D, d]`, hidden state to coded coordinates.
        segments: the bit allocation, in order of the coordinates.
        options: as built.
        calibration_tokens: hidden states that shaped the index.
    """

    kind: ClassVar[str] = "codes"
    base: Tensor
    refine: Tensor
    scale: Tensor
    error: Tensor
    direction: Tensor
    exact: Tensor
    transform: Tensor
    segments: tuple[Segment, ...]
    options: CodesOptions
    calibration_tokens: int

    @property
    def vocab_size(self) -> int:
        """Rows V of the head."""
        return int(self.scale.shape[0])

    @property
    def hidden_size(self) -> int:
        """Dimensions d of the head."""
        return int(self.exact.shape[1])

    @property
    def scan_bytes(self) -> int:
        """Bytes that every query reads: base codes, scale, base error, direction,
        and the query transform.
        """
        rows = self.vocab_size * (2 + 2 + 4)
        return self.base.numel() + rows + 2 * self.transform.numel() + 4 * self.exact.numel()

    @property
    def refine_row_bytes(self) -> int:
        """Bytes that refining one row reads: its codes and its error."""
        return int(self.refine.shape[1]) * 4 + 2

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to save, by name."""
        names = ("base", "refine", "scale", "error", "direction", "exact", "transform")
        return {name: getattr(self, name) for name in names}

    def metadata(self) -> dict[str, Any]:
        """What `from_tensors` needs besides the tensors, as JSON values."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "options": dataclasses.asdict(self.options),
            "calibration_tokens": self.calibration_tokens,
            "segments": [list(dataclasses.astuple(segment)) for segment in self.segments],
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> "CodesIndex":
        """Rebuild a saved index.

        Raises:
            FlashHeadError: a tensor or a value is missing, or has the wrong type or shape.
        """
        rows = metadata_int(metadata, "vocab_size", 1)
        d = metadata_int(metadata, "hidden_size", 1)
        segments = tuple(_read_segment(entry) for entry in metadata_list(metadata, "segments"))
        groups = sum(segment.groups for segment in segments)
        if groups != padded_dims(d) // GROUP:
            raise FlashHeadError(
                f"index segments cover {groups} groups, wanted {padded_dims(d) // GROUP}"
            )
        words = sum(segment.groups * segment.base_bits // 2 for segment in segments)
        blocks = -(-rows // BLOCK_ROWS)
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "base": (torch.uint8, (blocks, words, BLOCK_ROWS, 4)),
            "refine": (torch.uint8, (rows, refine_words(d), 4)),
            "scale": (torch.bfloat16, (rows,)),
            "error": (torch.bfloat16, (2, rows)),
            "direction": (torch.float32, (rows,)),
            "exact": (torch.float32, (2, d)),
            "transform": (torch.bfloat16, (groups * GROUP, d)),
        }
        checked = {name: check_tensor(tensors, name, *wanted) for name, wanted in shapes.items()}
        options = make_options(CodesOptions, dict(metadata.get("options") or {}))
        tokens = metadata_int(metadata, "calibration_tokens", 0)
        return cls(**checked, segments=segments, options=options, calibration_tokens=tokens)


def padded_dims(d: int) -> int:
    """Coded dimensions D of a head of d dimensions: d - 1 rounded up to whole groups."""
    return max(GROUP, -(-(d - 1) // GROUP) * GROUP)


def refine_words(d: int) -> int:
    """Words of `refine` a row, rounded up to a multiple of 4."""
    return -(-(padded_dims(d) // GROUP) // 4) * 4


def _read_segment(entry: Any) -> Segment:
    try:
        groups, base_bits, *rest = entry
        segment = Segment(int(groups), int(base_bits), *(float(value) for value in rest))
    except (TypeError, ValueError) as error:
        raise FlashHeadError(
            f"index segment {entry!r} is not readable: convert the model again"
        ) from error
    if segment.groups < 1 or segment.base_bits not in BASE_BITS:
        raise FlashHeadError(f"index segment {entry!r} is out of range: convert the model again")
    return segment
