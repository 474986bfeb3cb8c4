"""Compile every GPU kernel ahead of time, as its launcher would: python tests/aot.py 80 89 90 100.

The launchers run on tensors without memory (device "meta"); where they would start a kernel it is
compiled for the compute capability instead, with the signature, the constants and the warps of that
launch. Needs no GPU; TRITON_INTERPRET must not be set. Prints one line a kernel:

    sm_90 gemma n=8 _scan_batch_kernel: 4 warps, 168 registers, 0 bytes spilled, 24576 bytes shared

Fails where a kernel does not compile, takes more shared memory than the card has, or, on the layout
of a real head, spills registers.
"""

import argparse
import contextlib
import dataclasses
import io
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from flashhead.index.clusters import ClustersIndex
from flashhead.ops.cascade import triton_launch
from flashhead.ops.latent_decode import api as latent_api
from flashhead.ops.latent_decode import hopper_launch
from flashhead.ops.latent_decode import triton_launch as latent_launch
from flashhead.ops.latent_decode.blocks import Blocks
from flashhead.ops.latent_decode.rebuilt import latent_decode_rebuilt
from flashhead.ops.latent_decode.reference import KeyUp
from flashhead.ops.latent_decode.rows import Rows
from flashhead.ops.latent_select import triton as latent_select
from flashhead.ops.latent_select.codes import KeyCodes, code_bytes
from flashhead.ops.noise import triton as noise
from flashhead.ops.probe import triton as probe
from flashhead.ops.probe import triton_search
from flashhead.ops.scan.layout import Layout
from flashhead.options import ClustersOptions

CAPABILITIES = (80, 89, 90, 100)
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Shared memory that a program can have."""
DIGITS = {80: (8, 0), 89: (8, 9), 90: (9, 0), 100: (10, 0)}
MOST_SPILLED_BYTES = 64
"""On the layout of a real head: a few registers around a loop cost nothing."""
SMALL = (1003, 200, Layout(32, 32, 128, 2))
SMALL_ONE_PLANE = (1003, 200, Layout(32, 32, 128, 1))
TINY = (100, 48, Layout(0, 0, 64, 2))
GEMMA = (262_144, 640, Layout(32, 64, 544, 2))
LLAMA = (128_256, 2048, Layout(96, 224, 1728, 2))
"""Rows, dimensions and layout of an index; Gemma-3-270M's and Llama-3.2-1B's."""


def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclasses.dataclass(frozen=True)
class CodesCase:
    """What the search of a codes index launches.

    Args:
        name: of the layout.
        head: rows, dimensions, layout.
        n: hidden states.
        steps: "query", "query+sums", "bounds", "estimates", "select", "complete".
        dtype: of hidden states and weight.
        bias, noise: whether there is any.
        z: of the certificate, 0: deterministic.
        blocks: how the work is cut up.
    """

    name: str
    head: tuple[int, int, Layout]
    n: int
    steps: tuple[str, ...]
    dtype: torch.dtype = torch.bfloat16
    bias: bool = False
    noise: bool = False
    z: float = 4.97
    blocks: triton_launch.Blocks = triton_launch.BLOCKS

    def __str__(self) -> str:
        return f"{self.name} n={self.n}"

    def launch(self) -> None:
        """Call the launchers."""
        (rows, d, layout), n = self.head, self.n
        segments = sum(size > 0 for size in layout.dims)
        index = [
            new(-(-rows // 16), layout.words, 16, dtype=torch.int32),
            new(segments, rows, dtype=torch.bfloat16),
            new(rows),
            new(layout.planes, rows, layout.refine_words + 1, dtype=torch.int32),
            new(sum(layout.dims), d, dtype=torch.bfloat16),
            new(2, d),
            new(3, 8),
            new(3 * layout.packed_words + 1, dtype=torch.int32),
        ]
        drawn = [new(n), new(n, dtype=torch.int64), new(n, dtype=torch.int64)]
        call = triton_launch.Call(
            new(n, d, dtype=self.dtype),
            new(rows, d, dtype=self.dtype),
            new(1, rows) if self.bias else None,
            index,
            [*layout.dims, layout.planes],
            drawn if self.noise else [],
            new(triton_launch.COUNTERS, dtype=torch.int32),
            new(5, dtype=torch.int64),
            self.z,
            1.0,
            self.blocks,
        )
        steps: dict[str, Callable[[], None]] = {
            "query": call.prepare,
            "query+sums": lambda: call.prepare(complete=True),
            "bounds": lambda: call.scan(bounds=True),
            "estimates": lambda: call.scan(bounds=False),
            "select": call.select,
            "complete": lambda: call.complete(1e-3),
        }
        for step in self.steps:
            steps[step]()


@dataclasses.dataclass(frozen=True)
class SearchCase:
    """What the search of a clusters index launches.

    Args:
        rows, d, clusters: of the head.
        dtype: of its weight.
        centroids: "int8", "int4" or "bf16".
        always: tokens that are always scored.
        winner_only: without complete logits.
    """

    rows: int
    d: int
    clusters: int
    dtype: torch.dtype
    centroids: str
    always: int = 0
    bias: bool = False
    winner_only: bool = True

    def __str__(self) -> str:
        return f"clusters {self.centroids}"

    def launch(self) -> None:
        """Call the launchers."""
        C, d = self.clusters, self.d
        kinds = {"int8": (d, torch.int8), "int4": (-(-d // 2), torch.uint8)}
        width, stored = kinds.get(self.centroids, (d, torch.bfloat16))
        index = ClustersIndex(
            centroids=new(C, width, dtype=stored),
            centroid_scale=new(C),
            centroid_offset=new(C),
            common=new(d),
            estimate_scale=new(C),
            estimate_offset=new(C),
            members=new(C, 16, dtype=torch.int32),
            cluster_of=new(self.rows, dtype=torch.int32),
            always=new(self.always, dtype=torch.int32),
            options=ClustersOptions(cluster_size=16, probes=32, centroid_dtype=self.centroids),
            calibration_tokens=0,
        )
        triton_search.search(
            new(8, d, dtype=torch.bfloat16),
            new(self.rows, d, dtype=self.dtype),
            new(self.rows) if self.bias else None,
            index,
            new(C, dtype=torch.int32),
            winner_only=self.winner_only,
        )


@dataclasses.dataclass(frozen=True)
class BestClustersCase:
    """The selection alone, of more clusters than one step looks at."""

    def __str__(self) -> str:
        return "clusters 40000"

    def launch(self) -> None:
        """Call the launcher."""
        probe.best_clusters(new(8, 40_000), 256)


@dataclasses.dataclass(frozen=True)
class NoiseCase:
    """The noise alone."""

    def __str__(self) -> str:
        return "noise"

    def launch(self) -> None:
        """Call the launcher."""
        noise.gumbel(7, new(3, dtype=torch.int64), 1003)


@dataclasses.dataclass(frozen=True)
class LatentCase:
    """Attention over cached latents.

    Args:
        heads, rank, rope: of it.
        kind: how latents are kept.
        rotary_kind: how the rotary key is.
        page: tokens of a block; 0: the cache is not cut into blocks.
        hopper: which of two kernels.
    """

    heads: int
    rank: int
    rope: int
    kind: str = "bf16"
    rotary_kind: str = "bf16"
    page: int = 0
    hopper: bool = False

    def __str__(self) -> str:
        return f"latent {self.kind} {self.heads}x({self.rank}+{self.rope})"

    def rows(self, width: int, kind: str) -> Rows:
        """A cache of 8 rows of 4,096 tokens."""
        shape = (8 * 4096 // self.page, self.page) if self.page else (8, 4096)
        if kind == "bf16":
            return Rows(new(*shape, width, dtype=torch.bfloat16), width)
        groups = -(-width // 64)
        stored = torch.int8 if kind == "int8" else torch.uint8
        codes = new(*shape, groups * 64 // (2 if kind == "int4" else 1), dtype=stored)
        return Rows(codes, width, kind, new(*shape, groups, dtype=torch.float16))

    def launch(self) -> None:
        """Call the launcher."""
        numbers = new(8, dtype=torch.int32)
        table = new(8, 4096 // self.page, dtype=torch.int32) if self.page else None
        extra = {"table": table, "starts": numbers, "bias": new(8, 1, 4096)} if self.page else {}
        latent_api.latent_decode(
            new(8, self.heads, self.rank + self.rope, dtype=torch.bfloat16),
            self.rows(self.rank, self.kind),
            numbers,
            scale=0.1,
            rotary=self.rows(self.rope, self.rotary_kind) if self.rope else None,
            impl="triton",
            blocks=Blocks(hopper=self.hopper),
            **extra,
        )


@dataclasses.dataclass(frozen=True)
class RebuiltCase:
    """Attention over cached latents whose keys are rebuilt.

    Args:
        heads, kv_heads, head_dim, rank: of it.
        kind: how latents are kept.
        page: tokens of a block; 0: the cache is not cut into blocks.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rank: int
    kind: str = "bf16"
    page: int = 0

    def __str__(self) -> str:
        return f"rebuilt {self.kind} {self.heads}/{self.kv_heads}x{self.head_dim} of {self.rank}"

    def launch(self) -> None:
        """Call the launcher."""
        numbers = new(8, dtype=torch.int32)
        table = new(8, 4096 // self.page, dtype=torch.int32) if self.page else None
        extra = {"table": table, "starts": numbers, "bias": new(8, 1, 4096)} if self.page else {}
        width, turned = self.kv_heads * self.head_dim, self.head_dim // 2
        weight, constant = (new(*n, dtype=torch.bfloat16) for n in ((width, self.rank), (width,)))
        latent_decode_rebuilt(
            new(8, self.heads, self.head_dim, dtype=torch.bfloat16),
            LatentCase(self.heads, self.rank, 0, page=self.page).rows(self.rank, self.kind),
            KeyUp(weight, self.kv_heads, new(8192, turned), new(8192, turned), constant),
            numbers,
            scale=0.1,
            impl="triton",
            **extra,
        )


@dataclasses.dataclass(frozen=True)
class SelectCase:
    """A scan of cached keys.

    Args:
        heads, groups, dim, bits: of it.
    """

    heads: int
    groups: int
    dim: int
    bits: int

    def __str__(self) -> str:
        return f"select {self.heads}/{self.groups}x{self.dim} in {self.bits} bits"

    def launch(self) -> None:
        """Call the launcher."""
        shape = (8, 4096, self.groups)
        codes = new(*shape, code_bytes(self.dim, self.bits), dtype=torch.uint8)
        keys = KeyCodes(codes, new(*shape, dtype=torch.float16), self.dim, self.bits)
        query = new(8, self.heads, self.dim, dtype=torch.bfloat16)
        latent_select.estimate(query, keys, 0.1)


def query_case(name: str, head: tuple[int, int, Layout], states: int, **options: Any) -> CodesCase:
    """The query kernel where a program has several of 8 hidden states, as with wide heads."""
    _, d, layout = head
    most = 8 // states * 2 * sum(layout.dims) * d  # bytes of the transform, which is bfloat16
    blocks = dataclasses.replace(triton_launch.BLOCKS, query_bytes=most)
    steps = ("query",) if states < 8 else ("query", "query+sums")
    return CodesCase(f"{name} by {states}", head, 8, steps, blocks=blocks, **options)


LANES = dataclasses.replace(triton_launch.BLOCKS, bit_products=False)
"""Without binary products."""
GREEDY, COMPLETE = ("query", "bounds", "select"), ("query+sums", "estimates", "complete")
FLOAT32 = {"head": SMALL_ONE_PLANE, "dtype": torch.float32}
SMALL_CASES = [
    CodesCase("small", SMALL, 1, GREEDY),
    CodesCase("small", SMALL, 1, COMPLETE),
    CodesCase("small biased", SMALL, 1, ("bounds", "select"), bias=True),
    CodesCase("small biased", SMALL, 1, ("complete",), bias=True),
    CodesCase("small drawn", SMALL, 1, ("bounds", "select"), noise=True),
    CodesCase("small deterministic", SMALL, 1, (*GREEDY, "complete"), z=0.0),
    CodesCase("small", SMALL, 8, ("query", "bounds", "estimates")),
    query_case("small", SMALL, 2),
    query_case("small", SMALL, 4),
    query_case("small", SMALL, 8),
    query_case("small float32", SMALL, 8, dtype=torch.float32),
    CodesCase("small drawn", SMALL, 8, ("bounds",), noise=True),
    CodesCase("small biased", SMALL, 16, ("bounds",), bias=True),
    CodesCase("small", SMALL, 32, ("query+sums", "bounds")),
    CodesCase("small float32", n=1, steps=("query", "bounds", "select"), **FLOAT32),
    CodesCase("small float32", n=8, steps=("query", "bounds", "complete"), **FLOAT32),
    CodesCase("small without binary products", SMALL, 1, GREEDY, blocks=LANES),
    CodesCase("small without binary products", SMALL, 8, GREEDY, blocks=LANES),
    CodesCase("tiny", TINY, 1, GREEDY),
    CodesCase("tiny", TINY, 1, COMPLETE),
    NoiseCase(),
    SearchCase(151_936, 896, 9496, torch.bfloat16, "int8"),
    SearchCase(9000, 575, 577, torch.float16, "int4", always=3, bias=True, winner_only=False),
    SearchCase(577, 576, 37, torch.float32, "bf16", bias=True),
    BestClustersCase(),
    LatentCase(32, 512, 64),
    LatentCase(5, 96, 24, "int4", "int8", page=24),
    LatentCase(16, 192, 0, "int8"),
    RebuiltCase(9, 3, 64, 192),
    RebuiltCase(14, 2, 64, 128, "int4", page=16),
    SelectCase(9, 3, 64, 2),
    SelectCase(32, 1, 576, 2),
    SelectCase(32, 32, 128, 1),
    SelectCase(14, 2, 52, 4),
]
"""For every compute capability."""

LATENT_CASES = [
    LatentCase(32, 1024, 64, hopper=True),
    LatentCase(32, 1024, 64, "int4", hopper=True),
    LatentCase(32, 1024, 64, "int8", hopper=True),
    LatentCase(32, 1024, 64, "fp8", hopper=True),
    LatentCase(128, 512, 128, "bf16", page=64, hopper=True),
    LatentCase(9, 200, 0, "int4", page=16, hopper=True),
    LatentCase(32, 1024, 64),
]
"""For sm_90 alone; they may not spill registers."""

GEMMA_CASES = [
    CodesCase("gemma", GEMMA, 32, ("query", "bounds")),
    CodesCase("gemma", GEMMA, 16, ("bounds",)),
    query_case("gemma", GEMMA, 4),
    query_case("gemma", GEMMA, 8),
    CodesCase("gemma", GEMMA, 8, ("query", "bounds", "estimates")),
    CodesCase("gemma drawn", GEMMA, 8, ("bounds",), noise=True),
    CodesCase("gemma drawn", GEMMA, 1, ("bounds", "select"), noise=True),
    CodesCase("gemma", GEMMA, 1, GREEDY),
    CodesCase("gemma", GEMMA, 1, COMPLETE),
    CodesCase("gemma", GEMMA, 8, ("select", "complete")),
    CodesCase("gemma without binary products", GEMMA, 1, GREEDY, blocks=LANES),
    CodesCase("gemma without binary products", GEMMA, 8, GREEDY, blocks=LANES),
    CodesCase("llama", LLAMA, 1, GREEDY),
]
"""For sm_90 alone; they may not spill registers."""


class Driver:
    """Triton's driver of a card that is not there; a device number is a compute capability."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, _device: int) -> int:
        return 0


def describe(kernel: Any, log: str, case: Any, capability: int) -> str:
    """The line of a kernel just compiled, with what ptxas said."""
    said = re.search(r"(\d+) bytes spill stores.*Used (\d+) registers", log, re.DOTALL)
    assert said is not None, log
    spilled, registers = map(int, said.groups())
    shared = kernel.metadata.shared
    line = (
        f"sm_{capability} {case} {kernel.metadata.name}: {kernel.metadata.num_warps} warps, "
        f"{registers} registers, {spilled} bytes spilled, {shared} bytes shared"
    )
    assert shared <= SHARED_BYTES.get(capability, shared), f"{line}: more than the card has"
    if case in GEMMA_CASES or case in LATENT_CASES:
        assert spilled <= MOST_SPILLED_BYTES, f"{line}: more than {MOST_SPILLED_BYTES} spilled"
    return line


def compile_case(task: tuple[int, Any]) -> list[str]:
    """Lines of the kernels that a case compiles for a capability."""
    capability, case = task
    triton.runtime.driver.set_active(Driver(capability))
    run, lines = triton.JITFunction.run, []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = run(self, *args, grid=grid, warmup=True, **options)
        if log.getvalue():  # not compiled before
            lines.append(describe(kernel, log.getvalue(), case, capability))

    changes: list[tuple[Any, str, Any]] = [
        (triton.JITFunction, "run", compile_only),
        (triton_launch, "_has_assembly", lambda _: True),
        (triton_launch, "_has_bit_products", lambda _: capability < 100),
        (triton_launch, "_has_pdl", lambda _: capability >= 90),
        (triton_launch, "_multiprocessors", lambda _: 132),
        (latent_launch, "require_one_gpu", lambda *_: None),
        (
            latent_launch,
            "_properties",
            lambda _: (132, SHARED_BYTES[capability], DIGITS[capability]),
        ),
        (hopper_launch, "_device_unfit", lambda _: "" if capability == 90 else "another card"),
        (probe, "require_one_gpu", lambda *_: None),
        (triton_search, "require_one_gpu", lambda *_: None),
    ]
    latent_launch._device.cache_clear()
    with contextlib.ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(mock.patch.object(owner, name, value))
        case.launch()
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("capabilities", type=int, nargs="*", default=CAPABILITIES)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    args = parser.parse_args()
    if not isinstance(triton_launch.triton_select._select_kernel, triton.JITFunction):
        sys.exit("aot.py: TRITON_INTERPRET is set, so there is nothing to compile: unset it")
    tasks: list[tuple[int, Any]] = []
    if 90 in args.capabilities:
        # the longest first
        tasks += [(90, case) for case in (*GEMMA_CASES, *LATENT_CASES)]
    tasks += [(capability, case) for case in SMALL_CASES for capability in args.capabilities]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # what is cached is not compiled
        triton.knobs.nvidia.dump_ptxas_log = True
        with multiprocessing.Pool(args.jobs) as pool:
            for lines in pool.imap(compile_case, tasks):
                print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
