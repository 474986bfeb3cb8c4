"""The search of a codes index on a GPU: its operators, and the index as they take it.

Greedy and sampling are three launches (query, scan, selection), complete logits five
(`triton_launch`). Nothing synchronises with the host, all shapes depend on the number of hidden
states alone, and no buffer can overflow, so the calls can be captured in a CUDA graph and are
custom operators for `torch.compile`. On Hopper and later each kernel starts while the one before it
ends (programmatic dependent launch).
"""

import dataclasses

import torch
from torch import Tensor

from flashhead.errors import FlashHeadError
from flashhead.index.bound import z_score
from flashhead.index.codes import CodesIndex
from flashhead.ops.cascade.triton_launch import ANSWERS, BLOCKS, COUNTERS, INTERPRETED, Call
from flashhead.ops.cascade.triton_rows import ROW_BITS
from flashhead.ops.scan.layout import Layout, constants_of, make_layout, pack_table

MOST_ROWS = 1 << ROW_BITS.value
"""Rows of a head."""


@dataclasses.dataclass(frozen=True)
class DeviceIndex:
    """A codes index as the kernels take it, on one device; views of the index's own tensors.

    Args:
        layout: sizes.
        base: `int32[ceil(V/16), words, 16]`.
        scale: `bfloat16[G, V]`.
        direction: `float32[V]`.
        refine: `int32[planes, V, refine_words + 1]`.
        transform: `bfloat16[D, d]`.
        exact: `float32[2, d]`.
        constants: `float32[3, 8]`.
        table: `int32[3 packed_words + 1]`.
        reach: largest |direction|.
    """

    layout: Layout
    base: Tensor
    scale: Tensor
    direction: Tensor
    refine: Tensor
    transform: Tensor
    exact: Tensor
    constants: Tensor
    table: Tensor
    reach: float

    @property
    def tensors(self) -> list[Tensor]:
        """In the order of the operators' `index` argument."""
        coded = [self.base, self.scale, self.direction, self.refine]
        return [*coded, self.transform, self.exact, self.constants, self.table]

    @property
    def sizes(self) -> list[int]:
        """The operators' `sizes` argument."""
        return [*self.layout.dims, self.layout.planes]


def device_index(index: CodesIndex, device: torch.device) -> DeviceIndex:
    """The index on a device; what is there already is not copied.

    Raises:
        FlashHeadError: a layout that the kernels do not know.
    """
    planes, rows = index.refine.shape[:2]
    layout = make_layout(index)
    return DeviceIndex(
        layout=layout,
        base=index.base.to(device).view(torch.int32)[..., 0],
        scale=index.scale.to(device),
        direction=index.direction.to(device),
        refine=index.refine.to(device).view(torch.int32).view(planes, rows, -1),
        transform=index.transform.to(device),
        exact=index.exact.to(device),
        constants=constants_of(index, device),
        table=pack_table(layout, device),
        reach=float(index.direction.abs().max()),
    )


@torch.library.custom_op("flashhead::next_token", mutates_args=("counters", "totals"))
def next_token(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: list[Tensor],
    sizes: list[int],
    noise: list[Tensor],
    counters: Tensor,
    totals: Tensor,
    z: float,
    reach: float,
) -> Tensor:
    """Winner of `hidden @ weight.T + bias + temperature * gumbel(seed, step)`, by search.

    Args:
        hidden: floating `[n, d]`, contiguous, n at most `MOST_STATES`.
        weight: bfloat16, float16 or float32 `[V, d]`, contiguous.
        bias: `float32[1, V]` or `float32[n, V]`, or None.
        index: `DeviceIndex.tensors`.
        sizes: `DeviceIndex.sizes`.
        noise: none, or temperature `float32[n]`, seeds `int64[n]` and steps `int64[n]`.
        counters: `int32[COUNTERS]`, zero before and after; one for each stream.
        totals: `int64[5]`, added to: hidden states, certified, fallback, candidates, bytes read.
        z: standard errors of the certificate; 0: the deterministic bound.
        reach: `DeviceIndex.reach`.

    Returns:
        `int64[ANSWERS, n]`: tokens; whether each is certified (not where the hidden state is not
        finite or every token is forbidden); whether more than half of the rows were read exactly;
        rows read exactly; bytes read; the exact score as the bits of a float32; rows whose planes
        were read; the first row scored exactly, packed with its score.
    """
    call = Call(hidden, weight, bias, index, sizes, noise, counters, totals, z, reach, BLOCKS)
    call.prepare()
    call.scan(bounds=True)
    call.select()
    return call.answers


@next_token.register_fake
def _(hidden, weight, bias, index, sizes, noise, counters, totals, z, reach):  # type: ignore[no-untyped-def] # noqa: ARG001
    return hidden.new_empty((ANSWERS, hidden.shape[0]), dtype=torch.int64)


@torch.library.custom_op("flashhead::logits", mutates_args=("counters", "totals"))
def logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: list[Tensor],
    sizes: list[int],
    counters: Tensor,
    totals: Tensor,
    z: float,
    reach: float,
    kl_budget: float,
) -> tuple[Tensor, Tensor]:
    """Complete logits `float32[n, V]` within a KL budget (nats), and what `next_token` returns."""
    call = Call(hidden, weight, bias, index, sizes, [], counters, totals, z, reach, BLOCKS)
    call.prepare(complete=True)
    call.scan(bounds=False)
    call.complete(kl_budget)
    return call.scores, call.answers


@logits.register_fake
def _(hidden, weight, bias, index, sizes, counters, totals, z, reach, kl_budget):  # type: ignore[no-untyped-def] # noqa: ARG001
    n = hidden.shape[0]
    return (
        hidden.new_empty((n, weight.shape[0]), dtype=torch.float32),
        hidden.new_empty((ANSWERS, n), dtype=torch.int64),
    )


def scan(hidden: Tensor, weight: Tensor, bias: Tensor | None, index: DeviceIndex) -> Tensor:
    """Estimates of all logits: float32[n, V]; equals `ops.scan.reference` (for tests)."""
    counters = torch.zeros(COUNTERS, dtype=torch.int32, device=hidden.device)
    totals = torch.zeros(5, dtype=torch.int64, device=hidden.device)
    call = Call(
        hidden, weight, bias, index.tensors, index.sizes, [], counters, totals, 5.0, index.reach,
        BLOCKS,
    )  # fmt: skip
    call.prepare()
    call.scan(bounds=False)
    return call.scores


def kernel_z(failure_probability: float, stages: int) -> float:
    """The operators' `z`: 0 stands for the deterministic bound."""
    return 0.0 if failure_probability == 0 else z_score(failure_probability, stages)


def check(weight: Tensor) -> None:
    """Raise FlashHeadError unless the operators can take this head's weight."""
    if not weight.is_contiguous():
        raise FlashHeadError("the head's weight is not contiguous")
    if len(weight) > MOST_ROWS:
        raise FlashHeadError(f"the head has {len(weight)} rows: the kernels take {MOST_ROWS}")
    if weight.device.type != "cuda" and not INTERPRETED:
        raise FlashHeadError(f"the head is on {str(weight.device)!r}: the kernels need a GPU")
