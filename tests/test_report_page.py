"""The report page: its figures are the result files', and nobody's text becomes markup."""

import copy
import html.parser
import json
from pathlib import Path

import pytest
from browser import browser_page

from flashhead.cli import main
from flashhead.errors import FlashHeadError
from flashhead.report.judgement import judge
from flashhead.report.page import field
from flashhead.report.results import document_sha256, read_results

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
PUBLISHED = [
    RESULTS / name
    for name in (
        "frontier-smollm2-135m.json",
        "stacked-decode-gemma-3-270m.json",
        "bench-head-gemma-3-270m.json",
    )
]
HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}"


def _task(base: float, value: float, n: int = 200, **more) -> dict:
    row = {
        "metric": "exact match",
        "shots": 0,
        "n": n,
        "groups": n,
        "base": base,
        "value": value,
        "difference": value - base,
        "stderr": 0.03,
        "base_stderr": 0.03,
        "difference_stderr": 0.01,
        "interval": [value - base - 0.02, value - base + 0.02],
        "agreement": 0.9995,
        "first_divergence": {"earliest": 3, "mean": 3.0},
        "certified": {"share": 1.0, "candidates_mean": 33.5},
        "kl": {"mean": 7.1e-4, "stderr": 1e-5, "max": 2e-3, "positions": 256},
        "examples": [],
        "seconds": {"base": 1.0, "value": 1.0},
        "tokens": 2000,
        "identical_tokens": 1999,
    }
    return row | more


def document(**tasks: dict) -> dict:
    """An evaluation, as `flashhead eval` writes it."""
    perplexity = _task(16.5, 16.4, agreement=1.0, first_divergence=None, certified=None)
    perplexity |= {"metric": "perplexity", "ratio": 16.4 / 16.5, "interval": [0.99, 1.001]}
    for name in ("difference", "tokens", "identical_tokens"):
        del perplexity[name]
    example = {
        "number": 0,
        "prompt": HOSTILE,
        "position": 3,
        "common": "a\nb",
        "base": HOSTILE,
        "value": "",
        "base_token": 5,
        "value_token": 6,
        "base_score": 1.0,
        "value_score": 0.0,
        "candidates": [
            {"token": 5, "text": HOSTILE, "base_logit": 9.25, "value_logit": 9.125},
            {"token": 6, "text": " b", "base_logit": 9.0, "value_logit": 9.5},
        ],
    }
    context = {"n": 200, "base": 0.4, "value": 0.4, "difference": 0.0, "stderr": None}
    rows = {
        "perplexity": perplexity,
        "needle": _task(0.4, 0.4, by_context={"1024": context}),
        "gsm8k": _task(0.1, 0.105, examples=[example]),
        **tasks,
    }
    tokens = sum(row.get("tokens", 0) for row in rows.values())
    same = sum(row.get("identical_tokens", 0) for row in rows.values())
    found = {
        "kind": "evaluation",
        "schema": 1,
        "model": "tiny <b>",
        "against": "tiny",
        "tasks": rows,
        "greedy": {"tokens": tokens, "identical_tokens": same, "agreement": same / tokens},
        "sides": {
            "base": {"dtype": "float32", "head": "float32 dense product"},
            "value": {"dtype": "float32", "head": "FlashHead, every row searched"},
        },
        "limit": 200,
        "seed": 0,
        "hardware": {"cpu": "none", "cores": 2},
        "versions": {"python": "3.11"},
        "git_sha": None,
        "argv": ["flashhead", "eval"],
    }
    return found | {"sha256": document_sha256(found)}


def write(path: Path, value: dict) -> Path:
    path.write_text(json.dumps(value))
    return path


class _Figures(html.parser.HTMLParser):
    """What the page says of each field, and its elements."""

    def __init__(self) -> None:
        super().__init__()
        self.fields: list[tuple[str, str, str]] = []
        self.marks: list[tuple[str, str, str]] = []
        self.tags: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append((tag, found))
        if "data-field" in found:
            self.fields.append((found["data-file"], found["data-field"], found["data-value"]))
        if "data-mark" in found:
            self.marks.append((found["data-file"], found["data-mark"], found["data-values"]))


@pytest.fixture
def page(tmp_path) -> tuple[Path, dict[str, dict]]:
    """A page of an evaluation and of published results, and these."""
    paths = [write(tmp_path / "evaluation.json", document()), *PUBLISHED]
    out = tmp_path / "report.html"
    assert main(["report", *map(str, paths), "--out", str(out)]) == 0
    return out, {path.name: json.loads(path.read_text()) for path in paths}


def test_every_figure_is_the_result_files(page):
    """Catches a figure of another field or file, a rounded chart, and a figure that is left out."""
    out, documents = page
    figures = _Figures()
    figures.feed(out.read_text())
    for file, path, value in figures.fields:
        assert json.loads(value) == field(documents[file], path), path
    for file, path, values in figures.marks:
        row = field(documents[file], path)
        assert json.loads(values) == {name: row[name] for name in json.loads(values)}
    shown = {(file, path) for file, path, _ in figures.fields}
    tasks = documents["evaluation.json"]["tasks"]
    for name, row in tasks.items():
        change = "ratio" if "ratio" in row else "difference"
        for part in ("base", "value", change, "stderr", "agreement", "kl/mean"):
            assert ("evaluation.json", f"tasks/{name}/{part}") in shown
    frontier = documents["frontier-smollm2-135m.json"]["methods"]
    marked = {path for _, path, _ in figures.marks}
    assert {f"methods/{name}" for name in frontier} <= marked
    assert {"tasks/needle", "tasks/gsm8k"} <= marked
    assert ("stacked-decode-gemma-3-270m.json", "eager/sides/flash/tok_per_sec") in shown
    assert ("bench-head-gemma-3-270m.json", "rows/0/bytes_read") in shown


def test_text_of_a_model_stays_text_and_tables_have_headers(page):
    """Catches a template that trusts what a model wrote, a script, a link to the network, and
    tables or charts that cannot be read aloud."""
    text = page[0].read_text()
    figures = _Figures()
    figures.feed(text)
    names = [tag for tag, _ in figures.tags]
    assert "script" not in names
    assert "img" not in names
    assert "49" not in text.split("onerror=alert(2)&gt;")[1][:12]
    assert "&lt;script&gt;" in text
    assert "tiny &lt;b&gt;" in text
    assert "http" not in text.replace("http-equiv", "")
    for tag, attributes in figures.tags:
        if tag == "th":
            assert attributes.get("scope") in ("row", "col")
        if tag == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"
    assert names.count("caption") == names.count("table") >= 5
    assert ("html", {"lang": "en"}) in figures.tags


def test_verdicts():
    """Catches a yes with a task that is worse, with tokens that differ, or with too few questions;
    and a better score or a lower perplexity called worse."""
    assert judge([document()]).answer == "yes"
    assert judge([document(mmlu=_task(0.5, 0.6))]).answer == "yes"
    worse = judge([document(mmlu=_task(0.5, 0.46))])
    assert worse.answer == "no"
    assert "worse: mmlu" in worse.sentence
    higher = copy.deepcopy(document())
    higher["tasks"]["perplexity"] |= {"value": 16.6, "ratio": 16.6 / 16.5}
    assert judge([higher]).answer == "no"
    assert judge([document(copy=_task(0.5, 0.5, identical_tokens=1990))]).answer == "no"
    assert judge([document(copy=_task(0.5, 0.48, stderr=None))]).answer == "not known"
    assert judge([document(copy=_task(0.5, 0.5, stderr=None))]).answer == "yes"
    few = {name: {**row, "n": 3} for name, row in document()["tasks"].items()}
    assert judge([document(**few)]).answer == "not known"
    assert judge([]).answer == "not known"
    both = judge([document(), document(mmlu=_task(0.5, 0.4))])
    assert both.answer == "no"
    assert [one.answer for one in both.each] == ["yes", "no"]
    attached = document() | {"model": "m", "against": "m"}
    attached["sides"]["value"]["head"] = "FlashHead, every row searched"
    assert judge([attached]).sentence.startswith("m with FlashHead may replace m: ")


def _without(value: dict, path: str) -> dict:
    *parents, last = path.split("/")
    inner = value
    for name in parents:
        inner = inner[int(name)] if isinstance(inner, list) else inner[name]
    del inner[last]
    return value


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        ("tasks/needle/base", 0.6, "tasks.needle.difference: is"),
        ("tasks/needle/base", 1.6, "tasks.needle"),
        ("tasks/needle/value", "0.4", "tasks.needle.value: wanted float"),
        ("tasks/needle/agreement", 1.2, "tasks.needle.agreement: wanted 0 to 1"),
        ("tasks/perplexity/ratio", 1.0, "tasks.perplexity.ratio: is 1.0"),
        ("tasks/perplexity/value", float("nan"), "tasks.perplexity.value: wanted a finite"),
        ("tasks/needle/n", True, "tasks.needle.n: wanted int"),
        ("greedy/identical_tokens", 4000, "greedy.identical_tokens: is 4000"),
        ("greedy/agreement", 1.0, "greedy.agreement: is 1.0"),
        ("schema", 2, "schema: wanted 1"),
        ("tasks/gsm8k/kl/mean", 1e-9, "sha256: the file was changed"),
        ("model", "better", "sha256: the file was changed"),
        ("tasks", {}, "tasks: wanted one or more"),
    ],
)
def test_a_tampered_field_is_one_line(path, value, match, tmp_path, capsys):
    """Catches a page that rests on a file whose figures do not hold together."""
    changed = document()
    *parents, last = path.split("/")
    inner = changed
    for name in parents:
        inner = inner[name]
    inner[last] = value
    file = write(tmp_path / "changed.json", changed)
    out = tmp_path / "report.html"
    assert main(["report", str(file), "--out", str(out)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert f"changed.json: {match}" in error[0]
    assert not out.exists()


@pytest.mark.parametrize(
    "path",
    [
        "tasks/needle/kl",
        "tasks/needle/interval",
        "tasks/needle/difference",
        "tasks/gsm8k/examples/0/candidates",
        "sides",
        "sha256",
        "argv",
        "hardware",
    ],
)
def test_a_missing_field_is_one_line(path, tmp_path):
    """Catches a KeyError, and a template that shows nothing instead."""
    file = write(tmp_path / "short.json", _without(document(), path))
    with pytest.raises(FlashHeadError, match=r"short\.json: \S+: (is missing|wanted)"):
        read_results([file])


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("frontier-smollm2-135m.json", "methods/flashhead/bytes_fraction"),
        ("stacked-decode-gemma-3-270m.json", "eager/sides/flash"),
        ("bench-head-gemma-3-270m.json", "rows/0/median_ms"),
        ("bench-head-gemma-3-270m.json", "versions"),
    ],
)
def test_a_missing_field_of_other_results_is_one_line(name, path, tmp_path):
    """The same, for files of the other commands."""
    short = _without(json.loads((RESULTS / name).read_text()), path)
    with pytest.raises(FlashHeadError, match="is missing"):
        read_results([write(tmp_path / name, short)])


def test_a_file_of_another_kind_is_one_line(tmp_path):
    """Catches a page without content for a file that is no result."""
    for text in ("[]", '{"a": 1}', "no json"):
        file = tmp_path / "other.json"
        file.write_text(text)
        with pytest.raises(FlashHeadError, match=r"other\.json: (wanted a document|not JSON)"):
            read_results([file])


def test_in_a_browser(page, tmp_path):
    """Catches console errors, requests, a page wider than a phone, and a dark mode that cannot be
    read: contrast of text and paper of at least 4.5 in both schemes, at both widths."""
    out, documents = page
    contrast = """(() => {
      const light = c => { const [r, g, b] = c.match(/\\d+/g).slice(0, 3).map(v => {
        v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
      const paper = light(getComputedStyle(document.body).backgroundColor);
      return Math.min(...["p", "td", "th", ".note", "h1", "figcaption", "svg text"].map(s => {
        const style = getComputedStyle(document.querySelector(s));
        const ink = light(s === "svg text" ? style.fill : style.color);
        return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05); })); })()"""
    papers = set()
    with browser_page() as tab:
        for width in (390, 1280):
            for dark in (False, True):
                tab.open(out.as_uri(), width, dark=dark)
                assert tab.evaluate("document.documentElement.scrollWidth") <= width
                assert tab.evaluate(contrast) >= 4.5
                papers.add(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
                shot = tmp_path / f"{width}-{'dark' if dark else 'light'}.png"
                tab.screenshot(shot)
                assert shot.read_bytes().startswith(b"\x89PNG")
        verdict = tab.evaluate("document.querySelector('#verdict').innerText")
        tab.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        shown = tab.evaluate(
            "[...document.querySelectorAll('[data-field]')].map(e => "
            "[e.dataset.file, e.dataset.field, e.dataset.value, e.innerText])"
        )
        assert tab.problems == []
        assert [url for url in tab.requests if not url.startswith(("file:", "data:"))] == []
    assert len(papers) == 2
    assert verdict.startswith("tiny <b> may replace tiny: 3 of 3 tasks (600 questions)")
    assert len(shown) > 50
    for file, path, value, text in shown:
        wanted = field(documents[file], path)
        assert json.loads(value) == wanted
        assert (text == "–") == (wanted is None)
