"""What a figure was measured on: hardware, versions, commit, command line; JSON-able."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("flashhead", "torch", "transformers", "numba", "numpy", "safetensors")
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
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "load_average_1min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


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
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
