"""Attention over latents against full caches: speed-up and cache size against the context.

One panel a batch size: medians of the speed-up over the full cache of all heads, bars from the 10th
to the 90th percentile of the rounds. The last panel: what a token of one layer takes in each cache.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashhead.errors import FlashHeadError
from flashhead.report.documents import read_json
from flashhead.report.drawing import figure_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WANTED = ("batch", "context", "line", "ratio", "ratio_p10", "ratio_p90", "token_bytes")
COLOURS = ("#333333", "#888888", "#c8102e", "#e08214", "#1b8a5a", "#0b63b5")
"""Of the lines, in the order of the document: full caches first."""


def read_attention(path: Path) -> dict[str, Any]:
    """A document that `flashhead bench attention` wrote.

    Raises:
        FlashHeadError: not there, no JSON, or not such a document.
    """
    document: dict[str, Any] = read_json(path)
    rows = document.get("rows") if isinstance(document, dict) else None
    if (
        not isinstance(rows, list)
        or not rows
        or not {"shape", "device", "hardware"} <= set(document)
    ):
        raise FlashHeadError(f"{path}: wanted a document of flashhead bench attention")
    for number, row in enumerate(rows):
        missing = [key for key in WANTED if not isinstance(row, dict) or key not in row]
        if missing:
            raise FlashHeadError(f"{path}: row {number} has no {missing[0]!r}; measure again")
    return document


def draw_attention(document: dict[str, Any], path: Path) -> None:
    """Draw to a file, SVG or PNG by its name; written whole or not at all.

    Args:
        document: of `read_attention`, or of `bench.attention.bench_attention`.
        path: the file, written over.

    Raises:
        FlashHeadError: `path` is named as neither.
        ImportError: matplotlib is not installed; the message names the command.
    """
    rows = document["rows"]
    batches = sorted({row["batch"] for row in rows})
    names = list(dict.fromkeys(row["line"] for row in rows))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    with figure_file(path, (3.6 * (len(batches) + 1), 3.6)) as figure:
        panels = figure.subplots(1, len(batches) + 1, squeeze=False).flatten()
        for axes, batch in zip(panels, batches, strict=False):
            own = [row for row in rows if row["batch"] == batch]
            _speed(axes, own, colours)
            axes.set_title(f"batch {batch}", fontsize=9)
        _memory(panels[-1], rows, colours)
        handles, labels = panels[-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
        hardware = document["hardware"]
        where = hardware["gpu"] if document["device"] == "cuda" else hardware["cpu"]
        figure.suptitle(f"Attention of one decode step, {where}", x=0.01, ha="left")


def _series(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    found = [row for row in rows if row["line"] == name]
    return sorted(found, key=lambda row: row["context"])


def _speed(axes: "Axes", rows: list[dict[str, Any]], colours: dict[str, str]) -> None:
    for name, colour in colours.items():
        own = _series(rows, name)
        medians = [row["ratio"] for row in own]
        spread = [
            [max(0.0, row["ratio"] - row["ratio_p10"]) for row in own],
            [max(0.0, row["ratio_p90"] - row["ratio"]) for row in own],
        ]
        contexts = [row["context"] for row in own]
        axes.errorbar(
            contexts, medians, yerr=spread, color=colour, marker="o", markersize=4, linewidth=1.1
        )
    axes.set_ylim(bottom=0)
    axes.set_ylabel("times as fast as the full cache of all heads")
    _contexts(axes, rows)


def _memory(axes: "Axes", rows: list[dict[str, Any]], colours: dict[str, str]) -> None:
    for name, colour in colours.items():
        sizes = {
            row["context"]: row["token_bytes"] * row["context"] / 2**20
            for row in _series(rows, name)
        }
        axes.plot(
            list(sizes), list(sizes.values()), color=colour, marker="o", markersize=4, label=name
        )
    axes.set_yscale("log")
    axes.set_ylabel("MiB a row and layer")
    axes.set_title("cache", fontsize=9)
    _contexts(axes, rows)


def _contexts(axes: "Axes", rows: list[dict[str, Any]]) -> None:
    contexts = sorted({row["context"] for row in rows})
    axes.set_xscale("log", base=2)
    names = [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in contexts]
    axes.set_xticks(contexts, names)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("context, tokens")
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
