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
    if impl == "reference":
        return impl
    reason = _why_not_cpu(device.type)
    if impl == "cpu":
        if reason:
            raise FlashHeadError(f"impl='cpu' cannot run: {reason}")
        return impl
    return _auto(device.type, reason)


@functools.cache
def _auto(device_type: str, reason: str) -> str:
    """Say the choice once for each device type, not for every layer."""
    if reason:
        _log.warning("impl='auto' chose 'reference' (slow): %s", reason)
        return "reference"
    _log.info("impl='auto' chose 'cpu' for device type %s", device_type)
    return "cpu"


def _why_not_cpu(device_type: str) -> str:
    if device_type != "cpu":
        return f"the head is on {device_type!r} and the compiled kernels run on the CPU"
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed: pip install 'flashhead[cpu]'"
    return ""
