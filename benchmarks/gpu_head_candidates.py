"""What should search a head's codes on a GPU? Kernel designs side by side, verified, then timed.

    python benchmarks/gpu_head_candidates.py --shape llama-3.2-1b --bits 1.5 --json out.json

Rows and hidden states are synthetic: coded coordinates with variances falling as i^-1.1 (as measured
on Gemma-3-270M), rows in clusters of 64 that share 40 % of their energy, log-normal row norms, the mean
direction with 30 % of the energy of a hidden state, and for each hidden state one target row
4.5-8 standard deviations above the mean logit. The index has the layout of `flashhead.index.codes`.

Every design is compared with eager torch on the same integers, and its token with float32 logits,
before it is timed. Times: graphs of 8 calls, each call with its own copy of the index and its own hidden
states, CUDA events around a replay, median of the replays, divided by 8.
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
            segments.append((last - first, base[start], STEP[base[start]] * variance**0.5, variance))
        start = stop
    return segments


def pack(fields: Tensor) -> Tensor:
    parts = fields.view(fields.shape[0], -1, 4, 4)
    return parts[:, :, 0] | parts[:, :, 1] << 2 | parts[:, :, 2] << 4 | parts[:, :, 3] << 6


def make_problem(V: int, d: int, bits: float, device: str, seed: int = 0) -> tuple[Index, Tensor, Tensor]:
    """Index, weight bf16[V, d], hidden bf16[CALLS, 32, d]."""
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
    centres = rand(-(-V // 64), d)
    coordinates_of = {}
    targets = torch.randint(0, V, (CALLS * 32,), generator=g, device=device)
    mean = 0.02 * rand(d)
    for start in range(0, V, 16384):
        stop = min(V, start + 16384)
        part = rand(stop - start, d) * 0.6**0.5
        part += centres[torch.arange(start, stop, device=device) // 64] * 0.4**0.5
        part *= root * torch.exp(0.2 * rand(stop - start, 1))
        for i, t in enumerate(targets.tolist()):
            if start <= t < stop:
                coordinates_of[i] = part[t - start].clone()
        weight[start:stop] = (part @ q + 0.015 * rand(stop - start, 1) * r + mean).bfloat16()
    unit = torch.stack([coordinates_of[i] / coordinates_of[i].norm() for i in range(CALLS * 32)])
    noise = rand(CALLS * 32, d)
    wanted = 4.5 + 3.5 * torch.rand(CALLS * 32, 1, generator=g, device=device) ** 2
    # the target's logit in standard deviations of logits over rows of mean norm
    noise += (wanted * 3 / torch.stack(list(map(coordinates_of.get, range(CALLS * 32)))).norm(dim=1)[:, None]
              - (noise * unit).sum(1, keepdim=True)) * unit
    hidden = (noise @ q + (0.3 / 0.7 * d) ** 0.5 * r).bfloat16().view(CALLS, 32, d)
    exact = torch.stack([r, mean]).float()
    functionals = torch.cat([transform.double(), exact[:1].double()])
    inverse = torch.linalg.solve(functionals.T @ functionals, functionals.T).float()
    index = encode(weight, mean, inverse, segments, bits, exact, transform)
    return index, weight, hidden


def encode(weight: Tensor, mean: Tensor, inverse: Tensor, segments: list, bits: float, exact: Tensor, transform: Tensor) -> Index:
    """As `flashhead.index.build_codes` encodes rows."""
    V, d = weight.shape
    energy = sum(s[3] * s[0] * 16 for s in segments)
    parts: dict[str, list[Tensor]] = {k: [] for k in ("base", "refine", "scale", "direction", "e0", "e1")}
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
            e0.append((part - (prefix.float() - (2**b - 1) / 2) * (4 * step) * unit).square().sum(1))
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
        shares.append(torch.cat([torch.full((s[0],), float(share[i]) / (s[0] * 16)) for i, s in enumerate(segments)]))
    return Index(
        V, d, bits, segments, base, full["refine"],
        pad(full["scale"]), torch.stack([pad(full["e0"].sum(1).sqrt().bfloat16()), pad(full["e1"].sum(1).sqrt().bfloat16())]),
        pad(full["direction"]), exact, transform, torch.stack(shares).float(),
    )  # fmt: skip


def plan(index: Index) -> dict[str, Tensor]:
    """Tables: the group of 16 coordinates and the gain of every base word, then of every refine word."""
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
    return {k: v.to(index.base.device) for k, v in tables.items()} | {"chunks": torch.tensor(chunks)}


# ---------------------------------------------------------------- eager reference


def unpack(words: Tensor) -> Tensor:
    return torch.stack([words >> s & 3 for s in (0, 2, 4, 6)], -2).flatten(-3)


def reference_query(index: Index, tables: dict[str, Tensor], coded: Tensor, unit: int) -> dict[str, Tensor]:
    """int8 query from `coded` float32[n, D], one scale for `unit` chunks of 8 words, as the kernels make it."""
    n, chunks = coded.shape[0], int(tables["chunks"])
    groups = tables["word_group"].long()[: chunks * 8]
    values = coded.view(n, -1, 16)[:, groups.clamp_min(0)] * tables["word_gain"][: chunks * 8, None]
    values = torch.where((groups >= 0)[:, None], values, 0.0)
    values = torch.nn.functional.pad(values, (0, 0, 0, -chunks % unit * 8)).view(n, -1, unit * 128)
    peak = values.abs().amax(2)
    scale = (peak / 127.0).clamp_min(1e-30)[:, :, None].expand_as(values)
    inverse = 127.0 / peak.clamp_min(1e-28)
    return {"q": (values * inverse[:, :, None]).round_().view(n, -1, 128), "scale": scale.reshape(n, -1, 128)[:, :, 0]}


def reference_scan(index: Index, tables: dict[str, Tensor], query: dict[str, Tensor], hidden: Tensor, coded: Tensor, z: float):
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
    variance = coding[:, None] * index.error[0, : index.V].double().square() + rounding[:, None] * row_scale.square()
    return estimates, z * variance.sqrt()


# ---------------------------------------------------------------- CUDA through the driver


class Args(ctypes.Structure):
    _pointers = (
        "base scale error error_refined direction refine transform exact weight word_group word_gain share_base "
        "share_refined hidden coded group_energy along_shift qdump upper bmax top best done barrier token logit stats"
    ).split()
    _fields_ = [(name, ctypes.c_void_p) for name in _pointers] + [
        *((name, ctypes.c_int) for name in ("B", "V", "nblk", "P", "refine_min")),
        ("z", ctypes.c_float), ("mean_error", ctypes.c_float), ("inv_temp", ctypes.c_float),
        ("seed", ctypes.c_uint32), ("step", ctypes.c_uint32),
    ]  # fmt: skip


class LaunchAttribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int * 16)]


class LaunchConfig(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint), ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)), ("count", ctypes.c_uint),
    ]  # fmt: skip


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
            self._check(self.cuda.cuModuleGetFunction(ctypes.byref(function), self.handle, name.encode()))
            if shared > 48 * 1024:
                self._check(self.cuda.cuFuncSetAttribute(function, 8, shared))
            self.functions[name] = function
        return self.functions[name]

    def launch(self, name: str, grid: int, threads: int, shared: int, arguments: list[Any], attribute: int = 0) -> None:
        function = self.function(name, shared)
        config = LaunchConfig((grid, 1, 1), (threads, 1, 1), shared, torch.cuda.current_stream().cuda_stream)
        if attribute:
            entry = LaunchAttribute(attribute)
            entry.value[0] = 1
            config.attributes = ctypes.pointer(entry)
            config.count = 1
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.cast(ctypes.byref(x), ctypes.c_void_p) for x in arguments))
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
                ["nvcc", "-cubin", "-arch=sm_90", "-O3", "-Xptxas", "-v", *defines, "-o", str(path), str(SOURCE)],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
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
    return min(range(1, most + 1), key=lambda g: (math.ceil(chunks / g) * g - chunks + (most - g) * 0.6, -g))


SHARED = 227 * 1024


def config_of(index: Index, B: int, warps: int, group: int | None = None, meta: int = 0, sample: int = 0, logits: int = 0, evict: int = 1, depth: int | None = None, regs: int | None = None, one: bool | None = None, steps: int | None = None) -> dict[str, int]:
    nt = 1 if B <= 8 else 2 if B <= 16 else 4
    chunks = -(-index.words // 8)
    group = group or chunk_group(chunks, 4)
    config = {
        "D": index.d, "GROUPS": index.groups, "WORDS": index.words, "NT": nt, "NW": warps, "CG": group,
        "META": meta, "SAMPLE": sample, "LOGITS": logits, "EVICT": evict, "DEPTH": 0,
        "REGS": regs or min(65536 // (32 * warps) // 8 * 8, 80 if nt == 1 else 128), "SW": 8,
        "QD": steps or (8 if nt == 1 else 4),
        "ONE": int(B == 1 if one is None else one),
    }  # fmt: skip
    sizes = shared_bytes(config)
    room = SHARED - sizes["scan"] - sizes["select"] - sizes["query"] - 4096
    config["DEPTH"] = max(2, min(12, depth or room // (warps * (2 * group * 512 + 256 + 8))))
    return config


def shared_bytes(config: dict[str, int]) -> dict[str, int]:
    """Dynamic shared memory of the kernels."""
    nq, nw, chunks = 8 * config["NT"], config["NW"], -(-config["WORDS"] // 8)
    padded = -(-chunks // config["CG"]) * config["CG"]
    refine = -(-config["GROUPS"] // 8)
    scan = padded * 4 * config["NT"] * 256 + 2 * padded // config["CG"] * nq * 4 + 7 * nq * 4 + nw * nq * 8 + padded * 64 + nw * config["DEPTH"] * 8
    scan = -(-scan // 128) * 128 + nw * config["DEPTH"] * (2 * config["CG"] * 512 + 256)
    select = 128 * refine + 24 + 8 * refine + 20 + 2 * 1024 * 4 + 4096 * 4 + config["D"] * 2 + 128
    return {"scan": scan, "select": select, "query": config["SW"] * 16 * nq * 4, "fused": scan + nw * 16 * nq * 4}


class CudaHead:
    """Buffers and launches of one configuration on one copy of an index."""

    def __init__(self, module: Module, config: dict[str, int], index: Index, tables: dict[str, Tensor], weight: Tensor, B: int, *, z: float = 4.0, parts: int = 0, refine_min: int = 16, stats: bool = False, space: "CudaHead | None" = None) -> None:
        dev = index.base.device
        self.module, self.config, self.index, self.B = module, config, index, B
        self.sms = torch.cuda.get_device_properties(dev).multi_processor_count if dev.type == "cuda" else 1
        nq = 8 * config["NT"]
        chunks = -(-config["WORDS"] // 8)
        self.P = parts or max(1, self.sms // B if B > 1 else self.sms)
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
        for key in ("word_group", "word_gain", "share_base", "share_refined"):
            setattr(a, key, tables[key].data_ptr())
        for key, value in self.space.items():
            setattr(a, key, None if key == "qdump" and not stats else value.data_ptr())
        a.stats = self.stats.data_ptr() if stats else None
        a.B, a.V, a.nblk, a.P, a.refine_min, a.z, a.inv_temp, a.seed, a.step = B, index.V, index.nblk, self.P, refine_min, z, 1.0, 7, 1
        a.mean_error = float(index.error[0, : index.V].float().mean())
        self.args = a

    def bind(self, hidden: Tensor) -> Args:
        a = Args()
        ctypes.pointer(a)[0] = self.args
        a.hidden = hidden.data_ptr()
        return a

    def query(self, a: Args) -> None:
        self.module.launch("query_kernel", self.config["GROUPS"] + self.B, self.config["SW"] * 32, self.shared["query"], [a])

    def scan(self, a: Args, pdl: bool = True) -> None:
        self.module.launch("scan_kernel", self.sms, self.config["NW"] * 32, self.shared["scan"], [a], PROGRAMMATIC if pdl else 0)

    def select(self, a: Args, pdl: bool = True) -> None:
        grid = self.B * self.P
        self.module.launch("select_kernel", grid, self.config["SW"] * 32, self.shared["select"], [a], PROGRAMMATIC if pdl else 0)

    def empty(self, a: Args, pdl: bool = True) -> None:
        for grid in (self.config["GROUPS"] + self.B, self.sms, self.B * self.P):
            self.module.launch("empty_kernel", grid, self.config["NW"] * 32, 0, [a], PROGRAMMATIC if pdl else 0)

    def three(self, a: Args, pdl: bool = True) -> None:
        self.query(a)
        self.scan(a, pdl)
        self.select(a, pdl)

    def fused(self, a: Args) -> None:
        b = Args()
        ctypes.pointer(b)[0] = a
        b.P = max(1, self.sms // self.B)
        self.module.launch("fused_kernel", self.sms, self.config["NW"] * 32, self.shared["fused"], [b], COOPERATIVE)


def interleave(index: Index) -> Tensor:
    """`base` with scale, error (bf16) and direction (float32) of its 16 rows behind every block."""
    n = index.nblk
    numbers = [
        index.scale.view(n, 16).view(torch.uint8), index.error[0].view(n, 16).view(torch.uint8),
        index.direction.view(n, 16).view(torch.uint8),
    ]  # fmt: skip
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


def verify(head: CudaHead, tables: dict[str, Tensor], hidden: Tensor, weight: Tensor, truth: Tensor, *, fused: bool) -> dict[str, Any]:
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
    query = reference_query(index, tables, coded, head.config["CG"])
    chunks = int(tables["chunks"])
    if not head.config["ONE"]:
        require(torch.equal(read_query(head)[:B], query["q"][:, :chunks]), "query integers differ")
    estimates, width = reference_scan(index, tables, query, hidden, coded, head.args.z)
    upper = estimates + width
    blocks = torch.nn.functional.pad(upper, (0, index.nblk * 16 - index.V), value=-3e38).view(B, -1, 16).amax(2)
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
    token = head.space["token"]
    best = truth.max(1)
    same = token == best.indices
    require(bool(same.all()), f"{int((~same).sum())} of {B} tokens differ: {token.tolist()} {best.indices.tolist()}")
    require(bool(((head.space["logit"].double() - best.values).abs() < 1e-2).all()), "exact logit differs")
    return {"block_gap": gap, "error_std": float(standard.std()), "survivors": head.stats[:, 0].tolist(), "exact": head.stats[:, 1].tolist()}


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
    events = {n: [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)] for n in names}
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
        out[n] = {"us": float(t.median()), "p10": float(t.quantile(0.1)), "p90": float(t.quantile(0.9))}
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
    return {"host_us": (host - start) / repeats * 1e6, "row_us": (end - start) / repeats * 1e6, "alone_us": sorted(lone)[50] * 1e6}


def clone_index(index: Index) -> Index:
    fields = {f.name: getattr(index, f.name) for f in dataclasses.fields(index)}
    return Index(**{k: v.clone() if isinstance(v, Tensor) and k != "refine" else v for k, v in fields.items()})


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


def log(*what: Any) -> None:
    print(*what, file=sys.stderr, flush=True)


def measure(shape: str, bits: float, batches: list[int], variants: list[dict[str, Any]], repeats: int, folder: Path) -> dict[str, Any]:
    """Verify and time all designs on one shape."""
    V, d = SHAPES[shape]
    began = time.perf_counter()
    index, weight, hidden = make_problem(V, d, bits, "cuda")
    tables = plan(index)
    configs = {name_of(c): c for B in batches for v in variants if B in v.get("batches", batches) for c in [config_of(index, B, **v["config"])]}
    cubins = build(list(configs.values()), folder)
    modules = {name: Module(path) for name, path in cubins.items()}
    copies = [index] + [clone_index(index) for _ in range(3)]
    log(f"{shape} {bits}: prepared in {time.perf_counter() - began:.1f} s, {index.words} words, segments {[(s[0], s[1]) for s in index.segments]}")
    document: dict[str, Any] = {"shape": shape, "V": V, "d": d, "bits": bits, "words": index.words, "batches": {}}
    row_bytes = index.words * 4 + 8
    document["scan_bytes"] = index.nblk * 16 * row_bytes
    document["transform_bytes"] = index.transform.numel() * 2
    for B in batches:
        states = [hidden[i, :B].contiguous() for i in range(CALLS)]
        truth = torch.cat([states[0][i : i + 1].double() @ weight.double().T if V * d < 4e8 else (states[0][i : i + 1].float() @ weight.float().T).double() for i in range(B)])
        graphs = {"dense": graph_of([lambda s=s: torch.nn.functional.linear(s, weight).argmax(1) for s in states])}
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
                for copy in copies:
                    heads.append(CudaHead(modules[name_of(config)], config, copy, tables, weight, B, space=heads[0] if heads else None, **v.get("head", {})))
                if not config["SAMPLE"]:
                    probe = CudaHead(modules[name_of(config)], config, index, tables, weight, B, stats=True, space=heads[0], **v.get("head", {}))
                    for fused in v.get("fused", (False,)):
                        checks[f"{label}{' fused' if fused else ''}"] = verify(probe, tables, states[0], weight, truth, fused=fused)
                    every = [probe.bind(s) for s in states]
                    probe.stats.zero_()
                    for a in every:
                        probe.three(a)
                    torch.cuda.synchronize()
                    checks[label]["mean_survivors"] = float(probe.stats[:, 0].sum()) / B / CALLS
                    checks[label]["mean_exact"] = float(probe.stats[:, 1].sum()) / B / CALLS
                bound = [(heads[i % 4], heads[i % 4].bind(states[i])) for i in range(CALLS)]
                holders.append((heads, bound))
                for kind in v.get("time", ("three",)):
                    if kind == "three":
                        graphs[label] = graph_of([lambda h=h, a=a: h.three(a) for h, a in bound])
                    elif kind == "nopdl":
                        graphs[f"{label} without overlap"] = graph_of([lambda h=h, a=a: h.three(a, False) for h, a in bound])
                    elif kind == "fused":
                        graphs[f"{label} one launch"] = graph_of([lambda h=h, a=a: h.fused(a) for h, a in bound])
                    elif kind == "scan":
                        graphs[f"{label} scan alone"] = graph_of([lambda h=h, a=a: h.scan(a, False) for h, a in bound])
                    elif kind == "query":
                        graphs[f"{label} query alone"] = graph_of([lambda h=h, a=a: h.query(a) for h, a in bound])
                    elif kind == "empty":
                        graphs["three empty launches"] = graph_of([lambda h=h, a=a: h.empty(a) for h, a in bound])
                        graphs["three empty launches without overlap"] = graph_of([lambda h=h, a=a: h.empty(a, False) for h, a in bound])
                    elif kind == "python":
                        single = [graph_of([lambda h=h, a=a: h.three(a)]) for h, a in bound]
                        python[f"{label} own graph"] = python_cost(lambda i, g=single: g[i % CALLS].replay())
                        python[f"{label} three launches"] = python_cost(lambda i, b=bound: b[i % CALLS][0].three(b[i % CALLS][1]))
                        python[f"{label} one launch"] = python_cost(lambda i, b=bound: b[i % CALLS][0].fused(b[i % CALLS][1]))
                        python["dense"] = python_cost(lambda i: torch.nn.functional.linear(states[i % CALLS], weight).argmax(1))
            except RuntimeError as error:
                log(f"{shape} {bits} B={B} {label}: {error}")
                checks[label] = {"failed": str(error)}
        timing = times(graphs, repeats)
        document["batches"][B] = {"times": timing, "checks": checks, "python": python}
        log(f"-- {shape} bits {bits} batch {B}; scan floor {document['scan_bytes'] / 3.02e6:.1f} us, transform {document['transform_bytes'] / 3.02e6:.1f} us")
        for name, t in timing.items():
            check = checks.get(name, {})
            log(f"   {name:44s} {t['us']:7.2f} us ({t['p10']:.1f}-{t['p90']:.1f})  survivors {check.get('mean_survivors', float('nan')):.0f} exact {check.get('mean_exact', float('nan')):.0f}")
        for name, t in python.items():
            log(f"   python {name:37s} host {t['host_us']:.1f} row {t['row_us']:.1f} alone {t['alone_us']:.1f}")
        del graphs
    return document


def variants_of(which: str) -> list[dict[str, Any]]:
    """Designs to compare."""
    if which == "final":
        return [
            {"name": "cuda", "config": {"warps": 16}, "time": ("three", "fused", "scan"), "fused": (False, True)},
        ]
    return [
        {"name": "cuda", "config": {"warps": 16}, "time": ("three", "nopdl", "fused", "scan", "query", "empty", "python"), "fused": (False, True)},
        {"name": "cuda int8 products", "config": {"warps": 16, "one": False}, "time": ("three", "scan"), "batches": [1]},
        {"name": "cuda 12 warps", "config": {"warps": 12}, "time": ("three", "scan")},
        {"name": "cuda 8 warps", "config": {"warps": 8}, "time": ("three", "scan")},
        {"name": "cuda 16 warps 64 registers", "config": {"warps": 16, "regs": 64}, "time": ("three", "scan"), "batches": [1, 8]},
        {"name": "cuda query steps 4", "config": {"warps": 16, "steps": 4}, "time": ("three", "query"), "batches": [1, 8]},
        {"name": "cuda query steps 2", "config": {"warps": 16, "steps": 2}, "time": ("three", "query")},
        {"name": "cuda 12 warps query steps 4", "config": {"warps": 12, "steps": 4}, "time": ("three", "query"), "batches": [1, 8]},
        {"name": "cuda 8 warps query steps 4", "config": {"warps": 8, "steps": 4}, "time": ("three", "query"), "batches": [1, 8]},
        {"name": "cuda 16 warps CG2", "config": {"warps": 16, "group": 2}, "time": ("three", "scan")},
        {"name": "cuda 8 warps CG2", "config": {"warps": 8, "group": 2}, "time": ("three", "scan"), "batches": [1]},
        {"name": "cuda depth 2", "config": {"warps": 16, "depth": 2}, "time": ("three", "scan")},
        {"name": "cuda meta", "config": {"warps": 16, "meta": 1}, "time": ("three", "scan")},
        {"name": "cuda no evict", "config": {"warps": 16, "evict": 0}, "time": ("three", "scan",)},
        {"name": "cuda refine always", "config": {"warps": 16}, "head": {"refine_min": 0}, "time": ("three",)},
        {"name": "cuda refine never", "config": {"warps": 16}, "head": {"refine_min": 1 << 30}, "time": ("three",)},
        {"name": "cuda logits", "config": {"warps": 16, "logits": 1}, "time": ("three", "scan")},
        {"name": "cuda sample", "config": {"warps": 16, "sample": 1}, "time": ("three", "scan")},
    ]  # fmt: skip


def once(shape: str, bits: float, B: int, folder: Path) -> None:
    """Three calls without a graph, for a profiler."""
    V, d = SHAPES[shape]
    index, weight, hidden = make_problem(V, d, bits, "cuda")
    config = config_of(index, B, 16)
    head = CudaHead(Module(build([config], folder)[name_of(config)]), config, index, plan(index), weight, B)
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
    parser.add_argument("--once", action="store_true", help="three calls without a graph, for a profiler")
    args = parser.parse_args()
    if args.once:
        with torch.inference_mode():
            once((args.shape or ["llama-3.2-1b"])[0], (args.bits or [1.5])[0], (args.batch or [1])[0], args.build)
        return
    documents = []
    bandwidth = copy_bandwidth()
    log(torch.cuda.get_device_name(), torch.__version__, f"copy {bandwidth:.2f} TB/s")
    with torch.inference_mode():
        for shape in args.shape or ["llama-3.2-1b"]:
            for bits in args.bits or [1.5]:
                documents.append(measure(shape, bits, args.batch or [1, 8, 32], variants_of(args.variants), args.repeats, args.build))
                torch.cuda.empty_cache()
                if args.json:
                    args.json.write_text(json.dumps({"copy_tb_per_sec": bandwidth, "device": torch.cuda.get_device_name(), "runs": documents}))


if __name__ == "__main__":
    main()
