"""Which implementation runs.

An explicit choice runs or raises; `auto` says in the log what it chose and why.
"""

import functools
import importlib.util
import logging

import torch

from flashhead.errors import FlashHeadError

IMPLEMENTATIONS = ("auto", "reference", "cpu")
_log = logging.getLogger("flashhead")


def resolve_impl(impl: str, device: torch.device) -> str:
    """Name of the implementation to run on `device`: "cpu" or "reference".

    Raises:
        FlashHeadError: unknown name, or the implementation cannot run here.
    """
    if impl not in IMPLEMENTATIONS:
        raise FlashHeadError(f"impl={impl!r}: wanted one of {', '.join(IMPLEMENTATIONS)}")
    if device.type != "cpu":
        raise FlashHeadError(
            f"the head is on {device.type!r}: this version searches on the CPU only"
        )
    has_numba = importlib.util.find_spec("numba") is not None
    if impl == "cpu" and not has_numba:
        raise FlashHeadError("impl='cpu' needs numba: pip install 'flashhead[cpu]'")
    return _auto(has_numba) if impl == "auto" else impl


@functools.cache
def _auto(has_numba: bool) -> str:
    """Choose, and say it once a process, not once a model."""
    if has_numba:
        _log.info("impl='auto' chose 'cpu': numba is installed")
        return "cpu"
    _log.warning(
        "impl='auto' chose 'reference' (slow): pip install 'flashhead[cpu]' for the kernels"
    )
    return "reference"
