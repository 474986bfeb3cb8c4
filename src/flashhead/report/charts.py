"""Charts of a report as geometry: where each mark goes, and the figure it stands for.

The template draws them as inline SVG in the page's own colours, and writes the figure beside each
mark, so that a test can compare them with the result file.
"""

import dataclasses
import math
from typing import Any

WIDTH, ROW, TOP, BOTTOM, LEFT, RIGHT = 640, 30, 14, 62, 110, 40
PLOT_HEIGHT = 300
SERIES = {
    "flashhead": ("FlashHead", "accent", "star"),
    "certified": ("FlashHead, certified greedy", "accent", "ring"),
    "codes": ("FlashHead, other KL budgets", "accent", "dot"),
    "dense": ("dense heads in fewer bits", "ink", "square"),
}
"""Of the frontier: label, colour, mark; any other series is a baseline."""
OTHERS = ("clusters and low rank", "quiet", "dot")


@dataclasses.dataclass(frozen=True)
class Mark:
    """One figure in a chart.

    Args:
        name: what it is of.
        label: of its series.
        colour: a colour of the page.
        shape: of the mark.
        x: place, pixels.
        y: place, pixels.
        low: left end of its interval, pixels, or None.
        high: right end, or None.
        values: figures it stands for, by field.
    """

    name: str
    label: str
    colour: str
    shape: str
    x: float
    y: float
    low: float | None
    high: float | None
    values: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Chart:
    """Marks and axes.

    Args:
        width: pixels.
        height: pixels.
        marks: to be drawn.
        x_ticks: place and text.
        y_ticks: place and text.
        legend: label, colour and shape of each series that is drawn.
    """

    width: float
    height: float
    marks: list[Mark]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    legend: list[tuple[str, str, str]]


def differences(tasks: dict[str, dict[str, Any]]) -> Chart | None:
    """Differences of the tasks that are shares, with their intervals; None: there are none."""
    rows = {name: row for name, row in tasks.items() if "difference" in row}
    if not rows:
        return None
    reach = 0.01
    for row in rows.values():
        reach = max([reach, abs(row["difference"]), *map(abs, row["interval"] or ())])
    reach = _ceiling(reach)
    inner = WIDTH - LEFT - RIGHT

    def place(value: float) -> float:
        return round(LEFT + (value / reach + 1) / 2 * inner, 2)

    marks = []
    for number, (name, row) in enumerate(rows.items()):
        low, high = row["interval"] or (None, None)
        values = {"difference": row["difference"]}
        marks.append(
            Mark(
                *(name, "difference", "accent", "dot"),
                *(place(row["difference"]), TOP + ROW * (number + 0.5)),
                *(None if low is None else place(low), None if high is None else place(high)),
                values,
            )
        )
    ticks = [(place(t * reach), f"{100 * t * reach:+.3g}") for t in (-1, -0.5, 0, 0.5, 1)]
    names = [(mark.y, mark.name) for mark in marks]
    return Chart(WIDTH, TOP + ROW * len(rows) + BOTTOM, marks, ticks, names, [])


def frontier(document: dict[str, Any]) -> Chart:
    """Share of positions whose token differs, against bytes; both on a log scale.

    What a text of n positions cannot tell from none is drawn at 1 / (2n).
    """
    methods, floor = document["methods"], 0.5 / document["positions"]
    wrong = {name: max(floor, 1 - row["agreement"]) for name, row in methods.items()}
    xs = [row["bytes_fraction"] for row in methods.values()]
    x_low, x_high = _decade(min(xs), math.floor), _decade(max(xs), math.ceil)
    y_low, y_high = floor, max(_decade(max(wrong.values()), math.ceil), 10 * floor)
    bottom = TOP + PLOT_HEIGHT

    def across(value: float) -> float:
        share = math.log(value / x_low) / math.log(x_high / x_low)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 2)

    def up(value: float) -> float:
        return round(bottom - math.log(value / y_low) / math.log(y_high / y_low) * PLOT_HEIGHT, 2)

    marks = []
    for name, row in methods.items():
        label, colour, shape = SERIES.get(row["series"], OTHERS)
        values = {"bytes_fraction": row["bytes_fraction"], "agreement": row["agreement"]}
        x, y = across(row["bytes_fraction"]), up(wrong[name])
        marks.append(Mark(name, label, colour, shape, x, y, None, None, values))
    marks.sort(key=lambda mark: mark.colour == "accent")  # ours on top
    x_ticks = [(across(t), f"{100 * t:g} %") for t in _steps(x_low, x_high)]
    y_ticks = [(up(t), f"{100 * t:g} %") for t in _steps(y_low, y_high)]
    y_ticks.append((up(floor), "none seen"))
    legend = list(dict.fromkeys((mark.label, mark.colour, mark.shape) for mark in marks))
    return Chart(WIDTH, bottom + BOTTOM, marks, x_ticks, y_ticks, legend)


def _ceiling(value: float) -> float:
    """The next of 1, 2, 5, 10, ... times a power of ten."""
    power = 10 ** math.floor(math.log10(value))
    return next(float(m * power) for m in (1, 2, 5, 10) if value <= m * power * (1 + 1e-12))


def _decade(value: float, rounded: Any) -> float:
    power = 10.0 ** rounded(math.log10(value))
    return power if power != value or rounded is math.ceil else value / 10


def _steps(low: float, high: float) -> list[float]:
    """Powers of ten in a range."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    return [
        10.0**power for power in range(first, last + 1) if 10.0**power > 1.5 * low or first == power
    ]
