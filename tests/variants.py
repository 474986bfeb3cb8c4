"""Quantized variants made, verified and talked to by commands, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

QWEN_CODER = "FLASHHEAD_TEST_QWEN_CODER"
"""Names a folder with Qwen2.5-Coder-0.5B-Instruct, which no package brings."""
SOURCES = ["smollm2-135m", QWEN_CODER]
UNSET = ("TRITON_INTERPRET", "OMP_WAIT_POLICY")
"""Set by tests/conftest.py for kernels in this process."""
QUESTION = "What is the capital of France?"


def source_of(name: str) -> str:
    """A model to convert; skips where the folder is not given."""
    if name != QWEN_CODER:
        return name
    if QWEN_CODER not in os.environ:
        pytest.skip(f"set {QWEN_CODER} to a folder with Qwen2.5-Coder-0.5B-Instruct")
    return os.environ[QWEN_CODER]


def flashhead(*arguments: str, text: str | None = None) -> dict[str, Any]:
    """A command's JSON document, the last line of stdout; it must end with 0."""
    done = subprocess.run(
        [sys.executable, "-m", "flashhead", *arguments, "--json"],
        env={name: value for name, value in os.environ.items() if name not in UNSET},
        input=text,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


def make(source: str, out: Path) -> dict[str, Any]:
    """Convert to W4A16; few calibration tokens, for time."""
    return flashhead(
        "convert", source, str(out), "--quantize", "w4a16", "--set", "calibration_tokens=512"
    )


def require_verified(out: Path, source: str) -> None:
    """`flashhead verify` passes, step by step, also against the model that it was made from."""
    document = flashhead("verify", str(out), "--against", source, "--positions", "64")
    steps = {step["name"]: step for step in document["steps"]}
    assert list(steps) == ["files", "checksums", "reload", "positions", "against", "speed"]
    assert document["ok"]
    assert all(step["ok"] for step in steps.values())


def require_chats(out: Path) -> None:
    """A scripted conversation: an answer that knows something, by the searched head."""
    document = flashhead(
        *("chat", str(out), "--max-new-tokens", "24", "--crossover", "16"),
        text=f"{QUESTION}\n/exit\n",
    )
    asked, answered = document["turns"]
    assert (asked["role"], answered["role"]) == ("user", "assistant")
    assert "Paris" in answered["text"]
    assert document["head"] == "codes"
