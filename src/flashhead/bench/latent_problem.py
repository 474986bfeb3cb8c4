"""Latent decode problems on a device, in several copies, and how wrong an answer is."""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from flashhead.bench.device_timing import copies_needed
from flashhead.ops.latent_decode import reference
from flashhead.ops.latent_decode.api import latent_decode
from flashhead.ops.latent_decode.rows import Rows

GROUP = 64


def errors_of(
    out: Tensor, reference_of: Callable[[int, torch.dtype], Tensor]
) -> tuple[float, float]:
    """Relative errors against float64, row by row the largest: of `out`, and of eager torch in
    bfloat16.

    Args:
        out: floating `[batch, ...]`.
        reference_of: a row's answer in a dtype.
    """
    own, rough = 0.0, 0.0
    for row in range(len(out)):
        right, eager = (reference_of(row, dtype) for dtype in (torch.float64, torch.bfloat16))
        size = right.norm()
        own = max(own, float((out[row].double() - right).norm() / size))
        rough = max(rough, float((eager.double() - right).norm() / size))
    return own, rough


@dataclasses.dataclass(frozen=True)
class LatentProblem:
    """One decode step's attention, on random numbers of unit variance.

    Args:
        query: `bf16[batch, heads, rank + rope]`.
        latents, rotaries: copies of the cache, equal, on different memory; no rotary key: None.
        lengths: `int32[batch]`, all the context.
        scale: of the scores, so that they have a standard deviation of 1.
    """

    query: Tensor
    latents: list[Rows]
    rotaries: list[Rows | None]
    lengths: Tensor
    scale: float

    @property
    def bytes_read(self) -> int:
        """Bytes of the cache that one step reads."""
        width = self.latents[0].token_bytes
        rotary = self.rotaries[0]
        width += 0 if rotary is None else rotary.token_bytes
        return int(self.lengths.sum()) * width

    def attend(self, number: int, **options: object) -> Tensor:
        """Call number i on the copy of its turn: `bf16[batch, heads, rank]`."""
        turn = number % len(self.latents)
        return latent_decode(
            self.query,
            self.latents[turn],
            self.lengths,
            scale=self.scale,
            rotary=self.rotaries[turn],
            **options,  # type: ignore[arg-type]
        )[0]

    def errors(self, out: Tensor) -> tuple[float, float]:
        """As `errors_of`."""
        return errors_of(out, self._reference)

    def _reference(self, row: int, dtype: torch.dtype) -> Tensor:
        index = torch.tensor([row], device=self.query.device)
        rotary = self.rotaries[0]
        given = (self.query[index], self.latents[0].take(index))
        turned = None if rotary is None else rotary.take(index)
        seen = (self.lengths[index], None, None, None)
        return reference.latent_decode(given[0], given[1], turned, *seen, self.scale, dtype)[0][0]


def make_latent_problem(
    batch: int,
    context: int,
    heads: int,
    rank: int,
    rope: int,
    kind: str,
    l2_bytes: int,
    device: str = "cuda",
) -> LatentProblem:
    """Random numbers; so many copies that no call finds its cache in the L2 cache.

    Args:
        batch: rows.
        context: tokens of each.
        heads: of the attention.
        rank: numbers of a latent.
        rope: numbers of a rotary key; 0: none.
        kind: how latents are kept; the rotary key stays bfloat16.
        l2_bytes: of the device.
        device: where.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    # row by row: quantising takes several times the memory
    parts = [Rows.of(normal(1, context, rank), kind, GROUP) for _ in range(batch)]
    latent = _stacked(parts)
    rotary = Rows.of(normal(batch, context, rope)) if rope else None
    width = latent.token_bytes + (0 if rotary is None else rotary.token_bytes)
    copies = copies_needed(batch * context * width, l2_bytes)
    return LatentProblem(
        normal(batch, heads, rank + rope),
        [latent, *(_copied(latent) for _ in range(copies - 1))],
        [rotary] + [None if rotary is None else _copied(rotary) for _ in range(copies - 1)],
        torch.full((batch,), context, dtype=torch.int32, device=device),
        1 / math.sqrt(rank + rope),
    )


def _stacked(parts: list[Rows]) -> Rows:
    first = parts[0]
    codes = torch.cat([part.codes for part in parts])
    scales = [part.scale for part in parts if part.scale is not None]
    return Rows(codes, first.width, first.kind, torch.cat(scales) if scales else None)


def _copied(rows: Rows) -> Rows:
    scale = None if rows.scale is None else rows.scale.clone()
    return Rows(rows.codes.clone(), rows.width, rows.kind, scale)
