"""The scripts that measure vLLM on GPUs, on the CPU build: two ranks, and EAGLE drafts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import interpreted_triton
import pytest
from compare import inherited

pytest.importorskip("vllm")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def run(tmp_path):
    """The document of a script that found no error."""

    def script(name, *arguments, **environment):
        out = tmp_path / "out.json"
        command = [sys.executable, str(BENCHMARKS / name), "--device", "cpu", "--json", str(out)]
        done = subprocess.run(
            [*command, *arguments],
            env=inherited() | environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(out.read_text())

    return script


def test_two_ranks(run):
    """Shards that are compared wrongly, or a rank that does not search."""
    shape = ("--shapes", "tiny", "--tensor-parallel", "2", "--crossover", "16")
    document = run("vllm_gpu_parallel.py", *shape, "--batches", "1,4", "--pairs", "2")
    tiny = document["shapes"]["tiny"]
    assert len(tiny["heads_of_ranks"]) == 2
    for row in tiny["rows"]:
        assert row["ratio"]["dense"]["median"] > 0
        for rank in row["rows_of_ranks"]:
            assert rank == {"searched_rows": 2 * 64 * row["batch"], "dense_rows": 0}


def test_eagle(run):
    """Drafts with the target's head or their own: other texts than without, or a dense head."""
    cases = "eagle,eagle-verified-dense,eagle3,eagle3-target-only,mtp"
    short = ("--batches", "1,3", "--tokens", "24", "--crossover", "16")
    document = run("vllm_gpu_speculation.py", "--shape", "tiny", "--cases", cases, *short)
    found = document["cases"]
    assert {name: row["errors"] for name, row in found.items()} == {name: [] for name in found}
    assert len(found) == 5
    assert found["eagle-verified-dense"]["heads"]["target"]["dense_rows"] > 0
    assert "draft" not in found["eagle3-target-only"]["heads"]
    exact = [found[name]["divergences"]["parted"] for name in ("eagle", "eagle3")]
    assert exact == [0, 0]  # mtp's target is a Qwen2, which rounds otherwise


def test_eagle_on_runner_v2(run, tmp_path):
    """A draft's call on model runner V2 that is served as the target's requests ask."""
    path = interpreted_triton.install(tmp_path / "triton")
    given = os.environ.get("PYTHONPATH")
    path = os.pathsep.join(filter(None, [path, given]))
    short = ("--batches", "1", "--tokens", "8", "--crossover", "16", "--cases", "eagle,eagle3")
    environment = interpreted_triton.ENVIRONMENT | {"PYTHONPATH": path}
    document = run("vllm_gpu_speculation.py", "--shape", "tiny", *short, **environment)
    for row in document["cases"].values():
        assert row["errors"] == []
        assert row["divergences"]["parted"] == 0
