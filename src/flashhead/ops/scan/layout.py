"""Where the GPU kernels find things: an index of at most one segment of each bit width.

Segments lie in the order 4, 2, 1 bits ("slots" 0, 1, 2), any of them may be missing. The query is
packed once for all kernels, int8 coordinates four to a word, field by field, so that word w of a
plane of codes meets word w of the same field:

    pack(D, width)[field][word], byte j = q[word * 32 / width + 4 * field + j]      (0 beyond D)

for slots 0, 1, 2 at two bits (planes of `refine`, and the base of slots 0 and 1), then slot 2 at
one bit (its base). The words of a field are padded to multiples of 4, as in `refine`. A query alone
is packed once more as bit planes for binary products (`triton_bits`), int32[packed_words / 4, 8]
for each group of four fields (`pack_table`) and each bit of the coordinates. The numbers
of a query (`NUMBER_*`) are float32[32]:

    mult_g = step of the query * step of the segment     qsum_g = sum of q
    s_v = sum_g scale_gv mult_g (q.k - centre_g qsum_g) + direction_v along + shift
    plane j adds sum_g scale_gv mult_g / 4^j (q.f_j - 1.5 qsum_g)
"""

import dataclasses

import torch
from torch import Tensor

from flashhead.errors import FlashHeadError
from flashhead.index.codes import CodesIndex

FIELD_WORDS = 4
"""Words of a field are padded to multiples of this."""
SLOT_BITS = (4, 2, 1)
NUMBERS = 32
NUMBER_MULT, NUMBER_QSUM, NUMBER_ALONG, NUMBER_SHIFT, NUMBER_FLOOR = 0, 3, 6, 7, 8
NUMBER_SPREAD, NUMBER_SPREAD_FINE, NUMBER_VARIANCE, NUMBER_VARIANCE_FINE = 9, 12, 15, 18


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes that kernels are compiled for.

    Args:
        d4: dimensions of the 4-bit segment, 0: there is none.
        d2: of the 2-bit segment.
        d1: of the 1-bit segment.
        planes: of `refine`.
    """

    d4: int
    d2: int
    d1: int
    planes: int

    @property
    def dims(self) -> tuple[int, int, int]:
        """Dimensions by slot."""
        return self.d4, self.d2, self.d1

    @property
    def words(self) -> int:
        """Words of `base` a row."""
        return self.d4 // 8 + self.d2 // 16 + self.d1 // 32

    @property
    def refine_words(self) -> int:
        """Words of a plane a row, its error factor not counted."""
        return sum(-(-d // 64) * 4 for d in self.dims)

    @property
    def plane_groups(self) -> tuple[int, int, int]:
        """Groups of fields of a query as bit planes; those before the two-bit segment's, and
        before the one-bit segment's.
        """
        two_bits = [padded_words(d, 2) for d in self.dims]
        return self.packed_words // 4, two_bits[0], sum(two_bits)

    @property
    def packed_words(self) -> int:
        """Words of a packed query."""
        return sum(4 * padded_words(d, 2) for d in self.dims) + 8 * padded_words(self.d1, 1)


def padded_words(dims: int, width: int) -> int:
    """Words of a field, padded."""
    return -(-dims * width // 32 // FIELD_WORDS) * FIELD_WORDS


def make_layout(index: CodesIndex) -> Layout:
    """Layout of an index.

    Raises:
        FlashHeadError: two segments of the same width, or not in falling order.
    """
    widths = [segment.base_bits for segment in index.segments]
    if widths != [bits for bits in SLOT_BITS if bits in widths]:
        raise FlashHeadError(
            f"impl='triton': the index has segments of {widths} bits, wanted falling widths, each "
            "once: convert the model again"
        )
    dims = {segment.base_bits: segment.dims for segment in index.segments}
    return Layout(dims.get(4, 0), dims.get(2, 0), dims.get(1, 0), index.planes)


def pack_table(layout: Layout, device: torch.device) -> Tensor:
    """How a query is packed: int32[3 packed_words + 1].

    The fields of a word follow each other here, four to a group: two-bit words are one group,
    one-bit words two. For each: coordinate of its first byte or -1 for padding; its place in the
    packed query; the bit of the codes' word that its first coordinate meets. Then how many fields
    the one-bit section has.
    """
    rows: list[list[Tensor]] = [[], [], []]
    at, starts = 0, (0, layout.d4, layout.d4 + layout.d2)
    for slot, width in ((0, 2), (1, 2), (2, 2), (2, 1)):
        dims, fields = layout.dims[slot], torch.arange(8 // width)[None]
        words = torch.arange(padded_words(dims, width))[:, None]
        inside = words * (32 // width) < dims
        first = starts[slot] + words * (32 // width) + 4 * fields
        rows[0].append(torch.where(inside, first, -1).flatten())
        rows[1].append((at + fields * len(words) + words).flatten())
        rows[2].append((fields * width + 0 * words).flatten())
        at += len(words) * fields.numel()
    ones = torch.tensor([8 * padded_words(layout.d1, 1)])
    return torch.cat([*(torch.cat(row) for row in rows), ones]).to(torch.int32).to(device)


def constants_of(index: CodesIndex, device: torch.device) -> Tensor:
    """What the query kernel needs of the segments: float32[3 slots, 8]: step, centre, energy, size,
    error at the base and with all planes, worst error at both.
    """
    rows = torch.zeros(len(SLOT_BITS), 8, dtype=torch.float32)
    for segment in index.segments:
        rows[SLOT_BITS.index(segment.base_bits)] = torch.tensor(
            [
                segment.step,
                (2**segment.base_bits - 1) / 2,
                segment.energy,
                segment.dims,
                segment.error[0],
                segment.error[-1],
                segment.worst[0],
                segment.worst[-1],
            ],
            dtype=torch.float32,
        )
    return rows.to(device)
