"""The frontier of a model: what a head gets wrong against the bytes that it reads.

Two panels over the same bytes (log): the share of positions whose token differs from the float32
head's, and KL(float32||head). Down and left is better. A series is a method at several settings,
its points joined; a method without neighbours is labelled in place. What a finite text cannot tell
from zero lies on the floor: less than one disagreement, or a KL below the metric's own rounding.
"""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashhead.errors import FlashHeadError
from flashhead.report.documents import read_json
from flashhead.report.drawing import figure_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KL_FLOOR = 1e-6
"""Nats; `evaluate.metrics` bounds the rounding of float32 metrics by it."""
WANTED = ("series", "point", "agreement", "kl", "bytes_fraction")


@dataclasses.dataclass(frozen=True)
class _Style:
    label: str
    colour: str
    marker: str
    line: str = "-"
    filled: bool = True


_CODES, _CLUSTERS, _PUBLISHED = "#c8102e", "#0b63b5", "#e08214"
_SVD, _WEIGHTED = "#8fbf8f", "#1b8a5a"
_STYLES = {
    "flashhead": _Style("FlashHead (default)", _CODES, "*"),
    "codes": _Style("FlashHead codes, KL budgets", _CODES, "o"),
    "certified": _Style("FlashHead, certified greedy", _CODES, "*", filled=False),
    "clusters-codes": _Style("clusters then codes", "#7b3294", "P"),
    "clusters-bf16": _Style("clusters (ours), bf16 centroids", _CLUSTERS, "o"),
    "clusters-int8": _Style("clusters (ours), int8", _CLUSTERS, "s"),
    "clusters-int4": _Style("clusters (ours), int4", _CLUSTERS, "^"),
    "sampled-hidden": _Style("clusters (ours), sampled", _CLUSTERS, "x", ":"),
    "clusters-published-bf16": _Style("clusters (published), bf16 centroids", _PUBLISHED, "o"),
    "clusters-published-int8": _Style("clusters (published), int8", _PUBLISHED, "s"),
    "clusters-published-int4": _Style("clusters (published), int4", _PUBLISHED, "^"),
    "sampled-published": _Style("clusters (published), sampled", _PUBLISHED, "x", ":"),
    "svd-bf16": _Style("SVD, bf16", _SVD, "o", "--"),
    "svd-int8": _Style("SVD, int8", _SVD, "s", "--"),
    "svd-hidden-bf16": _Style("SVD weighted by hidden states, bf16", _WEIGHTED, "o"),
    "svd-hidden-int8": _Style("SVD weighted by hidden states, int8", _WEIGHTED, "s"),
    "dense": _Style("dense heads", "#333333", "h", "none"),
}
"""By series, or by the part of its name before `-k`: the number of rows scored exactly."""
_STARRED = {"flashhead": "default", "certified": "certified"}
"""Series drawn as a star, and what is written beside it."""
_STAR_LABELS = {"flashhead": (9, 7), "certified": (-14, -17)}
"""Where that is written, points from the star: they may lie side by side."""
_LABELLED = ("dense", *_STARRED)
"""Series whose points are named in place; of the others, the first and last of one of a kind."""
_ENDS_LABELLED = ("clusters-int8", "codes")


def read_document(path: Path) -> dict[str, Any]:
    """A document that `flashhead eval` wrote.

    Raises:
        FlashHeadError: not there, no JSON, or not such a document.
    """
    document: dict[str, Any] = read_json(path)
    rows = document.get("methods") if isinstance(document, dict) else None
    if not isinstance(rows, dict) or not rows or not {"model", "positions"} <= set(document):
        raise FlashHeadError(f"{path}: wanted a document of flashhead eval, with `methods`")
    for name, row in rows.items():
        missing = [key for key in WANTED if not isinstance(row, dict) or key not in row]
        if missing:
            raise FlashHeadError(f"{path}: method {name!r} has no {missing[0]!r}; measure again")
    return document


def draw_frontier(document: dict[str, Any], path: Path) -> None:
    """Draw a document to a file, SVG or PNG by its name; written whole or not at all.

    Args:
        document: of `read_document`.
        path: the file, written over.

    Raises:
        ImportError: matplotlib is not installed; the message names the command.
    """
    with figure_file(path, (13, 5.6)) as figure:
        _fill(figure, document)


def _fill(figure: "Figure", document: dict[str, Any]) -> None:
    positions, rows = document["positions"], document["methods"]
    wrong, far = figure.subplots(1, 2, sharex=True)
    series: dict[str, list[dict[str, Any]]] = {}
    for row in rows.values():
        series.setdefault(row["series"], []).append(row)
    fewest = {
        min((name for name in series if _base(name) == base), key=_exact_rows)
        for base in _STYLES
        if any(_base(name) == base and _exact_rows(name) for name in series)
    }
    codes = [row for row in series.get("flashhead", []) if row["point"] == "codes"]
    if "codes" in series:
        series["codes"] = series["codes"] + codes  # the default lies on the curve of its budgets
    panels = (
        (wrong, "positions with another token than the float32 head", 1 / positions),
        (far, "KL(float32 || head), nats", KL_FLOOR),
    )
    for axes, label, least in panels:
        lowest = math.inf
        for name in sorted(series, key=_order):
            points = [
                (row, 1 - row["agreement"] if axes is wrong else row["kl"])
                for row in sorted(series[name], key=lambda row: row["bytes_fraction"])
                if axes is wrong or row["kl"] is not None
            ]
            style = _style(name)
            if name in fewest:
                style = dataclasses.replace(style, filled=False)
            _draw(axes, name, style, points, least)
            lowest = min([lowest, *(value for _, value in points)])
        axes.set_ylabel(label)
        axes.set_yscale("log")
        if lowest < least:
            _floor(axes, least, f"< 1/{positions:,}" if axes is wrong else f"< {least:g}")
    for axes in (wrong, far):
        _bytes_axis(axes)
    title = f"{document['model']}: fidelity against bytes read, {positions:,} positions"
    data = Path(str(document.get("data", "text"))).name
    figure.suptitle(f"{title} of {data}", x=0.01, ha="left")
    handles, labels = wrong.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)


def _draw(
    axes: "Axes",
    name: str,
    style: _Style,
    points: list[tuple[dict[str, Any], float]],
    least: float,
) -> None:
    """One series; values below `least` lie in the middle of the strip under it."""
    if not points:
        return
    xs = [row["bytes_fraction"] for row, _ in points]
    ys = [value if value >= least else least / 2 for _, value in points]
    star = name in _STARRED
    axes.plot(
        xs,
        ys,
        linestyle="none" if star else style.line,
        color=style.colour,
        marker=style.marker,
        markersize=17 if star else 5,
        markerfacecolor=style.colour if style.filled else "white",
        markeredgecolor="black" if star else style.colour,
        markeredgewidth=0.8,
        linewidth=1.1,
        zorder=5 if star else 3,
        clip_on=False,
        label=style.label,
    )
    for i, (row, value) in enumerate(points):
        end = name in _ENDS_LABELLED and i in (0, len(points) - 1) and value >= least
        if name not in _LABELLED and (not end or row["series"] == "flashhead"):
            continue
        axes.annotate(
            _STARRED.get(name, row["point"]),
            (xs[i], ys[i]),
            xytext=_STAR_LABELS.get(name, (5, 4)),
            textcoords="offset points",
            fontsize=7.5,
            color=style.colour,
            zorder=6,
        )


def _style(name: str) -> _Style:
    """How a series is drawn; one unknown to this file is black under its own name."""
    if _base(name) not in _STYLES:
        return _Style(name, "black", "v")
    style = _STYLES[_base(name)]
    exact = _exact_rows(name)
    return (
        dataclasses.replace(style, label=f"{style.label}, best {exact:,} exact") if exact else style
    )


def _base(name: str) -> str:
    """The series without its number of rows scored exactly."""
    base, _, exact = name.rpartition("-k")
    return base if exact.isdigit() else name


def _exact_rows(name: str) -> int:
    exact = name.removeprefix(_base(name)).removeprefix("-k")
    return int(exact) if exact else 0


def _order(name: str) -> tuple[int, int, str]:
    known = list(_STYLES)
    base = _base(name)
    return known.index(base) if base in known else len(known), _exact_rows(name), name


def _floor(axes: "Axes", least: float, text: str) -> None:
    """The strip of what cannot be told from zero, below `least`."""
    bottom = least / 3.2
    axes.set_ylim(bottom, max(axes.get_ylim()[1], 10 * least))
    axes.axhspan(bottom, least / 1.15, color="#eef3ee", zorder=0)
    place = axes.get_yaxis_transform()
    axes.text(0.008, least / 2, text, transform=place, fontsize=8, va="center", zorder=1)


def _bytes_axis(axes: "Axes") -> None:
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0]
    axes.set_xlim(low, max(high, 1.15))
    shown = [tick for tick in ticks if low <= tick <= max(high, 1.15)]
    axes.set_xticks(shown, [f"{100 * tick:g} %" for tick in shown])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("bytes read a token, of the bf16 head")
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
