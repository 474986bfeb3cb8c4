"""The launches of a search on a GPU: which kernels, cut up how, into which buffers."""

import dataclasses
import functools
import os
from typing import Any

import torch
from torch import Tensor

from flashhead.index.codes import BLOCK_ROWS
from flashhead.ops.cascade import triton_complete, triton_select
from flashhead.ops.scan import triton as scan_one
from flashhead.ops.scan import triton_batch, triton_bits, triton_query
from flashhead.ops.scan.layout import NUMBERS, Layout

MOST_STATES = 256
"""Hidden states of a launch."""
MOST_SHARE = 2**13
"""Rows that a program of the selection can have at once."""
MOST_PROGRAMS = 4096
"""Of the selection."""
COUNTERS = 2 * 17 * MOST_STATES + MOST_PROGRAMS
"""int32 that the kernels leave at zero: arrivals of the query kernel, then of the selection; rows
that its programs have listed.
"""
ANSWERS = 8
"""Rows of what `next_token` returns."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is cut up. The defaults are for an H100 (docs/log.md).

    Args:
        scan_blocks: blocks of 16 rows a program, one query; a thread has two rows at 4 a warp.
        scan_group: words a step of the loop, one query.
        scan_ready: words on their way, the first ones before the query exists, one query.
        scan_warps: of a program, one query.
        bit_products: scan a single query by binary products, where the card has them.
        bit_warps: of a program of that scan.
        bit_registers: of a thread, for codes of two tiles.
        bit_programs: programs a multiprocessor.
        batch_from: hidden states from which the tensor cores run.
        batch_blocks: blocks of 16 rows a tile, several queries: for up to 8, 16, 32.
        batch_words: words a step.
        batch_warps: of a program.
        batch_programs: programs a multiprocessor, for up to 8, 16, 32 queries.
        batch_stages: tiles in flight, likewise.
        batch_states: hidden states that share one read of the codes, at most.
        select_programs: programs a multiprocessor of the selection.
        mass_rows: rows at once of the counts for complete logits.
        mass_programs: programs a multiprocessor of these.
        rows: rows that are refined together.
        query_bytes: that all programs of the query kernel together may read.
    """

    scan_blocks: int = 16
    scan_group: int = 8
    scan_ready: int = 16
    scan_warps: int = 4
    bit_products: bool = True
    bit_warps: int = 4
    bit_registers: int = 48
    bit_programs: int = 5
    batch_from: int = 2
    batch_blocks: tuple[int, int, int] = (8, 4, 4)
    batch_words: int = 8
    batch_warps: int = 4
    batch_programs: tuple[int, int, int] = (3, 3, 2)
    batch_stages: tuple[int, int, int] = (3, 2, 2)
    batch_states: int = 32
    select_programs: int = 2
    mass_rows: int = 1024
    mass_programs: int = 4
    rows: int = 16
    query_bytes: int = 2**25


BLOCKS = Blocks()


def power_of_two(n: int) -> int:
    """The next power of two."""
    return 1 << max(0, n - 1).bit_length()


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 3
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _has_assembly(device: torch.device) -> bool:
    """Whether PTX can be used: an NVIDIA device that is not interpreted."""
    return device.type == "cuda" and torch.version.cuda is not None and not INTERPRETED


@functools.cache
def _has_bit_products(device: torch.device) -> bool:
    """Whether the tensor cores multiply bits; later cards emulate it."""
    return _has_assembly(device) and torch.cuda.get_device_capability(device)[0] in (8, 9)


@functools.cache
def _has_pdl(device: torch.device) -> bool:
    return _has_assembly(device) and torch.cuda.get_device_capability(device) >= (9, 0)


@dataclasses.dataclass
class Call:
    """Arguments and buffers of one search of n hidden states."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    index: list[Tensor]
    sizes: list[int]
    noise: list[Tensor]
    counters: Tensor
    totals: Tensor
    z: float
    reach: float
    blocks: Blocks

    def __post_init__(self) -> None:
        n, device = len(self.hidden), self.hidden.device
        self.n, self.device = n, device
        self.vocab_size, self.d = self.weight.shape
        self.d4, self.d2, self.d1, self.planes = self.sizes
        layout = Layout(*self.sizes)
        padded = -(-n // 32) * 32

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.coded = new(n, sum(layout.dims))
        self.parts = new(n, 2, sum(layout.dims) // 16)
        self.query = new(n, layout.packed_words, dtype=torch.int32)
        self.plane_groups = layout.plane_groups
        # the scan by binary products; if it does not run, any pointers
        self.bits = n == 1 and self.blocks.bit_products and _has_bit_products(device)
        self.bits = self.bits and self.share <= MOST_SHARE
        self.bit_planes, self.bests = self.query, self.query
        if self.bits:
            self.bit_planes = new(n, self.plane_groups[0], 8, dtype=torch.int32)
            self.bests = new(n, self.scan_programs, dtype=torch.int64)
        self.numbers = new(padded, NUMBERS)
        self.scores = new(n, self.vocab_size)
        packs = new(2, padded, dtype=torch.int64)
        self.pilots, self.winners = packs[0], packs[1]
        small = new(5, padded, dtype=torch.int32)
        self.tops, self.read = small[0], small[1:].view(-1)
        self.sums = new(n, triton_complete.SUMS.value, dtype=torch.int32)
        self.answers = new(ANSWERS, n, dtype=torch.int64)
        bias_bytes = 0 if self.bias is None else 4 * self.vocab_size
        plane_bytes = self.index[3].shape[2] * 4
        row_bytes = self.d * self.weight.element_size()
        self.bytes = (self.scan_bytes + bias_bytes, plane_bytes, row_bytes)
        self.dims = {"D4": self.d4, "D2": self.d2, "D1": self.d1}
        self.block_d = min(1024, power_of_two(self.d))
        self.fast, self.pdl = _has_assembly(device), _has_pdl(device)
        self.deterministic = self.z == 0

    @property
    def scan_bytes(self) -> int:
        """Bytes of the index that every query reads."""
        base, scale, direction, _, transform, exact, _, _ = self.index
        return sum(tensor.nbytes for tensor in (base, scale, direction, transform, exact))

    @property
    def share(self) -> int:
        """Rows of a query that a program of the selection has: about `select_programs` programs a
        multiprocessor, each with rows of all queries.
        """
        blocks = -(-self.vocab_size // BLOCK_ROWS)
        wanted = _multiprocessors(self.device) * self.blocks.select_programs
        return -(-blocks // min(wanted, MOST_PROGRAMS)) * BLOCK_ROWS

    @property
    def programs(self) -> int:
        """Programs of the selection."""
        return -(-self.vocab_size // self.share)

    def tiles(self, most: int) -> dict[str, int]:
        """How a program of the selection goes through its rows, `most` or fewer at once."""
        # a program that scores the pilot itself has all its rows at once
        block_v = min(MOST_SHARE if self.bits else 1024, power_of_two(self.share))
        block_n = min(max(1, most // block_v), power_of_two(self.n))
        return {"BLOCK_B": power_of_two(self.n), "BLOCK_N": block_n, "BLOCK_V": block_v}

    def later(self, warps: int, **options: Any) -> dict[str, Any]:
        """Launch options of a kernel that follows another."""
        pdl = {"launch_pdl": True} if self.pdl else {}
        return {"num_warps": warps, **pdl, **options}

    def bias_arguments(self) -> tuple[Tensor, int]:
        """Pointer (any, if there is none) and stride between hidden states."""
        if self.bias is None:
            return self.numbers, 0
        return self.bias, 0 if len(self.bias) == 1 else self.vocab_size

    def noise_arguments(self) -> list[Tensor]:
        """Temperature, seeds, steps: any pointers, if there are none."""
        return self.noise or [self.numbers, self.answers, self.answers]

    def prepare(self, complete: bool = False) -> None:
        """Launch the query kernel."""
        # as few a program as can be, while all programs together read the transform from the L2
        states, most = 1, self.blocks.query_bytes
        while states < 8 and -(-self.n // states) * self.index[4].nbytes > most:
            states *= 2
        dims = self.d4 + self.d2 + self.d1
        segments = sum(size > 0 for size in self.sizes[:3])
        _, _, _, _, transform, exact, constants, table = self.index
        # the tensor cores round float32 operands, so those take the long way
        dot = states > 2 and self.hidden.dtype == transform.dtype
        block_d = 256 if dot else power_of_two(self.d)
        triton_query._query_kernel[(dims // 16 + 1, -(-self.n // states))](
            self.hidden, transform, exact, constants, table, self.coded, self.parts, self.query,
            self.bit_planes, self.numbers, self.counters, self.pilots, self.winners, self.tops,
            self.read, self.sums, self.n, 1.0 if self.deterministic else self.z**2, float(segments),
            self.reach, self.d4, self.d2,
            D_HIDDEN=self.d, DIMS=dims, PACKED=self.query.shape[1],
            SUMS=triton_complete.SUMS.value if complete else 0, BLOCK_N=states,
            BLOCK_D=max(16, min(block_d, power_of_two(self.d))), BLOCK_G=power_of_two(dims // 16),
            BLOCK_P=power_of_two(self.query.shape[1]), DOT=dot, BITS=self.bits,
            DETERMINISTIC=self.deterministic, PDL=self.pdl,
            num_warps=16 if self.d > 2048 or states > 2 else 8,
        )  # fmt: skip

    def scan(self, bounds: bool) -> None:
        """Launch the scan: upper bounds or estimates into `scores`."""
        base, scale, direction, _, _, _, constants, _ = self.index
        nblk = base.shape[0]
        blocks = self.blocks
        arguments = (
            scale, direction, self.hidden, self.weight, *self.bias_arguments(),
            *self.noise_arguments(),
        )  # fmt: skip
        state = (self.numbers, constants, self.scores, self.pilots, self.tops, self.vocab_size)
        flags = {
            "BOUNDS": bounds,
            "HAS_BIAS": self.bias is not None,
            "HAS_NOISE": bool(self.noise),
            "FAST": self.fast,
            "PDL": self.pdl,
            "D_HIDDEN": self.d,
            **self.dims,
        }
        fusion = {"enable_fp_fusion": not self.noise}
        sms = _multiprocessors(self.device)
        if self.bits:
            self._scan_bits(bounds, fusion)
            return
        if self.n < blocks.batch_from:
            # a thread has four rows: no more threads than that
            tile = max(1, min(blocks.scan_blocks, power_of_two(nblk)))
            scan_one._scan_kernel[(-(-nblk // tile), self.n)](
                base, *arguments, self.query, *state, nblk, **flags, BLOCKS=tile,
                GROUP=blocks.scan_group, READY=blocks.scan_ready, BLOCK_D=self.block_d,
                **self.later(blocks.scan_warps, **fusion),
            )  # fmt: skip
            return
        block_n = min(blocks.batch_states, max(8, power_of_two(self.n)))
        size = (8, 16, 32).index(block_n)
        own = blocks.batch_blocks[size]
        tiles, most = -(-nblk // own), sms * blocks.batch_programs[size]
        triton_batch._scan_batch_kernel[(min(tiles, most), -(-self.n // block_n))](
            base.view(torch.int8), *arguments, self.query.view(torch.int8), *state, nblk, self.n,
            **flags, BLOCKS=own, BLOCK_N=block_n, BLOCK_W=blocks.batch_words,
            BLOCK_D=min(128, self.block_d), STAGES=blocks.batch_stages[size],
            **self.later(blocks.batch_warps, **fusion),
        )  # fmt: skip

    @property
    def scan_blocks(self) -> int:
        """Blocks of 16 rows of a tile of the scan by binary products."""
        words = self.index[0].shape[1]
        # eight words take four registers of a thread, and two tiles are there at once
        own = max(1, self.blocks.bit_registers // (8 * -(-words // 8)))
        return self.blocks.bit_warps * (power_of_two(own + 1) // 2)

    @property
    def scan_programs(self) -> int:
        """Programs of that scan: as many as find room at once, since they stay."""
        nblk, words, _ = self.index[0].shape
        registers = 48 + 12 * -(-words // 8) * self.scan_blocks // self.blocks.bit_warps
        room = 2**16 // (32 * self.blocks.bit_warps * registers)
        programs = max(1, min(self.blocks.bit_programs, room))
        return min(-(-nblk // self.scan_blocks), _multiprocessors(self.device) * programs)

    def _scan_bits(self, bounds: bool, fusion: dict[str, Any]) -> None:
        """Launch the scan by binary products."""
        base, scale, direction, _, _, _, constants, _ = self.index
        groups, at2, at1 = self.plane_groups
        triton_bits._scan_bits_kernel[(self.scan_programs, self.n)](
            base.view(torch.int64), scale, direction, *self.bias_arguments(),
            *self.noise_arguments(), self.bit_planes, self.numbers, constants, self.scores,
            self.bests, self.vocab_size, base.shape[0], **self.dims, PLANES=groups, AT2=at2,
            AT1=at1, BLOCKS=self.scan_blocks, WARPS=self.blocks.bit_warps, BOUNDS=bounds,
            HAS_BIAS=self.bias is not None, HAS_NOISE=bool(self.noise), PDL=self.pdl,
            **self.later(self.blocks.bit_warps, **fusion),
        )  # fmt: skip

    @property
    def bests_block(self) -> int:
        """Program results of the scan, padded; 0: it has scored its pilots itself."""
        return max(4, power_of_two(self.bests.shape[1])) if self.bits else 0

    def select(self) -> None:
        """Launch the selection: tokens."""
        _, scale, _, refine, _, _, _, _ = self.index
        size = self.programs * self.n * self.share
        lists = torch.empty(size, dtype=torch.int32, device=self.device)
        triton_select._select_kernel[(self.programs,)](
            self.scores, self.hidden, self.weight, *self.bias_arguments(), *self.noise_arguments(),
            refine, scale, self.query, self.numbers, lists, self.lengths, self.bests, self.pilots,
            self.winners, self.done, self.read, self.answers, self.totals, self.bests.shape[-1],
            self.n, self.vocab_size, *self.bytes, D_HIDDEN=self.d, **self.dims, PLANES=self.planes,
            SHARE=self.share, **self.tiles(4096), BLOCK_R=self.rows_together,
            BLOCK_D=power_of_two(self.d), BLOCK_K=self.bests_block,
            HAS_BIAS=self.bias is not None, HAS_NOISE=bool(self.noise),
            DETERMINISTIC=self.deterministic, FAST=self.fast, PDL=self.pdl,
            **self.later(self.select_warps, enable_fp_fusion=not self.noise),
        )  # fmt: skip

    @property
    def done(self) -> Tensor:
        """Counters of arrivals at the selection."""
        return self.counters[17 * MOST_STATES :]

    @property
    def lengths(self) -> Tensor:
        """Counters of the rows that each program of the selection has listed."""
        return self.counters[2 * 17 * MOST_STATES :]

    @property
    def rows_together(self) -> int:
        """Rows that are refined together: few of one query, so that less waits for the last."""
        return self.blocks.rows // 2 if self.n == 1 else self.blocks.rows

    @property
    def select_warps(self) -> int:
        """Of a program of the selection: rows of several queries need more registers."""
        return 4 if self.n == 1 else 8

    def complete(self, budget: float) -> None:
        """Launch the three kernels of complete logits."""
        _, scale, _, refine, _, _, _, _ = self.index
        programs, share = self.programs, self.share
        lists = torch.empty(programs * self.n * share, dtype=torch.int32, device=self.device)
        cuts = torch.empty(self.n, 4, dtype=torch.float32, device=self.device)
        block = self.blocks.mass_rows
        wanted = _multiprocessors(self.device) * self.blocks.mass_programs
        mass = -(-self.vocab_size * self.n // (wanted * block)) * block
        triton_complete._mass_kernel[(-(-self.vocab_size // mass), self.n)](
            self.scores, scale, self.hidden, self.weight, self.bias_arguments()[0], self.numbers,
            self.bests, self.pilots, self.tops, self.sums, self.sums.view(torch.int64), cuts,
            self.done, self.bests.shape[-1], self.vocab_size, budget, mass, D_HIDDEN=self.d,
            BLOCK_V=block, BLOCK_D=power_of_two(self.d), BLOCK_K=self.bests_block,
            HAS_BIAS=self.bias is not None, PDL=self.pdl, **self.dims, **self.later(4),
        )  # fmt: skip
        more = {"PLANES": self.planes, "SHARE": share, "PDL": self.pdl, **self.dims}
        triton_complete._refine_kernel[(programs,)](
            self.scores, refine, scale, self.query, self.numbers, self.pilots, self.tops,
            self.sums, cuts, lists, self.lengths, self.done, self.read, self.n, self.vocab_size,
            BLOCK_R=self.rows_together, FAST=self.fast, **self.tiles(2048), **more,
            **self.later(self.select_warps),
        )  # fmt: skip
        triton_complete._exact_kernel[(programs,)](
            self.scores, self.hidden, self.weight, *self.bias_arguments(), refine, scale,
            self.numbers, self.pilots, self.winners, self.tops, cuts, lists, self.lengths,
            self.done, self.read, self.answers, self.totals, self.n, self.vocab_size, *self.bytes,
            D_HIDDEN=self.d, BLOCK_B=power_of_two(self.n), BLOCK_R=self.rows_together,
            BLOCK_D=min(512, self.block_d), HAS_BIAS=self.bias is not None,
            DETERMINISTIC=self.deterministic, **more, **self.later(self.select_warps),
        )  # fmt: skip
