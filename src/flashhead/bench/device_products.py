"""torch's quantised products on a CUDA device, each in the way that is fastest at a batch size.

A quantised head has codes and one or more ways to multiply by them: torch's own kernel, or what
torch.compile makes of the eager expression. A way that this torch or device lacks is left out and
said so; one that runs is compared with the float32 product of the rows its codes stand for, and a
wrong one ends the run.

- int8, weight-only: one scale a row.
- fp8 (e4m3) weights and hidden states, one scale a row or one in all; hidden states are rounded in
  the call, their rows padded to 16.
- int4, weight-only: groups of 128 dimensions, or what divides d.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashhead.bench.device_timing import quick_us
from flashhead.bench.products import (
    CHECKED_ROWS,
    Product,
    check_product,
    int4_codes,
    int4_group,
    int4_rows,
    int8_codes,
    int8_rows,
)

FP8 = torch.float8_e4m3fn
FP8_ROWS = 16
"""Rows of hidden states are padded to a multiple of this."""
LACKING = (RuntimeError, AttributeError, TypeError)
"""What torch raises for an operator that it or the device does not have."""
INT4_TILES = (8, 4, 2)
"""Tiles of 16 dimensions that the int4 kernel packs together, tried from the fastest."""
Expression = Callable[..., Tensor]
"""Hidden states `[n, d]` and the tensors of the codes to logits `[n, V]`."""


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to multiply.

    Args:
        name: "torch.compile" or an operator's.
        run: the product.
        options: of torch.compile; None: it runs as it is.
        batches: smallest and largest batch it is for.
    """

    name: str
    run: Expression
    options: dict[str, Any] | None = None
    batches: tuple[int, int] = (1, 2**31)


@dataclasses.dataclass(frozen=True)
class Codes:
    """A quantised head: what a call reads, the first rows that stands for, ways to multiply."""

    name: str
    tensors: tuple[Tensor, ...]
    rows: Tensor
    ways: tuple[Way, ...]
    seen: Product = lambda hidden: hidden.float()

    @property
    def bytes_read(self) -> int:
        """Bytes that a call reads."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The fastest way at a batch size; `run` takes hidden states and a copy of `codes.tensors`."""

    codes: Codes
    way: str
    run: Expression


@dataclasses.dataclass(frozen=True)
class Quantised:
    """All codes of a kind, and why there are no more."""

    codes: list[Codes]
    reasons: list[str]


def quantise(kind: str, weight: Tensor) -> Quantised:
    """Codes of a kind ("int8", "fp8" or "int4") of `bf16[V, d]`."""
    make = {"int8": _int8, "fp8": _fp8, "int4": _int4}[kind]
    try:
        codes = list(make(weight))
    except LACKING as error:
        return Quantised([], [f"packing: {_first_words(error)}"])
    return Quantised(codes, [] if codes else ["no group of dimensions divides d"])


def choose_way(
    quantised: Quantised, hidden: Tensor, weight: Tensor
) -> tuple[Chosen | None, list[str]]:
    """The fastest of the ways that run at this batch, if one does, and why others do not.

    Args:
        quantised: of `quantise`.
        hidden: `bf16[n, d]`, one batch.
        weight: `bf16[V, d]`.

    Raises:
        RuntimeError: a product is wrong.
    """
    batch, reasons = len(hidden), list(quantised.reasons)
    best: tuple[float, Chosen | None] = (float("inf"), None)
    for codes in quantised.codes:
        for way in codes.ways:
            if not way.batches[0] <= batch <= way.batches[1]:
                continue
            run = way.run
            if way.options is not None:
                run = torch.compile(run, dynamic=False, options=way.options)
            try:
                run(hidden, *codes.tensors)
                torch.cuda.synchronize()
            except LACKING as error:
                reasons.append(f"{codes.name}, {way.name}: {_first_words(error)}")
                continue
            product = _bound(run, codes.tensors)
            check_product(
                f"{codes.name}, {way.name}", product, codes.rows, weight, codes.seen, batch
            )
            taken = quick_us(lambda _, product=product: product(hidden))  # type: ignore[misc]
            best = min(best, (taken, Chosen(codes, way.name, run)), key=lambda pair: pair[0])
    return best[1], reasons


def _first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _bound(run: Expression, tensors: tuple[Tensor, ...]) -> Product:
    return lambda hidden: run(hidden, *tensors)


def _int8(weight: Tensor) -> Iterator[Codes]:
    def reduction(hidden: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        return ((codes.float() * hidden.float()).sum(1) * scales.float())[None].to(hidden.dtype)

    def product(hidden: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        return F.linear(hidden, codes.to(hidden.dtype)) * scales

    def operator(hidden: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(hidden, codes, scales)

    tensors = int8_codes(weight)
    ways = (
        Way("torch.compile", reduction, {}, (1, 1)),
        Way("torch.compile", product, {}, (2, 2**31)),
        Way("_weight_int8pack_mm", operator),
    )
    yield Codes("int8 weight-only", tensors, int8_rows(*tensors), ways)


def _fp8(weight: Tensor) -> Iterator[Codes]:
    def product(hidden: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        padded = F.pad(hidden, (0, 0, 0, -len(hidden) % FP8_ROWS))
        states, own = _to_fp8(padded, 0 if scales.dim() == 0 else 1)
        # scales [rows, 1] and [1, V], or one of each
        other = scales if scales.dim() == 0 else scales[None]
        logits = torch._scaled_mm(
            states, codes.T, own, other, out_dtype=hidden.dtype, use_fast_accum=True
        )
        return logits[: len(hidden)]

    for name, dim in (("rowwise", 1), ("tensorwise", 0)):
        codes = torch.empty_like(weight, dtype=FP8)
        scales = _fp8_scale(weight, dim)
        for start in range(0, len(weight), 2**14):
            block = slice(start, start + 2**14)
            unit = scales[block] if dim else scales
            codes[block] = (weight[block].float() / unit).to(FP8)
        scales = scales[:, 0] if dim else scales
        first = scales[:CHECKED_ROWS, None] if dim else scales

        def seen(hidden: Tensor, dim: int = dim) -> Tensor:
            states, own = _to_fp8(hidden, dim)
            return states.float() * own

        rows = codes[:CHECKED_ROWS].float() * first
        ways = (Way(f"_scaled_mm, {name}, compiled", product, {}),)
        yield Codes("fp8", (codes, scales), rows, ways, seen)


def _fp8_scale(values: Tensor, dim: int) -> Tensor:
    """Scale of each row `[n, 1]`, or of all values `[]`: float32."""
    peak = values.abs().amax(1, keepdim=True) if dim else values.abs().amax()
    return (peak.float() / torch.finfo(FP8).max).clamp(min=1e-12)


def _to_fp8(values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    scale = _fp8_scale(values, dim)
    return (values.float() / scale).to(FP8), scale


def _int4(weight: Tensor) -> Iterator[Codes]:
    rows, d = weight.shape
    group = int4_group(d)
    tiles = next((tiles for tiles in INT4_TILES if d % (16 * tiles) == 0), None)
    if group is None or tiles is None:
        return
    codes, pairs = int4_codes(weight, group, -(-rows // 8) * 8)
    bytes_ = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(bytes_, tiles)

    def operator(hidden: Tensor, packed: Tensor, pairs: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm(hidden, packed, group, pairs)[:, :rows]

    stands_for = int4_rows(codes, pairs)[:rows]
    name = f"int4 weight-only, group {group}"
    yield Codes(name, (packed, pairs), stands_for, (Way("_weight_int4pack_mm", operator),))
