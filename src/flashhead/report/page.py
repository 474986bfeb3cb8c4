"""One page that says whether a converted model may replace the original; it needs no network.

Everything in it comes from result files. Each figure carries the path of the field that it shows
(`data-field`) and the value of that field (`data-value`). What a model wrote is untrusted: the
template escapes every text.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashhead._version import __version__
from flashhead.report import charts
from flashhead.report.judgement import called, judge, outcome
from flashhead.report.results import Result

OUTCOMES = {
    "same": "identical",
    "within": "within one standard error",
    "better": "better",
    "worse": "worse",
    "not known": "not known (one document)",
}
SIDES = {
    "dense": "dense bf16 head",
    "flash": "FlashHead",
    "body": "no head at all",
    "base": "the model it was made from",
    "int8": "the same with an int8 head",
}
HARDWARE = ("gpu", "cpu", "cores", "threads", "memory_gib", "system")


def render(results: Sequence[Result]) -> str:
    """The page as HTML.

    Args:
        results: of `read_results`.

    Raises:
        ImportError: jinja2 is not installed; the message names the command.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise ImportError(
            "jinja2 is not installed: pip install 'flashhead[report]'", name="jinja2"
        ) from error
    environment = Environment(
        loader=PackageLoader("flashhead.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        field=field, differences=charts.differences, frontier=charts.frontier, outcome=outcome
    )
    environment.globals.update(
        called=called, outcomes=OUTCOMES, sides=SIDES, hardware_names=HARDWARE
    )
    environment.filters["figure"] = figure
    by_kind = {
        kind: [result for result in results if result.kind == kind]
        for kind in ("evaluation", "decode", "head", "frontier")
    }
    judgement = judge([result.document for result in by_kind["evaluation"]])
    page = environment.get_template("page.html.j2")
    return page.render(judgement=judgement, by_kind=by_kind, results=results, version=__version__)


def write_page(page: str, path: Path) -> None:
    """Write a page whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)


def field(document: dict[str, Any], path: str) -> Any:
    """What a document holds at a path such as `tasks/mmlu/base`; None where there is nothing."""
    value: Any = document
    for name in path.split("/"):
        if isinstance(value, list):
            value = value[int(name)]
        else:
            value = value.get(name) if isinstance(value, dict) else None
    return value


def figure(value: Any, kind: str = "number") -> str:
    """A figure as text: "share" (per cent), "points" (signed, in points of a per cent), "nats",
    "count", "times", "speed", "megabytes" (of bytes), "logit" or "number".
    """
    if value is None:
        return "–"
    shown = {
        "share": lambda: f"{100 * value:.2f} %",
        "points": lambda: f"{100 * value:+.2f}",
        "nats": lambda: f"{value:.2e}",
        "count": lambda: f"{value:,.0f}",
        "times": lambda: f"{value:.4f}×",
        "speed": lambda: f"{value:.2f}×",
        "megabytes": lambda: f"{value / 1e6:,.1f}",
        "logit": lambda: f"{value:.6f}",
        "number": lambda: f"{value:,.4g}",
    }
    return shown[kind]()
