"""`flashhead bench attention`, as far as a CPU goes."""

import json
import re

import pytest
import torch

from flashhead.bench import attention, attention_full
from flashhead.bench.attention_shapes import SHAPES, AttentionShape, parse_shape
from flashhead.bench.latent_problem import LatentProblem
from flashhead.cli.main import main
from flashhead.errors import FlashHeadError

TINY = "heads=4,head_dim=16,kv_heads=2,rank=32,rope=8"


def test_shapes():
    """A shape that cannot be written down, or that no cache has."""
    assert parse_shape(TINY) == AttentionShape(4, 16, 2, 32, 8)
    assert parse_shape("mha-7b") is SHAPES["mha-7b"]
    wrong = {"rank": 1025, "kv_heads": 3, "rope": -8, "x": 1}
    texts = [
        re.sub(f"{name}=[0-9]+|$", f"{name}={value}", TINY, count=1)
        for name, value in wrong.items()
    ]
    for text in ("mha", "heads=4", *texts):
        with pytest.raises(FlashHeadError):
            parse_shape(text)
    assert SHAPES["mha-7b"].full_bytes(32) == 16_384


def test_run(tmp_path, capsys):
    """Bytes counted twice or not at all, a line without its check, a plot of another document."""
    out, plot = tmp_path / "a.json", tmp_path / "a.svg"
    given = ["bench", "attention", "--shape", TINY, "--context", "64,96", "--batch", "2"]
    given += ["--dtype", "bf16,int4", "--repeats", "2", "--out", str(out), "--json"]
    assert main(given) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads(out.read_text())
    rows = document["rows"]
    assert [row["context"] for row in rows] == [64] * 4 + [96] * 4
    first = rows[:4]
    assert [row["token_bytes"] for row in first] == [256, 128, 80, 34]
    assert [row["bytes_read"] for row in first] == [128 * n for n in (256, 128, 80, 34)]
    assert first[0]["ratio"] == 1
    for row in rows:
        assert 0 < row["error"] <= 3 * row["eager_error"]
        assert row["median_us"] > 0
    assert main(["bench", "attention", "--from", str(out), "--plot", str(plot)]) == 0
    assert plot.read_text().startswith("<?xml")
    drawn = plot.read_bytes()
    assert main(["bench", "attention", "--from", str(out), "--plot", str(plot)]) == 0
    assert plot.read_bytes() == drawn


def test_a_wrong_kernel_fails_the_run(monkeypatch):
    """A fast wrong answer in a table."""
    shape = parse_shape(TINY)
    cell = {"contexts": (64,), "batches": (1,), "formats": ("bf16",), "device": "cpu", "repeats": 1}
    right = LatentProblem.attend
    monkeypatch.setattr(LatentProblem, "attend", lambda own, number: right(own, number).flip(1))
    with pytest.raises(RuntimeError, match="its error is"):
        attention.bench_attention(shape, **cell)


def test_full_caches_are_checked():
    """A baseline that computes something else, or that reads another copy than its turn's."""
    problem = attention_full.make_full_problem(2, 40, 4, 2, 16, 3, "cpu")
    for call in attention_full.forms(problem, "cpu").values():
        for number in (0, 4):
            own, eager = problem.errors(call(number))
            assert own <= 3 * eager
    problem.values[1].zero_()
    calls = attention_full.forms(problem, "cpu").values()
    assert all(not call(4).any() and call(3).any() for call in calls)
    assert problem.bytes_read == 2 * 40 * 2 * 16 * 2 * 2


def test_mistakes(capsys):
    """A traceback for a user's mistake."""
    assert main(["bench", "attention", "--shape", "x"]) == 2
    assert "mha-7b" in capsys.readouterr().err
    assert main(["bench", "attention", "--from", __file__]) == 2
    assert "--plot" in capsys.readouterr().err
    for given, word in ((["--dtype", "int3"], "int3"), (["--from", "none.json"], "no such file")):
        with pytest.raises(SystemExit) as ended:
            main(["bench", "attention", *given])
        assert ended.value.code == 2
        assert word in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu(capsys):
    """A run on the CPU where a GPU was asked for."""
    assert main(["bench", "attention", "--device", "cuda"]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err
