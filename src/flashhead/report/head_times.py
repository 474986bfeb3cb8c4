"""Time of a head call against its batch size: one panel a head, all methods in it.

Points are medians of calls in a CUDA graph, bars their 10th to 90th percentile. A panel says
whether its rows are synthetic. A method that the dense product served is drawn hollow there.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashhead.errors import FlashHeadError
from flashhead.report.documents import read_json
from flashhead.report.drawing import figure_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WANTED = ("batch", "method", "median_us", "p10_us", "p90_us", "dense")
WIDE = 3
"""Panels a row."""
COLOURS = {
    "bf16": "#333333",
    "int8": "#1b8a5a",
    "fp8": "#8fbf8f",
    "int4": "#5aae61",
    "clusters": "#e08214",
    "FlashHead": "#c8102e",
}
"""By the first word of a method's name."""
MARKERS = ("o", "s", "^", "D", "v")
"""Of the methods that share a colour, in the order of the document."""


def read_documents(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Documents that `flashhead bench head --device cuda` wrote, one a file: the last line of its
    output, or the file of `--out`.

    Raises:
        FlashHeadError: not there, no JSON, or not such a document.
    """
    return [_read(path) for path in paths]


def _read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = read_json(path)
    rows = document.get("rows") if isinstance(document, dict) else None
    if not isinstance(rows, list) or not rows or not {"name", "rows_are"} <= set(document):
        raise FlashHeadError(f"{path}: wanted a document of flashhead bench head --device cuda")
    for number, row in enumerate(rows):
        missing = [key for key in WANTED if not isinstance(row, dict) or key not in row]
        if missing:
            raise FlashHeadError(f"{path}: row {number} has no {missing[0]!r}; measure again")
    return document


def draw_head_times(documents: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw documents to a file, SVG or PNG by its name; written whole or not at all.

    Args:
        documents: of `read_documents`.
        path: the file, written over.

    Raises:
        FlashHeadError: `path` is named as neither.
        ImportError: matplotlib is not installed; the message names the command.
    """
    wide = min(WIDE, len(documents))
    deep = -(-len(documents) // wide)
    with figure_file(path, (4.2 * wide + 2.8, 3.9 * deep + 0.4)) as figure:
        _fill(figure, documents, deep, wide)


@dataclasses.dataclass(frozen=True)
class _Style:
    colour: str
    marker: str


def _fill(figure: "Figure", documents: Sequence[dict[str, Any]], deep: int, wide: int) -> None:
    names = list(dict.fromkeys(row["method"] for own in documents for row in own["rows"]))
    styles = _styles(names)
    panels = figure.subplots(deep, wide, squeeze=False).flatten()
    for axes, document in zip(panels, documents, strict=False):
        _panel(axes, document, styles)
    for axes in panels[len(documents) :]:
        axes.set_axis_off()
    labelled: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        labelled |= dict(zip(labels, handles, strict=True))
    shown = [name for name in names if name in labelled]
    figure.legend(
        [labelled[name] for name in shown],
        shown,
        loc="outside right upper",
        frameon=False,
        fontsize=8,
    )
    gpus = {str((own.get("hardware") or {}).get("gpu")) for own in documents}
    figure.suptitle(
        f"One call of the head, {', '.join(sorted(gpus))}: median, p10 to p90", x=0.01, ha="left"
    )


def _styles(names: Sequence[str]) -> dict[str, _Style]:
    """Colour by family, marker by place in it; a family unknown to this file is blue."""
    styles: dict[str, _Style] = {}
    seen: dict[str, int] = {}
    for name in names:
        family = name.split(" ")[0].rstrip(",")
        place = seen[family] = seen.get(family, -1) + 1
        colour = COLOURS.get(family, "#0b63b5")
        styles[name] = _Style(colour, MARKERS[place % len(MARKERS)])
    return styles


def _panel(axes: "Axes", document: dict[str, Any], styles: dict[str, _Style]) -> None:
    series: dict[str, list[dict[str, Any]]] = {}
    for row in document["rows"]:
        series.setdefault(row["method"], []).append(row)
    for name, rows in series.items():
        rows = sorted(rows, key=lambda row: row["batch"])
        batches, medians = ([row[key] for row in rows] for key in ("batch", "median_us"))
        spread = [
            [max(0.0, row["median_us"] - row["p10_us"]) for row in rows],
            [max(0.0, row["p90_us"] - row["median_us"]) for row in rows],
        ]
        style = styles[name]
        axes.errorbar(
            batches,
            medians,
            yerr=spread,
            color=style.colour,
            marker=style.marker,
            markersize=4.5,
            linewidth=1.1,
            elinewidth=0.8,
            label=name,
        )
        if _searches(name):  # where the dense product ran instead
            hollow = [(row["batch"], row["median_us"]) for row in rows if row["dense"]]
            axes.plot(
                [batch for batch, _ in hollow],
                [median for _, median in hollow],
                linestyle="none",
                marker=style.marker,
                markersize=4.5,
                markerfacecolor="white",
                markeredgecolor=style.colour,
                zorder=4,
            )
    _axes(axes, document, sorted({row["batch"] for row in document["rows"]}))


def _searches(method: str) -> bool:
    return method.startswith(("FlashHead", "clusters"))


def _axes(axes: "Axes", document: dict[str, Any], batches: list[int]) -> None:
    shape = ""
    if {"vocab_size", "hidden_size"} <= set(document):
        shape = f", {document['vocab_size']:,} x {document['hidden_size']:,}"
    axes.set_title(f"{document['name']}{shape} ({document['rows_are']} rows)", fontsize=9)
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_xticks([], minor=True)
    axes.set_yscale("log")
    ticks = [10, 20, 50, 100, 200, 500, 1000, 2000, 5000]
    low, high = axes.get_ylim()
    axes.set_yticks([tick for tick in ticks if low <= tick <= high], minor=False)
    axes.set_yticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("hidden states a call")
    axes.set_ylabel("us a call")
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
