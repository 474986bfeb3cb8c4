"""A Triton backend named `cpu`, as vLLM's CPU build asks for before it runs model runner V2.

Nothing is compiled: under TRITON_INTERPRET=1 Triton's interpreter runs the runner's kernels. Triton
finds the backend by the entry point that `install` writes, in all of vLLM's processes.
"""

from pathlib import Path

ENVIRONMENT = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}


def install(folder: Path) -> str:
    """Make it installed in `folder`; returns what PYTHONPATH must hold."""
    info = folder / "interpreted_triton-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: interpreted-triton\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[triton.backends]\ncpu = interpreted_triton\n")
    return f"{folder}:{Path(__file__).parent.parent}"
