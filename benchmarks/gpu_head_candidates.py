"""What should search a head's codes on a GPU? Kernel designs side by side, verified, then timed.

    python benchmarks/gpu_head_candidates.py --variants final --shape llama-3.2-1b --json out.json

Needs a Hopper GPU, nvcc and Triton. Rows and hidden states are synthetic: coded coordinates with
variances falling as i^-1.1 (as measured on Gemma-3-270M), rows in clusters of 64 that share 40 % of
their energy, log-normal row norms (0.2), the mean direction with 30 % of a hidden state's energy,
and for each hidden state one target row 4.5-8 standard deviations above the mean logit. Survivors
are fewer than on real text: `z=6` and `z=8` show more of them. The index has the layout of format 1
of `flashhead.index.codes` (2-bit fields), except where a variant says otherwise.

Every design is compared with eager torch on the same integers, and its tokens with float32 logits
for eight sets of hidden states, before it is timed. Times: graphs of 8 calls, each with its own
copy of the index (4 copies) and its own hidden states, CUDA events around a replay, median of the
replays, divided by 8; all designs interleaved with `F.linear` + argmax.
"""

import argparse
import concurrent.futures
import ctypes
import dataclasses
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHAPES = {
    "llama-3.2-1b": (128_256, 2_048),
    "qwen3-1.7b": (151_936, 2_048),
    "qwen3-0.6b": (151_936, 1_024),
    "gemma-3-270m": (262_144, 640),
    "gemma-3-1b": (262_144, 1_152),
    "llama-3.2-3b": (128_256, 3_072),
    "tiny": (4_100, 640),
}
CALLS = 8
STEP = {0: 0.9957, 2: 0.2875, 4: 0.09, 6: 0.025}
DISTORTION = {0: 1.0, 2: 0.125, 4: 0.0125, 6: 0.0011}
SOURCE = Path(__file__).with_name("gpu_kernels_cuda.cu")


# ---------------------------------------------------------------- the index


@dataclasses.dataclass
class Index:
    """The tensors of a codes index and what kernels derive from them once."""

    V: int
    d: int
    bits: float
    segments: list[tuple[int, int, float, float]]  # groups, base bits, step, variance
    base: Tensor
    refine: Tensor
    scale: Tensor
    error: Tensor
    direction: Tensor
    exact: Tensor
    transform: Tensor
    shares: Tensor  # [2, groups], error share of a group over its 16 dimensions
    transform8: Tensor | None = (
        None  # int8[D, d] with transform_scale float32[D]; transform is then their product
    )
    transform_scale: Tensor | None = None

    @property
    def words(self) -> int:
        return int(self.base.shape[1])

    @property
    def groups(self) -> int:
        return self.d // 16

    @property
    def nblk(self) -> int:
        return int(self.base.shape[0])


def allocate(variances: Tensor, bits: float, d: int) -> list[tuple[int, int, float, float]]:
    """As `flashhead.index.build_codes` allocates."""
    groups = variances.view(-1, 16).sum(1).tolist()
    base = [0] * len(groups)
    for _ in range(max(1, round(bits * d / 2 / 16))):
        gains = [
            g * (DISTORTION[b] - DISTORTION[b + 2]) if b < 6 else -1.0
            for g, b in zip(groups, base, strict=True)
        ]
        base[max(range(len(gains)), key=gains.__getitem__)] += 2
    segments = []
    start = 0
    while start < len(groups):
        stop = start + 1
        while stop < len(groups) and base[stop] == base[start]:
            stop += 1
        pieces = -(-(stop - start) * 16 // 128)
        for piece in range(pieces):
            first = start + (stop - start) * piece // pieces
            last = start + (stop - start) * (piece + 1) // pieces
            variance = float(variances[first * 16 : last * 16].mean())
            segments.append(
                (last - first, base[start], STEP[base[start]] * variance**0.5, variance)
            )
        start = stop
    return segments


def pack(fields: Tensor) -> Tensor:
    parts = fields.view(fields.shape[0], -1, 4, 4)
    return parts[:, :, 0] | parts[:, :, 1] << 2 | parts[:, :, 2] << 4 | parts[:, :, 3] << 6


def make_problem(
    V: int,
    d: int,
    bits: float,
    device: str,
    seed: int = 0,
    spread: float = 0.2,
    least: float = 4.5,
    cluster: int = 64,
    shared: float = 0.4,
) -> tuple[Index, Tensor, Tensor, Index]:
    """Index, weight bf16[V, d], hidden bf16[CALLS, 32, d], index with an int8 transform."""
    g = torch.Generator(device).manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, device=device)  # noqa: E731
    variances = torch.arange(1, d + 1, dtype=torch.float64) ** -1.1
    variances /= variances.sum()
    segments = allocate(variances, bits, d)
    flat = torch.cat([torch.full((s[0] * 16,), s[3]) for s in segments]).to(device)
    root = flat.sqrt() * (9.0 / float(flat.sum())) ** 0.5  # logits have a standard deviation of 3
    basis = torch.linalg.qr(rand(d, d))[0]
    r = basis[:, 0].contiguous()
    q = torch.cat([basis[:, 1:].T, torch.zeros(1, d, device=device)])
    root[-1] = 0
    transform = q.bfloat16()
    weight = torch.empty(V, d, dtype=torch.bfloat16, device=device)
    centres = rand(-(-V // cluster), d)
    coordinates_of = {}
    targets = torch.randint(0, V, (CALLS * 32,), generator=g, device=device)
    mean = 0.02 * rand(d)
    for start in range(0, V, 16384):
        stop = min(V, start + 16384)
        part = rand(stop - start, d) * (1 - shared) ** 0.5
        part += centres[torch.arange(start, stop, device=device) // cluster] * shared**0.5
        part *= root * torch.exp(spread * rand(stop - start, 1))
        for i, t in enumerate(targets.tolist()):
            if start <= t < stop:
                coordinates_of[i] = part[t - start].clone()
        weight[start:stop] = (part @ q + 0.015 * rand(stop - start, 1) * r + mean).bfloat16()
    unit = torch.stack([coordinates_of[i] / coordinates_of[i].norm() for i in range(CALLS * 32)])
    noise = rand(CALLS * 32, d)
    wanted = least + 3.5 * torch.rand(CALLS * 32, 1, generator=g, device=device) ** 2
    # the target's logit in standard deviations of logits over rows of mean norm
    noise += (
        wanted
        * 3
        / torch.stack(list(map(coordinates_of.get, range(CALLS * 32)))).norm(dim=1)[:, None]
        - (noise * unit).sum(1, keepdim=True)
    ) * unit
    hidden = (noise @ q + (0.3 / 0.7 * d) ** 0.5 * r).bfloat16().view(CALLS, 32, d)
    exact = torch.stack([r, mean]).float()
    functionals = torch.cat([transform.double(), exact[:1].double()])
    inverse = torch.linalg.solve(functionals.T @ functionals, functionals.T).float()
    index = encode(weight, mean, inverse, segments, bits, exact, transform)
    top = q.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    eight = (q / top).round().to(torch.int8)
    functionals = torch.cat([eight.double() * top.double(), exact[:1].double()])
    inverse = torch.linalg.solve(functionals.T @ functionals, functionals.T).float()
    second = encode(weight, mean, inverse, segments, bits, exact, eight.double() * top.double())
    second.transform8, second.transform_scale = eight, top[:, 0].contiguous()
    return index, weight, hidden, second


def encode(
    weight: Tensor,
    mean: Tensor,
    inverse: Tensor,
    segments: list,
    bits: float,
    exact: Tensor,
    transform: Tensor,
) -> Index:
    """As `flashhead.index.build_codes` encodes rows."""
    V, d = weight.shape
    energy = sum(s[3] * s[0] * 16 for s in segments)
    parts: dict[str, list[Tensor]] = {
        k: [] for k in ("base", "refine", "scale", "direction", "e0", "e1")
    }
    for start in range(0, V, 16384):
        coordinates = (weight[start : start + 16384].float() - mean) @ inverse
        values = coordinates[:, :-1]
        parts["direction"].append(coordinates[:, -1])
        scale = (values.square().sum(1).sqrt() / energy**0.5).bfloat16()
        unit = scale.float()[:, None]
        base, refine, e0, e1 = [], [], [], []
        at = 0
        for groups, b, step, _ in segments:
            part = values[:, at : at + groups * 16]
            top = 2 ** (b + 2) - 1
            code = (part / (step * unit) + (top + 1) / 2).floor_().clamp_(0, top)
            e1.append((part - (code - top / 2) * step * unit).square().sum(1))
            code = code.to(torch.uint8)
            prefix = code >> 2
            e0.append(
                (part - (prefix.float() - (2**b - 1) / 2) * (4 * step) * unit).square().sum(1)
            )
            base.extend(pack((prefix >> shift) & 3) for shift in range(b - 2, -1, -2))
            refine.append(pack(code & 3))
            at += groups * 16
        parts["base"].append(torch.cat(base, 1))
        words = torch.cat(refine, 1)
        parts["refine"].append(torch.nn.functional.pad(words, (0, 0, 0, -words.shape[1] % 4)))
        parts["scale"].append(scale)
        parts["e0"].append(torch.stack(e0, 1))
        parts["e1"].append(torch.stack(e1, 1))
    full = {k: torch.cat(v) for k, v in parts.items()}
    blocks = -(-V // 16)
    padded = torch.nn.functional.pad(full["base"], (0, 0, 0, 0, 0, blocks * 16 - V))
    base = padded.view(blocks, 16, -1, 4).transpose(1, 2).contiguous()
    pad = lambda x: torch.nn.functional.pad(x, (0, blocks * 16 - V)).contiguous()  # noqa: E731
    shares = []
    for e in (full["e0"], full["e1"]):
        share = e.double().mean(0) / e.double().mean(0).sum()
        shares.append(
            torch.cat(
                [torch.full((s[0],), float(share[i]) / (s[0] * 16)) for i, s in enumerate(segments)]
            )
        )
    return Index(
        V,
        d,
        bits,
        segments,
        base,
        full["refine"],
        pad(full["scale"]),
        torch.stack(
            [pad(full["e0"].sum(1).sqrt().bfloat16()), pad(full["e1"].sum(1).sqrt().bfloat16())]
        ),
        pad(full["direction"]),
        exact,
        transform,
        torch.stack(shares).float(),
    )


def plan(index: Index) -> dict[str, Tensor]:
    """Tables: group of 16 coordinates and gain of every base word, then of every refine word."""
    word_group, word_gain = [], []
    group = 0
    for groups, b, step, _ in index.segments:
        for level in range(b // 2 - 1, -1, -1):
            word_group += range(group, group + groups)
            word_gain += [4 * step * 4.0**level] * groups
        group += groups
    pad = -len(word_group) % 8
    word_group += [-1] * pad
    word_gain += [0.0] * pad
    chunks = len(word_group) // 8
    word_group += range(index.groups)
    for groups, _, step, _ in index.segments:
        word_gain += [step] * groups
    pad = -index.groups % 8
    word_group += [-1] * pad
    word_gain += [0.0] * pad
    tables = {
        "word_group": torch.tensor(word_group, dtype=torch.int32),
        "word_gain": torch.tensor(word_gain, dtype=torch.float32),
        "share_base": index.shares[0].clone(),
        "share_refined": index.shares[1].clone(),
    }
    return {k: v.to(index.base.device) for k, v in tables.items()} | {
        "chunks": torch.tensor(chunks)
    }


# ---------------------------------------------------------------- eager reference


def unpack(words: Tensor) -> Tensor:
    return torch.stack([words >> s & 3 for s in (0, 2, 4, 6)], -2).flatten(-3)


def reference_query(tables: dict[str, Tensor], coded: Tensor, unit: int) -> dict[str, Tensor]:
    """int8 query from `coded` float32[n, D], one scale for `unit` chunks of 8 words."""
    n, chunks = coded.shape[0], int(tables["chunks"])
    groups = tables["word_group"].long()[: chunks * 8]
    values = coded.view(n, -1, 16)[:, groups.clamp_min(0)] * tables["word_gain"][: chunks * 8, None]
    values = torch.where((groups >= 0)[:, None], values, 0.0)
    values = torch.nn.functional.pad(values, (0, 0, 0, -chunks % unit * 8)).view(n, -1, unit * 128)
    peak = values.abs().amax(2)
    scale = (peak / 127.0).clamp_min(1e-30)[:, :, None].expand_as(values)
    inverse = 127.0 / peak.clamp_min(1e-28)
    return {
        "q": (values * inverse[:, :, None]).round_().view(n, -1, 128),
        "scale": scale.reshape(n, -1, 128)[:, :, 0],
    }


def reference_scan(
    index: Index,
    tables: dict[str, Tensor],
    query: dict[str, Tensor],
    hidden: Tensor,
    coded: Tensor,
    z: float,
):
    """float64 estimates and half-widths z sigma of all rows, from the integers of `query`."""
    words, chunks = index.words, int(tables["chunks"])
    q, scale = query["q"].double(), query["scale"].double()
    rows = index.base.transpose(1, 2).flatten(0, 1)[: index.V]
    along, shift = (hidden.double() @ index.exact.double().T).unbind(1)
    coefficient = (q[:, :chunks] * scale[:, :chunks, None]).flatten(1)[:, : words * 16]
    estimates = torch.empty(hidden.shape[0], index.V, dtype=torch.float64, device=rows.device)
    for start in range(0, index.V, 16384):
        fields = unpack(rows[start : start + 16384]).double() - 1.5
        estimates[:, start : start + 16384] = coefficient @ fields.T
    row_scale = index.scale[: index.V].double()
    estimates *= row_scale
    estimates += along[:, None] * index.direction[: index.V].double() + shift[:, None]
    energy = coded.double().view(hidden.shape[0], -1, 16).square().sum(2)
    coding = energy @ tables["share_base"].double()
    valid = (tables["word_group"][: chunks * 8] >= 0).view(-1, 8).sum(1).double()
    rounding = scale[:, :chunks].square() @ valid * (16 * 1.25 / 12)
    variance = (
        coding[:, None] * index.error[0, : index.V].double().square()
        + rounding[:, None] * row_scale.square()
    )
    return estimates, z * variance.sqrt()


# ---------------------------------------------------------------- CUDA through the driver


class Args(ctypes.Structure):
    _pointers = (
        *("base", "scale", "error", "error_refined", "direction", "refine", "transform", "exact"),
        *("weight", "transform_scale", "word_group", "word_gain", "share_base", "share_refined"),
        *("hidden", "coded", "group_energy", "along_shift", "qdump", "upper", "bmax", "top"),
        *("best", "done", "barrier", "token", "logit", "stats"),
    )
    _fields_ = [(name, ctypes.c_void_p) for name in _pointers] + [
        *((name, ctypes.c_int) for name in ("B", "V", "nblk", "P", "refine_min")),
        ("z", ctypes.c_float),
        ("mean_error", ctypes.c_float),
        ("inv_temp", ctypes.c_float),
        ("seed", ctypes.c_uint32),
        ("step", ctypes.c_uint32),
    ]


class LaunchAttribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int * 16)]


class LaunchConfig(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("count", ctypes.c_uint),
    ]


COOPERATIVE, PROGRAMMATIC = 2, 6


class Module:
    """A compiled configuration; `launch` goes to torch's current stream."""

    def __init__(self, cubin: Path) -> None:
        self.cuda = ctypes.CDLL("libcuda.so.1")
        self.handle = ctypes.c_void_p()
        torch.cuda.current_stream().synchronize()
        self._check(self.cuda.cuModuleLoadData(ctypes.byref(self.handle), cubin.read_bytes()))
        self.functions: dict[str, ctypes.c_void_p] = {}

    def _check(self, code: int) -> None:
        if code:
            raise RuntimeError(f"CUDA driver error {code}")

    def function(self, name: str, shared: int) -> ctypes.c_void_p:
        if name not in self.functions:
            function = ctypes.c_void_p()
            self._check(
                self.cuda.cuModuleGetFunction(ctypes.byref(function), self.handle, name.encode())
            )
            if shared > 48 * 1024:
                self._check(self.cuda.cuFuncSetAttribute(function, 8, shared))
            self.functions[name] = function
        return self.functions[name]

    def launch(
        self,
        name: str,
        grid: int,
        threads: int,
        shared: int,
        arguments: list[Any],
        attribute: int = 0,
    ) -> None:
        function = self.function(name, shared)
        config = LaunchConfig(
            (grid, 1, 1), (threads, 1, 1), shared, torch.cuda.current_stream().cuda_stream
        )
        if attribute:
            entry = LaunchAttribute(attribute)
            entry.value[0] = 1
            config.attributes = ctypes.pointer(entry)
            config.count = 1
        pointers = (ctypes.c_void_p * len(arguments))(
            *(ctypes.cast(ctypes.byref(x), ctypes.c_void_p) for x in arguments)
        )
        self._check(self.cuda.cuLaunchKernelEx(ctypes.byref(config), function, pointers, None))


def build(configs: list[dict[str, int]], folder: Path) -> dict[str, Path]:
    """Compile configurations side by side with nvcc; returns cubins by name."""
    folder.mkdir(parents=True, exist_ok=True)

    def one(config: dict[str, int]) -> tuple[str, Path]:
        name = "_".join(f"{k}{v}" for k, v in config.items())
        path = folder / f"{name}.cubin"
        if not path.exists():
            defines = [f"-D{k}={v}" for k, v in config.items()]
            done = subprocess.run(
                [
                    "nvcc",
                    "-cubin",
                    "-arch=sm_90",
                    "-O3",
                    "-Xptxas",
                    "-v",
                    *defines,
                    "-o",
                    str(path),
                    str(SOURCE),
                ],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise RuntimeError(done.stderr)
            path.with_suffix(".txt").write_text(done.stderr, encoding="utf-8")
        return name, path

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        return dict(pool.map(one, configs))


def name_of(config: dict[str, int]) -> str:
    return "_".join(f"{k}{v}" for k, v in config.items())


def chunk_group(chunks: int, most: int) -> int:
    """Chunks a load group: few groups, little padding."""
    return min(
        range(1, most + 1),
        key=lambda g: (math.ceil(chunks / g) * g - chunks + (most - g) * 0.6, -g),
    )


SHARED = 227 * 1024


def config_of(
    index: Index,
    B: int,
    warps: int,
    group: int | None = None,
    meta: int = 0,
    sample: int = 0,
    logits: int = 0,
    evict: int = 1,
    depth: int | None = None,
    regs: int | None = None,
    one: bool | None = None,
    steps: int | None = None,
    pilot: int = 0,
    direct: int = 0,
    t8: int = 0,
) -> dict[str, int]:
    nt = 1 if B <= 8 else 2 if B <= 16 else 4
    chunks = -(-index.words // 8)
    group = group or chunk_group(chunks, 4)
    config = {
        "D": index.d,
        "GROUPS": index.groups,
        "WORDS": index.words,
        "NT": nt,
        "NW": warps,
        "CG": group,
        "META": meta,
        "SAMPLE": sample,
        "LOGITS": logits,
        "EVICT": evict,
        "DEPTH": 0,
        "REGS": regs or min(65536 // (32 * warps) // 8 * 8, 80 if nt == 1 else 128),
        "SW": 8,
        "QD": steps or (8 if nt == 1 else 4),
        "PILOT": pilot if B == 1 else 0,
        "DIRECT": direct,
        "T8": t8,
        "ONE": int(B == 1 if one is None else one),
    }
    sizes = shared_bytes(config)
    while (
        sizes["scan"] + warps * 2 * (2 * group * 512 + 256 + 8) > SHARED - 1024
    ):  # at least two stages a warp
        warps -= 2
        config["NW"] = warps
        sizes = shared_bytes(config)
    room = SHARED - sizes["scan"] - sizes["select"] - sizes["query"] - 4096
    config["DEPTH"] = max(2, min(12, depth or room // (warps * (2 * group * 512 + 256 + 8))))
    return config


def shared_bytes(config: dict[str, int]) -> dict[str, int]:
    """Dynamic shared memory of the kernels."""
    nq, nw, chunks = 8 * config["NT"], config["NW"], -(-config["WORDS"] // 8)
    padded = -(-chunks // config["CG"]) * config["CG"]
    refine = -(-config["GROUPS"] // 8)
    scan = (
        padded * 4 * config["NT"] * 256
        + 2 * padded // config["CG"] * nq * 4
        + 7 * nq * 4
        + nw * nq * 8
        + padded * 64
        + nw * config["DEPTH"] * 8
    )
    scan = -(-scan // 128) * 128 + nw * config["DEPTH"] * (2 * config["CG"] * 512 + 256)
    select = 128 * refine + 24 + 8 * refine + 20 + 2 * 2048 * 4 + 4096 * 4 + config["D"] * 2 + 128
    return {
        "scan": scan,
        "select": select,
        "query": config["SW"] * 16 * nq * 4,
        "fused": scan + (nw + config["PILOT"]) * 16 * nq * 4,
    }


class CudaHead:
    """Buffers and launches of one configuration on one copy of an index."""

    def __init__(
        self,
        module: Module,
        config: dict[str, int],
        index: Index,
        tables: dict[str, Tensor],
        weight: Tensor,
        B: int,
        *,
        z: float = 4.0,
        parts: int = 0,
        refine_min: int = 16,
        stats: bool = False,
        space: "CudaHead | None" = None,
    ) -> None:
        dev = index.base.device
        self.module, self.config, self.index, self.B = module, config, index, B
        self.sms = (
            torch.cuda.get_device_properties(dev).multi_processor_count if dev.type == "cuda" else 1
        )
        nq = 8 * config["NT"]
        chunks = -(-config["WORDS"] // 8)
        self.P = parts or max(min(8, self.sms // 2), self.sms // B)
        self.shared = shared_bytes(config)
        empty = lambda *shape, dtype=torch.float32: torch.zeros(*shape, dtype=dtype, device=dev)  # noqa: E731
        if space is None:
            self.space = {
                "coded": empty(B, index.groups * 16),
                "group_energy": empty(B, index.groups),
                "along_shift": empty(2, nq),
                "qdump": empty(chunks * 4 * config["NT"] * 64, dtype=torch.int32),
                "upper": empty(B, index.nblk * 16),
                "bmax": empty(B, index.nblk),
                "top": empty(B, dtype=torch.int64),
                "best": empty(B, dtype=torch.int64),
                "done": empty(B, dtype=torch.int32),
                "barrier": empty(1, dtype=torch.int32),
                "token": empty(B, dtype=torch.int64),
                "logit": empty(B),
            }
        else:
            self.space = space.space
        self.stats = empty(B, 2, dtype=torch.int32)
        self.keep = (tables, weight)
        a = Args()
        for key in ("scale", "direction", "refine", "transform", "exact"):
            setattr(a, key, getattr(index, key).data_ptr())
        a.error, a.error_refined = index.error[0].data_ptr(), index.error[1].data_ptr()
        if config["META"]:
            self.interleaved = interleave(index)
            a.base = self.interleaved.data_ptr()
        else:
            a.base = index.base.data_ptr()
        a.weight = weight.data_ptr()
        if config["T8"]:
            a.transform, a.transform_scale = (
                index.transform8.data_ptr(),
                index.transform_scale.data_ptr(),
            )
        for key in ("word_group", "word_gain", "share_base", "share_refined"):
            setattr(a, key, tables[key].data_ptr())
        for key, value in self.space.items():
            setattr(a, key, None if key == "qdump" and not stats else value.data_ptr())
        a.stats = self.stats.data_ptr() if stats else None
        a.B, a.V, a.nblk, a.P, a.refine_min, a.z, a.inv_temp, a.seed, a.step = (
            B,
            index.V,
            index.nblk,
            self.P,
            refine_min,
            z,
            1.0,
            7,
            1,
        )
        a.mean_error = float(index.error[0, : index.V].float().mean())
        self.args = a

    def bind(self, hidden: Tensor) -> Args:
        a = Args()
        ctypes.pointer(a)[0] = self.args
        a.hidden = hidden.data_ptr()
        return a

    def query(self, a: Args) -> None:
        self.module.launch(
            "query_kernel",
            self.config["GROUPS"] + self.B,
            self.config["SW"] * 32,
            self.shared["query"],
            [a],
        )

    def scan(self, a: Args, pdl: bool = True) -> None:
        self.module.launch(
            "scan_kernel",
            self.sms,
            (self.config["NW"] + self.config["PILOT"]) * 32,
            self.shared["scan"],
            [a],
            PROGRAMMATIC if pdl else 0,
        )

    def select(self, a: Args, pdl: bool = True) -> None:
        grid = self.B * self.P
        self.module.launch(
            "select_kernel",
            grid,
            self.config["SW"] * 32,
            self.shared["select"],
            [a],
            PROGRAMMATIC if pdl else 0,
        )

    def empty(self, a: Args, pdl: bool = True) -> None:
        for grid in (self.config["GROUPS"] + self.B, self.sms, self.B * self.P):
            self.module.launch(
                "empty_kernel", grid, self.config["NW"] * 32, 0, [a], PROGRAMMATIC if pdl else 0
            )

    def three(self, a: Args, pdl: bool = True) -> None:
        self.query(a)
        self.scan(a, pdl)
        self.select(a, pdl)

    @property
    def fits_one_launch(self) -> bool:
        return self.shared["fused"] <= SHARED - 1024

    def fused(self, a: Args) -> None:
        b = Args()
        ctypes.pointer(b)[0] = a
        b.P = max(1, self.sms // self.B)
        self.module.launch(
            "fused_kernel",
            self.sms,
            (self.config["NW"] + self.config["PILOT"]) * 32,
            self.shared["fused"],
            [b],
            COOPERATIVE,
        )


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


class TritonHead:
    """The same for one query in Triton."""

    def __init__(
        self,
        index: Index,
        tables: dict[str, Tensor],
        weight: Tensor,
        *,
        z: float = 4.0,
        blocks: int = 8,
        words: int = 8,
        warps: int = 8,
        programs: int = 2,
        stats: bool = False,
        logits: bool = False,
        fast: bool = True,
        direct: bool = False,
    ) -> None:
        dev = index.base.device
        self.index, self.tables, self.weight, self.z, self.fast, self.logits = (
            index,
            tables,
            weight,
            z,
            fast,
            logits,
        )
        self.B, self.blocks, self.words, self.warps, self.direct = 1, blocks, words, warps, direct
        self.sms = (
            torch.cuda.get_device_properties(dev).multi_processor_count if dev.type == "cuda" else 4
        )
        self.programs = self.sms * programs
        self.units = power_of_two(-(-index.words // 32))
        self.mean_error = float(index.error[0, : index.V].float().mean())
        empty = lambda *shape, dtype=torch.float32: torch.zeros(*shape, dtype=dtype, device=dev)  # noqa: E731
        self.share = power_of_two(-(-index.nblk // self.sms) * 16)
        self.space = {
            "coded": empty(1, index.d),
            "energy": empty(index.groups),
            "count": empty(1, dtype=torch.int32),
            "planes": empty(self.units * 128, dtype=torch.int32),
            "steps": empty(self.units),
            "params": empty(5),
            "upper": empty(1, index.nblk * 16),
            "lists": empty(self.sms * self.share, dtype=torch.int32),
            "best": torch.full((1,), -0x7FFFFFFFFFFFFFFF, dtype=torch.int64, device=dev),
            "done": empty(1, dtype=torch.int32),
            "top": torch.full((1,), -0x7FFFFFFF, dtype=torch.int32, device=dev),
            "token": empty(1, dtype=torch.int64),
            "logit": empty(1),
        }
        self.stats = empty(1, 2, dtype=torch.int32)
        self.count = stats
        self.base = index.base.view(torch.int32)

    def bind(self, hidden: Tensor) -> Tensor:
        return hidden

    def query(self, hidden: Tensor, pdl: bool = False) -> None:
        import gpu_kernels_triton as kernels

        s, index, t = self.space, self.index, self.tables
        kernels.query_kernel[(index.groups + 1,)](
            index.transform if index.transform8 is None else index.transform8,
            index.transform_scale,
            index.exact,
            hidden,
            t["word_group"],
            t["word_gain"],
            t["share_base"],
            s["coded"],
            s["energy"],
            s["best"],
            s["top"],
            s["count"],
            s["planes"],
            s["steps"],
            s["params"],
            self.z**2,
            d=index.d,
            GROUPS=index.groups,
            GP=power_of_two(index.groups),
            WORDS=index.words,
            UP=self.units,
            BD=min(1024, power_of_two(index.d)),
            PDL=pdl,
            T8=index.transform8 is not None,
            DIRECT=self.direct,
            num_warps=8,
        )

    def scan(self, hidden: Tensor, pdl: bool = True) -> None:
        import gpu_kernels_triton as kernels

        s, index = self.space, self.index
        kernels.scan_kernel[(self.programs,)](
            self.base,
            index.scale,
            index.error,
            index.direction,
            hidden,
            self.weight,
            s["planes"],
            s["steps"],
            s["params"],
            s["upper"],
            s["best"],
            s["top"],
            index.V,
            index.nblk,
            self.mean_error,
            d=index.d,
            WORDS=index.words,
            UP=self.units,
            NB=self.blocks,
            WC=self.words,
            BD=min(1024, power_of_two(index.d)),
            FAST=self.fast,
            PDL=pdl,
            LOGITS=self.logits,
            num_warps=self.warps,
            **({"launch_pdl": True} if pdl else {}),
        )

    def select(self, hidden: Tensor, pdl: bool = True) -> None:
        import gpu_kernels_triton as kernels

        s, index = self.space, self.index
        kernels.select_kernel[(self.sms,)](
            s["upper"],
            hidden,
            self.weight,
            s["lists"],
            s["best"],
            s["top"],
            s["done"],
            s["token"],
            s["logit"],
            self.stats,
            index.V,
            d=index.d,
            SHARE=self.share,
            ROWS=8,
            BD=min(1024, power_of_two(index.d)),
            PDL=pdl,
            STATS=self.count,
            DIRECT=self.direct,
            num_warps=8,
            **({"launch_pdl": True} if pdl else {}),
        )

    def three(self, hidden: Tensor, pdl: bool = True) -> None:
        self.query(hidden, pdl)
        self.scan(hidden, pdl)
        self.select(hidden, pdl)

    def check(self, best: Any) -> None:
        token, logit = self.space["token"], self.space["logit"]
        if self.direct:
            token = 0x7FFFFFFF - (self.space["best"] & 0xFFFFFFFF)
            logit = self.space["best"].view(torch.int32)[1::2].view(torch.float32)  # non-negative
        require(
            bool((token == best.indices).all()), f"token {token.tolist()} {best.indices.tolist()}"
        )
        require(
            bool(((logit.double() - best.values.double()).abs() < 1e-2).all()),
            "exact logit differs",
        )

    def verify(self, hidden: Tensor, truth: Tensor) -> dict[str, Any]:
        """Scan and token against eager torch; raises if one differs."""
        index = self.index
        cuda = index.base.device.type == "cuda"
        self.space["upper"].fill_(float("nan"))
        self.query(hidden)
        self.scan(hidden, pdl=False)
        coded = self.space["coded"].clone()
        wanted = hidden.double() @ index.transform.double().T
        require(float((coded.double() - wanted).norm() / wanted.norm()) < 1e-5, "transform differs")
        query = reference_query(self.tables, coded, 4)
        estimates, width = reference_scan(index, self.tables, query, hidden, coded, self.z)
        gap = float(
            (self.space["upper"][:, : index.V].double() - estimates - (0 if self.logits else width))
            .abs()
            .max()
        )
        require(gap < 2e-3, f"bounds differ by {gap}")
        for _ in range(2):
            self.space["best"].fill_(-0x7FFFFFFFFFFFFFFF)
            self.space["top"].fill_(-0x7FFFFFFF)
            self.stats.zero_()
            self.three(hidden, pdl=cuda)
        self.check(truth.max(1))
        return {"block_gap": gap, "mean_survivors": float(self.stats[0, 0])}


def interleave(index: Index) -> Tensor:
    """`base` with scale, error (bf16) and direction (float32) of its 16 rows behind every block."""
    n = index.nblk
    numbers = [
        index.scale.view(n, 16).view(torch.uint8),
        index.error[0].view(n, 16).view(torch.uint8),
        index.direction.view(n, 16).view(torch.uint8),
    ]
    return torch.cat([index.base.view(n, -1), *numbers], 1).contiguous()


# ---------------------------------------------------------------- checks


def require(holds: bool, what: str) -> None:
    if not holds:
        raise RuntimeError(what)


def read_query(head: CudaHead) -> Tensor:
    """int8 query of a CUDA head back in the order of the reference: float32[NQ, chunks, 128]."""
    nt = head.config["NT"]
    words = head.space["qdump"].view(-1, 4, nt, 8, 4, 2)  # chunk, field, nt, n, word & 3, word >> 2
    words = words.permute(2, 3, 0, 5, 4, 1).reshape(nt * 8, -1, 8, 4)  # n, chunk, word, field
    return words.contiguous().view(torch.int8).view(nt * 8, -1, 128).float()


def exact_logits(states: Tensor, weight: Tensor) -> Tensor:
    """float32 logits."""
    return torch.cat(
        [
            states.float() @ weight[i : i + 65536].float().T
            for i in range(0, weight.shape[0], 65536)
        ],
        1,
    )


def check_tokens(head: CudaHead, best: Any) -> None:
    """The token of every query has the best float32 logit."""
    torch.cuda.synchronize()
    token, logit = head.space["token"], head.space["logit"]
    if head.config["DIRECT"]:
        token = head.space["best"] & 0xFFFFFFFF
        bits = head.space["best"].view(torch.int32)[
            1::2
        ]  # of non-negative floats the order bit is the sign bit
        logit = (bits & 0x7FFFFFFF).view(torch.float32)
    same = token == best.indices
    require(
        bool(same.all()),
        f"{int((~same).sum())} of {head.B} tokens differ: {token.tolist()} {best.indices.tolist()}",
    )
    require(
        bool(((logit.double() - best.values.double()).abs() < 1e-2).all()), "exact logit differs"
    )


def verify(
    head: CudaHead,
    tables: dict[str, Tensor],
    hidden: Tensor,
    truth: Tensor,
    *,
    fused: bool,
) -> dict[str, Any]:
    """Query, scan and token of a design against eager torch; raises if one differs."""
    index, B = head.index, head.B
    a = head.bind(hidden)
    for value in (head.space["upper"], head.space["bmax"]):
        value.fill_(float("nan"))
    for key in ("best", "top", "done"):
        head.space[key].zero_()
    head.query(a)
    head.scan(a, pdl=False)
    torch.cuda.synchronize()
    coded = head.space["coded"][:B].clone()
    wanted = hidden.double() @ index.transform.double().T
    error = float((coded.double() - wanted).norm() / wanted.norm())
    require(error < 1e-5, f"transform differs by {error}")
    query = reference_query(tables, coded, head.config["CG"])
    chunks = int(tables["chunks"])
    if not head.config["ONE"]:
        require(torch.equal(read_query(head)[:B], query["q"][:, :chunks]), "query integers differ")
    estimates, width = reference_scan(index, tables, query, hidden, coded, head.args.z)
    upper = estimates + width
    blocks = (
        torch.nn.functional.pad(upper, (0, index.nblk * 16 - index.V), value=-3e38)
        .view(B, -1, 16)
        .amax(2)
    )
    got = head.space["bmax"].double()
    gap = float((got - blocks).abs().max())
    require(gap < 2e-3, f"block maxima differ by {gap}")
    if head.config["LOGITS"]:
        gap = float((head.space["upper"][:, : index.V].double() - estimates).abs().max())
        require(gap < 2e-3, f"estimates differ by {gap}")
    standard = ((truth - estimates) / (width / head.args.z)).flatten()
    for key in ("best", "top", "done"):
        head.space[key].zero_()
    head.space["token"].fill_(-1)
    head.space["upper"].fill_(float("nan"))
    for _ in range(2):
        head.stats.zero_()
        (head.fused if fused else head.three)(a)
    torch.cuda.synchronize()
    check_tokens(head, truth.max(1))
    return {
        "block_gap": gap,
        "error_std": float(standard.std()),
        "survivors": head.stats[:, 0].tolist(),
        "exact": head.stats[:, 1].tolist(),
    }


# ---------------------------------------------------------------- times


def graph_of(calls: list[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for call in calls:
            call()
    return graph


def times(graphs: dict[str, torch.cuda.CUDAGraph], repeats: int) -> dict[str, dict[str, float]]:
    """Interleaved replays; microseconds a call, median and 10th/90th percentile."""
    names = list(graphs)
    events = {
        n: [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(repeats)
        ]
        for n in names
    }
    for n in names:
        graphs[n].replay()
    for i in range(repeats):
        for n in names:
            graphs[n].replay() if i == 0 else None
            events[n][i][0].record()
            graphs[n].replay()
            events[n][i][1].record()
    torch.cuda.synchronize()
    out = {}
    for n in names:
        t = torch.tensor([s.elapsed_time(e) for s, e in events[n]]) * 1e3 / CALLS
        out[n] = {
            "us": float(t.median()),
            "p10": float(t.quantile(0.1)),
            "p90": float(t.quantile(0.9)),
        }
    return out


def python_cost(call: Callable[[int], Any], repeats: int = 400) -> dict[str, float]:
    """Called from Python in a row: host microseconds a call, and all of it with the device."""
    for i in range(20):
        call(i)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(repeats):
        call(i)
    host = time.perf_counter()
    torch.cuda.synchronize()
    end = time.perf_counter()
    lone = []
    for i in range(100):
        torch.cuda.synchronize()
        t = time.perf_counter()
        call(i)
        torch.cuda.synchronize()
        lone.append(time.perf_counter() - t)
    return {
        "host_us": (host - start) / repeats * 1e6,
        "row_us": (end - start) / repeats * 1e6,
        "alone_us": sorted(lone)[50] * 1e6,
    }


def clone_index(index: Index) -> Index:
    fields = {f.name: getattr(index, f.name) for f in dataclasses.fields(index)}
    return Index(
        **{
            k: v.clone() if isinstance(v, Tensor) and k != "refine" else v
            for k, v in fields.items()
        }
    )


def copy_bandwidth() -> float:
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    best = 0.0
    for _ in range(5):
        s, e = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        s.record()
        for _ in range(4):
            y.copy_(x)
        e.record()
        torch.cuda.synchronize()
        best = max(best, 8 * (1 << 30) / s.elapsed_time(e) / 1e9)
    return best


def round_or_nan(x: float) -> float:
    return round(x) if x == x else x


def log(*what: Any) -> None:
    print(*what, file=sys.stderr, flush=True)


def measure(
    shape: str,
    bits: float,
    batches: list[int],
    variants: list[dict[str, Any]],
    repeats: int,
    folder: Path,
    triton: bool,
) -> dict[str, Any]:
    """Verify and time all designs on one shape."""
    V, d = SHAPES[shape]
    began = time.perf_counter()
    index, weight, hidden, index8 = make_problem(V, d, bits, "cuda")
    tables = plan(index)
    configs = {
        name_of(c): c
        for B in batches
        for v in variants
        if B in v.get("batches", batches)
        for c in [config_of(index, B, **v["config"])]
    }
    cubins = build(list(configs.values()), folder)
    modules = {name: Module(path) for name, path in cubins.items()}
    copies = [index] + [clone_index(index) for _ in range(3)]
    copies8 = [index8] + [clone_index(index8) for _ in range(3)]
    tables8 = plan(index8)
    log(
        f"{shape} {bits}: prepared in {time.perf_counter() - began:.1f} s, {index.words} words,",
        f"segments {[(s[0], s[1]) for s in index.segments]}",
    )
    document: dict[str, Any] = {
        "shape": shape,
        "V": V,
        "d": d,
        "bits": bits,
        "words": index.words,
        "batches": {},
    }
    row_bytes = index.words * 4 + 8
    document["scan_bytes"] = index.nblk * 16 * row_bytes
    document["transform_bytes"] = index.transform.numel() * 2
    for B in batches:
        states = [hidden[i, :B].contiguous() for i in range(CALLS)]
        truths = [exact_logits(s, weight) for s in states]
        truth = truths[0].double()
        truths = [t.max(1) for t in truths]
        graphs = {
            "dense": graph_of(
                [lambda s=s: torch.nn.functional.linear(s, weight).argmax(1) for s in states]
            )
        }
        checks: dict[str, Any] = {}
        python: dict[str, Any] = {}
        holders = []
        for v in variants:
            if B not in v.get("batches", batches):
                continue
            config = config_of(index, B, **v["config"])
            label = v["name"]
            try:
                heads = []
                mine, own_tables = (copies8, tables8) if config["T8"] else (copies, tables)
                for copy in mine:
                    heads.append(
                        CudaHead(
                            modules[name_of(config)],
                            config,
                            copy,
                            own_tables,
                            weight,
                            B,
                            space=heads[0] if heads else None,
                            **v.get("head", {}),
                        )
                    )
                if not config["SAMPLE"]:
                    probe = CudaHead(
                        modules[name_of(config)],
                        config,
                        mine[0],
                        own_tables,
                        weight,
                        B,
                        stats=True,
                        space=heads[0],
                        **v.get("head", {}),
                    )
                    for fused in v.get("fused", (False,)):
                        if fused and not heads[0].fits_one_launch:
                            continue
                        checks[f"{label}{' fused' if fused else ''}"] = verify(
                            probe, own_tables, states[0], truth, fused=fused
                        )
                    every = [probe.bind(s) for s in states]
                    probe.stats.zero_()
                    for a, t in zip(every, truths, strict=True):
                        probe.three(a)
                        check_tokens(probe, t)
                    checks[label]["mean_survivors"] = float(probe.stats[:, 0].sum()) / B / CALLS
                    checks[label]["mean_exact"] = float(probe.stats[:, 1].sum()) / B / CALLS
                bound = [(heads[i % 4], heads[i % 4].bind(states[i])) for i in range(CALLS)]
                holders.append((heads, bound))
                for kind in v.get("time", ("three",)):
                    if kind == "three":
                        graphs[label] = graph_of([lambda h=h, a=a: h.three(a) for h, a in bound])
                    elif kind == "nopdl":
                        graphs[f"{label} without overlap"] = graph_of(
                            [lambda h=h, a=a: h.three(a, False) for h, a in bound]
                        )
                    elif kind == "fused" and not heads[0].fits_one_launch:
                        log(f"{shape} {bits} B={B} {label}: no room for one launch")
                    elif kind == "fused":
                        graphs[f"{label} one launch"] = graph_of(
                            [lambda h=h, a=a: h.fused(a) for h, a in bound]
                        )
                    elif kind == "scan":
                        graphs[f"{label} scan alone"] = graph_of(
                            [lambda h=h, a=a: h.scan(a, False) for h, a in bound]
                        )
                    elif kind == "query":
                        graphs[f"{label} query alone"] = graph_of(
                            [lambda h=h, a=a: h.query(a) for h, a in bound]
                        )
                    elif kind == "empty":
                        graphs["three empty launches"] = graph_of(
                            [lambda h=h, a=a: h.empty(a) for h, a in bound]
                        )
                        graphs["three empty launches without overlap"] = graph_of(
                            [lambda h=h, a=a: h.empty(a, False) for h, a in bound]
                        )
                    elif kind == "python":
                        single = [graph_of([lambda h=h, a=a: h.three(a)]) for h, a in bound]
                        python[f"{label} own graph"] = python_cost(
                            lambda i, g=single: g[i % CALLS].replay()
                        )
                        python[f"{label} three launches"] = python_cost(
                            lambda i, b=bound: b[i % CALLS][0].three(b[i % CALLS][1])
                        )
                        if heads[0].fits_one_launch:
                            python[f"{label} one launch"] = python_cost(
                                lambda i, b=bound: b[i % CALLS][0].fused(b[i % CALLS][1])
                            )
                        python["dense"] = python_cost(
                            lambda i, x=states: torch.nn.functional.linear(
                                x[i % CALLS], weight
                            ).argmax(1)
                        )
            except RuntimeError as error:
                log(f"{shape} {bits} B={B} {label}: {error}")
                checks[label] = {"failed": str(error)}
        for v in TRITON if B == 1 and triton else []:
            label = v["name"]
            try:
                triton_heads = [TritonHead(copy, tables8, weight, **v["head"]) for copy in copies8]
                probe3 = TritonHead(index8, tables8, weight, stats=True, **v["head"])
                checks[label] = probe3.verify(states[0], truth)
                probe3.stats.zero_()
                for x, t in zip(states, truths, strict=True):
                    probe3.three(x)
                    probe3.check(t)
                checks[label]["mean_survivors"] = float(probe3.stats[0, 0]) / CALLS
                bound_heads = [(triton_heads[i % 4], states[i]) for i in range(CALLS)]
                graphs[label] = graph_of([lambda h=h, x=x: h.three(x) for h, x in bound_heads])
                graphs[f"{label} without overlap"] = graph_of(
                    [lambda h=h, x=x: h.three(x, False) for h, x in bound_heads]
                )
                graphs[f"{label} scan alone"] = graph_of(
                    [lambda h=h, x=x: h.scan(x, False) for h, x in bound_heads]
                )
                graphs[f"{label} query alone"] = graph_of(
                    [lambda h=h, x=x: h.query(x) for h, x in bound_heads]
                )
                if v is TRITON[0]:
                    python[f"{label} three launches"] = python_cost(
                        lambda i, b=bound_heads: b[i % CALLS][0].three(b[i % CALLS][1])
                    )
                holders.append((triton_heads, bound_heads))
            except Exception as error:  # noqa: BLE001
                log(f"{shape} {bits} {label}: {type(error).__name__} {error}")
                checks[label] = {"failed": str(error)}
        timing = times(graphs, repeats)
        document["batches"][B] = {"times": timing, "checks": checks, "python": python}
        log(
            f"-- {shape} bits {bits} batch {B}; at 3.02 TB/s: scan",
            f"{document['scan_bytes'] / 3.02e6:.1f} us, transform",
            f"{document['transform_bytes'] / 3.02e6:.1f} us",
        )
        for name, t in timing.items():
            check = checks.get(name, {})
            counts = [check.get(k, float("nan")) for k in ("mean_survivors", "mean_exact")]
            spread = f"({t['p10']:.1f}-{t['p90']:.1f})"
            log(
                f"   {name:44s} {t['us']:7.2f} us {spread}  survivors, exact",
                *map(round_or_nan, counts),
            )
        for name, t in python.items():
            log(f"   python {name:37s}", *(f"{k} {v:.1f}" for k, v in t.items()))
        del graphs
    return document


TRITON: list[dict[str, Any]] = [
    {
        "name": f"triton {blocks} blocks {words} words {warps} warps x{programs}",
        "head": {
            "blocks": blocks,
            "words": words,
            "warps": warps,
            "programs": programs,
            "direct": True,
        },
    }
    for blocks, words, warps, programs in (
        (2, 8, 2, 16),
        (4, 8, 4, 8),
        (2, 32, 4, 8),
        (4, 8, 2, 16),
        (2, 16, 2, 16),
        (2, 8, 1, 32),
        (1, 8, 1, 32),
    )
]


def variants_of(which: str) -> list[dict[str, Any]]:
    """Designs to compare."""
    one, many = {"warps": 11, "pilot": 1, "direct": 1, "t8": 1}, {"warps": 16, "direct": 1, "t8": 1}
    rare = {"refine_min": 64}
    if which == "final":
        return [
            {
                "name": "cuda",
                "config": one,
                "time": ("three", "nopdl", "fused", "scan", "query", "empty", "python"),
                "fused": (False, True),
                "batches": [1],
            },
            {
                "name": "cuda",
                "config": many,
                "head": rare,
                "time": ("three", "nopdl", "fused", "scan", "query", "empty", "python"),
                "fused": (False, True),
                "batches": [8, 32],
            },
            {
                "name": "cuda bf16 transform, last block",
                "config": {"warps": 16},
                "time": ("three",),
            },
            {
                "name": "cuda z=6",
                "config": one,
                "head": {"z": 6.0},
                "time": ("three",),
                "batches": [1],
            },
            {
                "name": "cuda z=8",
                "config": one,
                "head": {"z": 8.0},
                "time": ("three",),
                "batches": [1],
            },
            {
                "name": "cuda z=6",
                "config": many,
                "head": rare | {"z": 6.0},
                "time": ("three",),
                "batches": [8, 32],
            },
            {
                "name": "cuda z=8",
                "config": many,
                "head": rare | {"z": 8.0},
                "time": ("three",),
                "batches": [8, 32],
            },
            {
                "name": "cuda logits",
                "config": one | {"logits": 1},
                "time": ("three",),
                "batches": [1],
            },
            {
                "name": "cuda sample",
                "config": one | {"sample": 1},
                "time": ("three",),
                "batches": [1],
            },
            {
                "name": "cuda logits",
                "config": many | {"logits": 1},
                "head": rare,
                "time": ("three",),
                "batches": [8, 32],
            },
            {
                "name": "cuda sample",
                "config": many | {"sample": 1},
                "head": rare,
                "time": ("three",),
                "batches": [8, 32],
            },
        ]
    return [
        {
            "name": "cuda",
            "config": {"warps": 16},
            "time": ("three", "fused", "scan", "query"),
            "fused": (False, True),
        },
        {"name": "cuda t8", "config": {"warps": 16, "t8": 1}, "time": ("three", "query")},
        {"name": "cuda direct", "config": {"warps": 16, "direct": 1}, "time": ("three",)},
        {
            "name": "cuda direct t8",
            "config": {"warps": 16, "direct": 1, "t8": 1},
            "time": ("three", "python"),
        },
        *(
            {
                "name": f"cuda pilot direct t8 {warps} warps CG{group or 'auto'}",
                "config": {"warps": warps, "group": group, "pilot": 1, "direct": 1, "t8": 1},
                "time": ("three", "scan"),
                "batches": [1],
            }
            for warps, group in ((15, None), (11, None), (11, 2), (7, None))
        ),
        *(
            {
                "name": f"cuda direct t8 refine above {least} parts {parts}",
                "config": many,
                "head": {"refine_min": least, "parts": parts},
                "time": ("three",),
                "batches": [8, 32],
            }
            for least, parts in ((16, 0), (64, 0), (64, 8), (1 << 30, 8))
        ),
        {
            "name": "cuda direct t8 meta",
            "config": {"warps": 16, "direct": 1, "t8": 1, "meta": 1},
            "time": ("three",),
        },
        {
            "name": "cuda pilot",
            "config": {"warps": 15, "pilot": 1},
            "time": ("three", "fused", "scan"),
            "fused": (False, True),
            "batches": [1],
        },
    ]


def once(shape: str, bits: float, B: int, folder: Path) -> None:
    """Three calls without a graph, for a profiler."""
    V, d = SHAPES[shape]
    index, weight, hidden, _ = make_problem(V, d, bits, "cuda")
    config = config_of(index, B, 16)
    head = CudaHead(
        Module(build([config], folder)[name_of(config)]), config, index, plan(index), weight, B
    )
    for i in range(3):
        head.three(head.bind(hidden[i, :B].contiguous()), False)
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", choices=SHAPES)
    parser.add_argument("--bits", action="append", type=float)
    parser.add_argument("--batch", action="append", type=int)
    parser.add_argument("--variants", default="all")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--build", type=Path, default=Path("out/gpu"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--triton", action="store_true", help="the Triton kernels too, batch 1")
    parser.add_argument(
        "--once", action="store_true", help="three calls without a graph, for a profiler"
    )
    args = parser.parse_args()
    if args.once:
        with torch.inference_mode():
            once(
                (args.shape or ["llama-3.2-1b"])[0],
                (args.bits or [1.5])[0],
                (args.batch or [1])[0],
                args.build,
            )
        return
    documents = []
    bandwidth = copy_bandwidth()
    log(torch.cuda.get_device_name(), torch.__version__, f"copy {bandwidth:.2f} TB/s")
    with torch.inference_mode():
        for shape in args.shape or ["llama-3.2-1b"]:
            for bits in args.bits or [1.5]:
                documents.append(
                    measure(
                        shape,
                        bits,
                        args.batch or [1, 8, 32],
                        variants_of(args.variants),
                        args.repeats,
                        args.build,
                        args.triton,
                    )
                )
                torch.cuda.empty_cache()
                if args.json:
                    args.json.write_text(
                        json.dumps(
                            {
                                "copy_tb_per_sec": bandwidth,
                                "device": torch.cuda.get_device_name(),
                                "runs": documents,
                            }
                        )
                    )


if __name__ == "__main__":
    main()
