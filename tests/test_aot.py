"""Every GPU kernel compiled ahead of time in a fresh process, for cards that are not here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from flashhead.ops.cascade import triton_complete, triton_select
from flashhead.ops.latent_decode import hopper, triton_rebuilt
from flashhead.ops.latent_decode import triton as latent_decode
from flashhead.ops.latent_select import triton as latent_select
from flashhead.ops.noise import triton as noise
from flashhead.ops.probe import triton as probe
from flashhead.ops.probe import triton_search
from flashhead.ops.scan import triton as scan_one
from flashhead.ops.scan import triton_batch, triton_bits, triton_query

MODULES = (
    noise,
    scan_one,
    triton_batch,
    triton_bits,
    triton_query,
    triton_select,
    triton_complete,
    probe,
    triton_search,
    latent_decode,
    hopper,
    triton_rebuilt,
    latent_select,
)
CAPABILITIES = ("80", "89", "90", "100")
MISSING: dict[str, set[str]] = {"90": set(), "100": {"_scan_bits_kernel", "_hopper_kernel"}}
"""Blackwell has no binary products; only Hopper has its instructions for warp groups. There other
kernels run.
"""


def test_kernels_compile():
    """A kernel that only the interpreter can run, one that no launcher starts, more shared memory
    than a card has, registers that spill on a real head: on Ampere, Ada, Hopper and Blackwell.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("aot.py")
    done = subprocess.run(
        [sys.executable, script, *CAPABILITIES], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    kernels = {name for module in MODULES for name in vars(module) if name.endswith("_kernel")}
    lines = done.stdout.splitlines()
    for capability in CAPABILITIES:
        own = [line for line in lines if line.startswith(f"sm_{capability} ")]
        assert kernels - MISSING.get(capability, {"_hopper_kernel"}) == {
            line.split(":")[0].split()[-1] for line in own
        }
