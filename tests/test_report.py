"""The plot of a frontier: drawn from its document and nothing else."""

import json
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from flashhead.cli import main
from flashhead.errors import FlashHeadError
from flashhead.report import frontier


def row(series, point, agreement, kl, bytes_fraction):
    return {
        "series": series,
        "point": point,
        "agreement": agreement,
        "kl": kl,
        "bytes_fraction": bytes_fraction,
    }


def document(**changes):
    rows = {
        "flashhead": row("flashhead", "codes", 1.0, 7e-4, 0.24),
        "codes-kl0.01": row("codes", "KL 0.01", 0.999, 1e-2, 0.2),
        "codes-kl5e-05": row("codes", "KL 5e-05", 1.0, 5e-5, 0.5),
        "c64": row("clusters-int8", "P=64", 0.95, 0.3, 0.05),
        "c128": row("clusters-int8", "P=128", 0.97, 0.2, 0.08),
        "svd-bf16-r4-k10": row("svd-bf16-k10", "r=4", 0.5, 2.0, 0.06),
        "svd-bf16-r4-k90": row("svd-bf16-k90", "r=4", 0.6, 1.0, 0.07),
        "bf16": row("dense", "bf16", 0.97, 3e-4, 1.0),
        "greedy": row("certified", "p=1e-6", 1.0, None, 0.13),
    }
    return {"model": "tiny", "positions": 1000, "data": "text.txt", "methods": rows} | changes


def lines(figure: Figure, panel: int) -> dict[str, tuple[list[float], list[float]]]:
    """Points of every labelled line of a panel."""
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for line in figure.axes[panel].get_lines()
    }


def drawn(what) -> Figure:
    figure = Figure()
    frontier._fill(figure, what)
    return figure


def test_points_are_those_of_the_document():
    """Catches agreement drawn for disagreement, points out of order, the default off its curve, a
    certified method without KL lost or drawn at zero.
    """
    figure = drawn(document())
    wrong, far = (lines(figure, panel) for panel in (0, 1))
    assert wrong["clusters (ours), int8"] == ([0.05, 0.08], pytest.approx([0.05, 0.03]))
    assert far["clusters (ours), int8"] == ([0.05, 0.08], [0.3, 0.2])
    assert far["FlashHead codes, KL budgets"] == ([0.2, 0.24, 0.5], [1e-2, 7e-4, 5e-5])
    assert far["FlashHead (default)"] == ([0.24], [7e-4])
    assert "SVD, bf16, best 10 exact" in wrong
    assert "SVD, bf16, best 90 exact" in wrong
    assert wrong["FlashHead, certified greedy"] == ([0.13], [0.0005])
    assert "FlashHead, certified greedy" not in far
    assert [text.get_text() for text in figure.axes[0].texts].count("certified") == 1


def test_zero_disagreements_lie_below_one_in_n():
    """Catches a zero that a log axis drops, or that looks measured."""
    figure = drawn(document())
    wrong, far = figure.axes
    assert lines(figure, 0)["FlashHead (default)"][1] == [0.0005]
    assert "< 1/1,000" in [text.get_text() for text in wrong.texts]
    assert not [text for text in far.texts if text.get_text().startswith("<")]
    assert wrong.get_ylim()[0] < 0.0005


def test_plot_is_drawn_from_the_document_only(tmp_path):
    """Catches a redraw that needs torch or the model, a title of other figures, and bytes that
    differ between two drawings of one document.
    """
    source = tmp_path / "frontier-tiny.json"
    source.write_text(json.dumps(document()))
    command = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
    command += "from flashhead.cli import main; sys.exit(main())"
    args = ["eval", "frontier", "--from", str(source), "--out-dir"]
    plots = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", command, *args, str(folder)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert [path.name for path in folder.iterdir()] == ["frontier-tiny.svg"]
        plots.append((folder / "frontier-tiny.svg").read_bytes())
    assert plots[0] == plots[1]
    ElementTree.fromstring(plots[0])
    assert not re.search(rb"20\d\d-\d\d-\d\d", plots[0])


def test_failed_drawing_leaves_the_old_plot(tmp_path, monkeypatch):
    """Catches half of an SVG in the place of a whole one."""
    path = tmp_path / "plot.svg"
    path.write_text("old")

    def fail(self, target, **kwargs):
        target.write_text("<svg")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        frontier.draw_frontier(document(), path)
    assert path.read_text() == "old"


def test_missing_matplotlib_names_the_fix(tmp_path, monkeypatch):
    """Catches a ModuleNotFoundError in the user's face."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'flashhead\[plots\]'"):
        frontier.draw_frontier(document(), tmp_path / "plot.svg")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "wanted a document of flashhead eval"),
        ('{"model": "m", "positions": 1, "methods": {}}', "wanted a document"),
        ('{"positions": 1, "methods": {"a": {}}}', "wanted a document"),
        ('{"model": "m", "positions": 1, "methods": {"a": {}}}', "method 'a' has no 'series'"),
        ('{"model": "m", "positions": 1, "methods": {"a": 1}}', "method 'a' has no 'series'"),
    ],
)
def test_other_documents_are_refused(tmp_path, text, message):
    """Catches a KeyError for a benchmark's document, or one of an older release."""
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(FlashHeadError, match=message):
        frontier.read_document(path)


def test_frontier_command(tiny_folder, tmp_path, capsys):
    """Catches a command whose document and plot part, paths of this machine in the document, a
    method of the list that is not measured, or output that is no document.
    """
    text = tmp_path / "words.txt"
    text.write_text(" ".join(f"w{3 + 7 * i % 500}" for i in range(400)))
    out = tmp_path / "out"
    out.mkdir()
    command = ["eval", "frontier", "--model", tiny_folder, "--data", str(text), "--json"]
    names = "flashhead,certified,clusters-codes,svd-hidden,int8"
    options = ["--positions", "20", "--out-dir", str(out), "--methods", f"{names},svd"]
    options += ["--skip", "svd,bf16"]
    assert main([*command, *options]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    written = sorted(path.name for path in out.iterdir())
    assert [name.rpartition(".")[2] for name in written] == ["json", "svg"]
    document = json.loads((out / written[0]).read_text())
    assert json.loads(captured.out) == document
    assert set(document["ms_per_position"]) == {"truth", *names.split(",")}
    assert (document["positions"], document["data"]) == (20, "words.txt")
    assert "/" not in document["model"]
    assert {"hardware", "versions", "git_sha", "argv"} <= document.keys()


def test_missing_matplotlib_is_told_before_measuring(tiny_folder, tmp_path, monkeypatch, capsys):
    """Catches twenty minutes of measuring that end in an ImportError."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = tmp_path / "words.txt"
    text.write_text("w3 w4")
    status = main(["eval", "frontier", "--model", tiny_folder, "--data", str(text)])
    assert status == 2
    error = capsys.readouterr().err
    assert error == "flashhead: matplotlib is not installed: pip install 'flashhead[plots]'\n"
