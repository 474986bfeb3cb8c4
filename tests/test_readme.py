"""README.md says what benchmarks/results say, and nothing measured beside them."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("jinja2")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

# ruff: noqa: E402
import readme
from jinja2 import nodes

from flashhead.errors import FlashHeadError

FIGURE = re.compile(r"\d[\d.,]*(?:x\b|\s?%|\s?(?:us|ms|tokens/s|tok/s)\b)")
ALLOWED = {
    "smol-4x": "the name of a folder in an example",
    "a search that reads 10 % of the head": "an assumption of the ledger's table, said as one",
}
"""Text of the template that looks measured and is not: why."""


def template_text(source):  # type: ignore[no-untyped-def]
    """What the template prints as it is: no comments, no expressions."""
    tree = readme.environment().parse(source)
    return "".join(node.data for node in tree.find_all(nodes.TemplateData))


def measured_looking(text):  # type: ignore[no-untyped-def]
    for known in ALLOWED:
        text = text.replace(known, "")
    return FIGURE.findall(text)


def test_readme_is_what_the_template_makes_of_the_results():
    """Catches a README edited by hand, and results that changed without it."""
    documents = readme.Documents()
    assert readme.render(documents) == (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.main(["--check"]) == 0
    assert len(documents.read) > 25


def turned(value):  # type: ignore[no-untyped-def]
    """A document whose floats are all other ones, in the opposite order."""
    if isinstance(value, dict):
        return {key: turned(own) for key, own in value.items()}
    if isinstance(value, list):
        return [turned(own) for own in value]
    return 3 / value if isinstance(value, float) and value else value


def outcome(documents):  # type: ignore[no-untyped-def]
    """The text, or what stops its making because words no longer hold."""
    try:
        return readme.render(documents)
    except FlashHeadError as error:
        if "no longer hold" not in str(error):
            raise
        return str(error)


def test_every_document_that_is_read_decides_something():
    """Catches a check that cannot fail: other floats in any one document give another README, or
    an error where words would no longer hold."""
    documents = readme.Documents()
    text = readme.render(documents)
    for name, document in list(documents.read.items()):
        changed = readme.Documents()
        changed.read = documents.read | {name: turned(document)}
        if name.startswith("vllm-features"):  # whole numbers: tokens, and where texts part
            feature = changed.read[name]["features"][0]
            seeded = changed.read[name]["features"][1]
            feature["identical"] -= 1
            seeded["differences"] = [{}] * 40
        assert outcome(changed) != text, name


def test_a_changed_figure_is_found_and_printed(tmp_path, capsys):
    """Catches a --check that reads other documents than --results says, or prints no diff."""
    shutil.copytree(readme.RESULTS, tmp_path / "results", ignore=shutil.ignore_patterns("*.svg"))
    path = tmp_path / "results" / "certified-gemma-3-270m.json"
    document = json.loads(path.read_text())
    document["certified_bytes_fraction"] = 0.0812
    path.write_text(json.dumps(document))
    assert readme.main(["--check", "--results", str(tmp_path / "results")]) == 1
    out = capsys.readouterr().out
    assert "+At 20,000 positions" in out
    assert "**8.1% of the head's bytes**" in out


def test_a_missing_document_or_field_is_one_line(tmp_path, capsys):
    """Catches an undefined figure printed as nothing."""
    assert readme.main(["--check", "--results", str(tmp_path)]) == 2
    assert "certified-gemma-3-270m.json: cannot be read" in capsys.readouterr().err
    documents = readme.Documents()
    documents.read["certified-gemma-3-270m"] = {"positions": 20000}
    with pytest.raises(FlashHeadError, match="certified_agreement"):
        readme.render(documents)


def test_words_that_no_longer_hold_stop_the_making():
    """Catches "every time" beside an agreement below 1."""
    documents = readme.Documents()
    readme.render(documents)
    changed = json.loads(json.dumps(documents.read["certified-gemma-3-270m"]))
    changed["certified_agreement"] = 0.99995
    again = readme.Documents()
    again.read["certified-gemma-3-270m"] = changed
    lines = (ROOT / readme.TEMPLATE).read_text(encoding="utf-8").splitlines()
    number = next(i for i, line in enumerate(lines, 1) if "every time{{ claim(" in line)
    with pytest.raises(FlashHeadError, match=f"j2:{number}: words no longer hold"):
        readme.render(again)


def test_no_measured_figure_is_written_by_hand():
    """Catches a figure that no document holds."""
    source = (ROOT / readme.TEMPLATE).read_text(encoding="utf-8")
    text = template_text(source)
    assert measured_looking(text) == []
    assert [known for known in ALLOWED if known not in text] == []
    numbers = [
        node.value
        for output in readme.environment().parse(source).find_all(nodes.Output)
        for node in output.nodes
        if isinstance(node, nodes.Const) and not isinstance(node.value, str)
    ]
    assert numbers == []


@pytest.mark.parametrize("text", ["1.51x as fast", "9.0 % of", "12% of", "130 us", "254 tokens/s"])
def test_figures_by_hand_would_be_seen(text):
    """Catches a pattern that matches nothing."""
    assert measured_looking(template_text(f"On a card it is {text} {{{{ 1 }}}}"))


def test_links_point_to_files_and_the_page_stays_short():
    """Catches a moved page, and a README nobody reads to its end."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert len(links) > 10
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert missing == []
    assert len(text.splitlines()) <= 200


def test_rounding_and_names():
    """Catches halves rounded to even, and figures of a machine that is named wrongly."""
    assert readme.pct(0.9795) == "98.0%"
    assert readme.pct(2.54e-6, 4, sign=True) == "+0.0003%"
    assert readme.rounded(1722.98) == "1,723"
    assert readme.spread(1.5004, 1.4999) == "1.50"
    epyc = {"cpu": "AMD EPYC 9654", "cores": 2, "isa": ["avx2", "avx512_vnni"], "gpu": None}
    assert readme.machine({"hardware": epyc}) == "2 cores of an AMD EPYC (AVX-512 VNNI)"
    with pytest.raises(FlashHeadError, match="names none"):
        readme.gpu({"hardware": epyc})
    assert readme.gpu({"hardware": epyc | {"gpu": "NVIDIA H100 80GB HBM3"}}) == "an H100"
    with pytest.raises(FlashHeadError, match="2 rows"):
        readme.row([{"batch": 1}, {"batch": 1}], batch=1)
