"""What a figure was measured on: hardware, versions, commit, command line; JSON-able."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("flashhead", "torch", "transformers", "triton", "numba", "numpy", "safetensors")
ISA_FLAGS = (
    *("avx2", "avx512f", "avx512bw", "avx_vnni", "avx512_vnni", "avx512_vpopcntdq", "avx512_bf16"),
    *("amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
"""Instruction sets that a head or its baselines may use, as the kernel spells them."""


def provenance() -> dict[str, Any]:
    """`hardware`, `versions`, `git_sha` and `argv` of this process."""
    return {
        "hardware": hardware(),
        "versions": versions(),
        "git_sha": git_sha(),
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def hardware() -> dict[str, Any]:
    """Processor, its instruction sets, cores this process may use, threads, memory and load."""
    fields = _first_fields(Path("/proc/cpuinfo"))
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": cpu_name(),
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "load_average_1min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        **_gpu(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _gpu() -> dict[str, Any]:
    """The current CUDA device; every value is None without one, but for torch's CUDA version."""
    found: dict[str, Any] = {"gpu": None, "gpu_memory_gib": None, "gpu_capability": None}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found["gpu"] = properties.name
        found["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["gpu_capability"] = f"{properties.major}.{properties.minor}"
    return found | {"gpu_driver": _gpu_driver(), "cuda": torch.version.cuda}


def _gpu_driver() -> str | None:
    """Version of the NVIDIA driver, as its kernel module or its tool says it."""
    path = Path("/proc/driver/nvidia/version")
    if path.exists():
        numbers = re.findall(r"\b\d{3}\.\d+(?:\.\d+)?\b", path.read_text(encoding="utf-8"))
        if numbers:
            return str(numbers[0])
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    lines = (_output(*query) or "").splitlines()
    return lines[0].strip() if lines else None


def cpu_name() -> str:
    """The processor's model as its maker spells it, else its architecture."""
    fields = _first_fields(Path("/proc/cpuinfo"))
    return fields.get("model name") or platform.processor() or platform.machine()


def _first_fields(path: Path) -> dict[str, str]:
    """`name: value` lines of a /proc file up to its first empty line; {} without the file."""
    if not path.exists():
        return {}
    block = path.read_text(encoding="utf-8").split("\n\n")[0]
    pairs = (line.partition(":") for line in block.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _memory_gib() -> float | None:
    total = _first_fields(Path("/proc/meminfo")).get("MemTotal")
    return round(int(total.split()[0]) / 2**20, 1) if total else None


def versions() -> dict[str, str | None]:
    """Versions of python and of the packages that matter; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def git_sha() -> str | None:
    """Commit of the checkout that flashhead runs from, `-dirty` if files differ; None elsewhere."""
    package = Path(__file__).resolve().parent
    top = _git(package, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() / "src" / "flashhead" != package:
        return None
    sha = _git(package, "rev-parse", "HEAD")
    if sha is None:
        return None
    return f"{sha}-dirty" if _git(package, "status", "--porcelain", "--untracked-files=no") else sha


def _git(folder: Path, *arguments: str) -> str | None:
    return _output("git", "--no-optional-locks", "-C", str(folder), *arguments)


def _output(*command: str) -> str | None:
    """What a program prints; None: it is not there, fails, or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
