"""Which implementation runs.

An explicit choice runs or raises; `auto` says in the log what it chose and why.
"""

import functools
import importlib.util
import logging
import os

import torch

from flashhead.errors import FlashHeadError

IMPLEMENTATIONS = ("auto", "reference", "cpu", "triton")
_log = logging.getLogger("flashhead")


def resolve_impl(impl: str, device: torch.device) -> str:
    """Name of the implementation to run on `device`: "cpu", "triton" or "reference".

    Raises:
        FlashHeadError: unknown name, or the implementation cannot run here.
    """
    if impl not in IMPLEMENTATIONS:
        raise FlashHeadError(f"impl={impl!r}: wanted one of {', '.join(IMPLEMENTATIONS)}")
    on_gpu = device.type == "cuda"  # NVIDIA's and, in torch's builds for ROCm, AMD's
    if device.type not in ("cpu", "cuda"):
        raise FlashHeadError(f"the head is on {device.type!r}: a search runs on cpu and cuda")
    if on_gpu and impl in ("cpu", "reference"):
        raise FlashHeadError(f"impl={impl!r} runs on the CPU, the head is on {str(device)!r}")
    if impl == "triton" and not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise FlashHeadError(
            "impl='triton': the head is on the CPU, wanted a GPU (or TRITON_INTERPRET=1, to test)"
        )
    missing = [
        f"impl={name!r} needs {module}: pip install {package}"
        for name, module, package in (
            ("cpu", "numba", "'flashhead[cpu]'"),
            ("triton", "triton", "triton"),
        )
        if importlib.util.find_spec(module) is None
        and (impl == name or (on_gpu and name == "triton"))
    ]
    if missing:
        raise FlashHeadError(missing[0])
    return _auto("cuda" if on_gpu else "cpu") if impl == "auto" else impl


@functools.cache
def _auto(device: str) -> str:
    """Choose, and say it once a process, not once a model."""
    if device == "cuda":
        _log.info("impl='auto' chose 'triton': the head is on a GPU")
        return "triton"
    if importlib.util.find_spec("numba") is not None:
        _log.info("impl='auto' chose 'cpu': numba is installed")
        return "cpu"
    _log.warning(
        "impl='auto' chose 'reference' (slow): pip install 'flashhead[cpu]' for the kernels"
    )
    return "reference"


def require_host_impl(impl: str) -> None:
    """Raise FlashHeadError unless an operation of its own runs as `impl`: "cpu" or "reference".

    On a GPU whole searches are operators (`ops.cascade.triton`), not their parts.
    """
    if impl not in ("cpu", "reference"):
        raise FlashHeadError(f"impl={impl!r}: this operation runs as 'cpu' or 'reference'")
