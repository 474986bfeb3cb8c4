"""The plot of head times, drawn from documents made here, and the command line that asks for it."""

import json
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import torch

from flashhead.bench import device_head
from flashhead.bench.device_lines import BASELINE, GREEDY
from flashhead.cli import main
from flashhead.errors import FlashHeadError
from flashhead.report.head_times import draw_head_times, read_documents


def row(batch, method, median, dense=False):
    times = {"median_us": median, "p10_us": 0.9 * median, "p90_us": 1.1 * median}
    return {"batch": batch, "method": method, "dense": dense, **times}


def document(**changes):
    rows = [row(batch, BASELINE, 200.0 + batch, True) for batch in (1, 4)]
    rows += [row(1, GREEDY, 30.0), row(4, GREEDY, 60.0, True)]
    shape = {"vocab_size": 128256, "hidden_size": 2048}
    base = {"name": "made-up", "rows_are": "synthetic", "rows": rows, "hardware": {"gpu": "none"}}
    return base | shape | changes


def test_plot_is_drawn_from_documents_only(tmp_path):
    """Catches a plot that needs torch, or that hides which rows are synthetic."""
    sources = []
    for name, kind in (("one", "synthetic"), ("two", "real")):
        sources.append(tmp_path / f"{name}.json")
        sources[-1].write_text(json.dumps(document(name=name, rows_are=kind)))
    plots = []
    for name in ("a.svg", "b.svg"):
        command = "import sys; sys.modules['torch'] = None\n"
        command += "from flashhead.cli import main; sys.exit(main())"
        args = ["bench", "head", "--from", *map(str, sources), "--plot", str(tmp_path / name)]
        done = subprocess.run(
            [sys.executable, "-c", command, *args, "--json"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["documents"] == ["one", "two"]
        plots.append((tmp_path / name).read_bytes())
    assert plots[0] == plots[1]
    ElementTree.fromstring(plots[0])


def test_plot_points_are_those_of_the_document(tmp_path, monkeypatch):
    """Catches a method drawn with another's times, and dense runs that look like searches."""
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(
        Figure, "savefig", lambda self, path, **_: (figures.append(self), path.write_text(""))
    )
    draw_head_times([document()], tmp_path / "x.svg")
    (axes,) = figures[0].axes
    points = {tuple(line.get_ydata()) for line in axes.get_lines()}
    assert {(201.0, 204.0), (30.0, 60.0)} <= points
    hollow = [line for line in axes.get_lines() if line.get_markerfacecolor() == "white"]
    assert [list(line.get_ydata()) for line in hollow] == [[60.0]]
    assert "synthetic" in axes.get_title()
    assert "128,256 x 2,048" in axes.get_title()


def test_plot_refuses(tmp_path):
    """Catches a traceback for a document of another command."""
    path = tmp_path / "x.json"
    wrong = {"{": "not JSON", "[]": "wanted a document of flashhead bench head --device cuda"}
    wrong[json.dumps(document(rows=[{"batch": 1}]))] = "row 0 has no 'method'; measure again"
    for text, message in wrong.items():
        path.write_text(text)
        with pytest.raises(FlashHeadError, match=message):
            read_documents([path])
    with pytest.raises(FlashHeadError, match=r"ends in \.svg or \.png"):
        draw_head_times([document()], tmp_path / "x.txt")


MISTAKES = {
    ("--device", "cuda", "--shape", "x"): "argument --shape: invalid choice: 'x'",
    ("--device", "cuda"): "wanted one of --model, --shape, --head-file",
    (
        "--device",
        "cuda",
        "--shape",
        "qwen3-0.6b",
        "--model",
        "x",
    ): "--model and --shape: wanted one",
    ("--shape", "qwen3-0.6b"): "--shape without --device cuda",
    (): "--model is missing",
    ("--device", "tpu", "--model", "x"): "argument --device: invalid choice: 'tpu'",
    ("--device", "cuda", "--head-file", "no.safetensors"): "no such file",
    ("--device", "cuda", "--shape", "qwen3-0.6b", "--skip", "int3"): "'int3': wanted int8, fp8",
    ("--device", "cuda", "--shape", "qwen3-0.6b", "--batch", "0"): "argument --batches",
    ("--plot", "x.svg"): "drawing: wanted --from",
    ("--model", "x", "--skip", "int8"): "--skip without --device cuda",
}


@pytest.mark.parametrize("args", MISTAKES, ids=" ".join)
def test_mistakes(args, capsys):
    """Catches a usage page, a traceback or a benchmark of something else."""
    try:
        code = main(["bench", "head", *args])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert MISTAKES[args] in captured.err
    assert len(captured.err.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("what", [("--shape", "gemma-3-1b"), ("--model", "gemma-3-270m")])
def test_no_cuda_is_one_line(what, capsys, monkeypatch):
    """Catches a download or a minute of index building before the missing device is noticed."""
    monkeypatch.setattr(device_head, "bench_device", None)
    assert main(["bench", "head", "--device", "cuda", *what]) == 2
    captured = capsys.readouterr()
    assert "sees no CUDA device" in captured.err
    assert len(captured.err.splitlines()) == 1
