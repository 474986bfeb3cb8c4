"""`make reproduce`: its steps as they are, and its running with steps that take no time."""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("jinja2")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]

# ruff: noqa: E402
import readme
import reproduce
import reproduce_plan
import reproduce_run
from reproduce_plan import all_steps
from reproduce_step import Step

from flashhead.cli import eval_model
from flashhead.cli.main import EVALUATIONS, build_parser

FAKE = """
import json, pathlib, sys, time
name, what, *inputs = sys.argv[1:]
with open("order", "a") as order:
    order.write(name + "\\n")
for folder in inputs:
    assert pathlib.Path(folder).exists(), folder
if what == "fail":
    sys.exit("the reason, in one line")
if what == "make":
    pathlib.Path(name).mkdir()
if what == "print":
    print("something else")
    print(json.dumps({"name": name}))
if what == "hang":
    time.sleep(60)
if what in ("write", "hang"):
    pathlib.Path("out", name + ".json").write_text(json.dumps({"name": name}))
if what == "half":
    pathlib.Path("out", name + ".json").write_text('{"name":')
"""


@pytest.fixture
def place(tmp_path):  # type: ignore[no-untyped-def]
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "wikitext2-valid.txt").write_text("one\ntwo\nthree\nfour\n")
    return tmp_path


def fake(place, name, what="write", *inputs, **fields):  # type: ignore[no-untyped-def]
    command = (str(place / "fake.py"), name, what, *inputs)
    written = () if what == "make" else (f"{name}.json",)
    made = (name,) if what == "make" else ()
    return Step(name, command, written, makes=made, prints=what == "print", **fields)


def run(place, steps, *more):  # type: ignore[no-untyped-def]
    """Exit code, and which steps ran."""
    (place / "work").mkdir(exist_ok=True)
    order = place / "work" / "order"
    order.write_text("")
    folders = ("--out", str(place / "results"), "--work", str(place / "work"))
    code = reproduce.main([*folders, "--data-dir", str(place / "data"), *more], tuple(steps))
    return code, order.read_text().split()


def test_a_conversion_runs_for_what_is_made_from_it_and_once(place):
    """Catches a step before what it reads, conversions nobody reads, and steps that run twice."""
    steps = (
        fake(place, "folder", "make"),
        fake(place, "unread", "make"),
        fake(place, "judged", "write", "folder", after=("folder",)),
        fake(place, "printed", "print"),
    )
    assert run(place, steps) == (0, ["folder", "judged", "printed"])
    results = place / "results"
    assert json.loads((results / "printed.json").read_text()) == {"name": "printed"}
    assert (place / "work" / "wiki-second-half.txt").read_text() == "three\nfour\n"
    assert run(place, steps) == (0, [])
    assert run(place, steps, "--only", "printed", "--again") == (0, ["printed"])
    (results / "judged.json").write_text("{}")
    assert run(place, steps) == (0, ["judged"])
    (place / "work" / "folder").rmdir()
    assert run(place, steps) == (0, [])
    assert run(place, steps, "--only", "judged", "--again") == (0, ["folder", "judged"])


def test_other_code_or_another_command_runs_again(place, monkeypatch):
    """Catches results of old code taken for today's."""
    assert run(place, [fake(place, "a")]) == (0, ["a"])
    monkeypatch.setattr(reproduce_run, "code", lambda: "other")
    assert run(place, [fake(place, "a")]) == (0, ["a"])
    other = Step("a", (str(place / "fake.py"), "a", "write", "."), ("a.json",))
    assert run(place, [other]) == (0, ["a"])


def test_a_document_of_a_commit_with_todays_code_is_current(place, monkeypatch):
    """Catches evaluations of hours that run again after a fresh clone, and dirty ones trusted."""
    (place / "results").mkdir()
    document = place / "results" / "a.json"
    asked = []
    monkeypatch.setattr(
        reproduce_run, "same_code_since", lambda commit: asked.append(commit) or commit == "good"
    )
    for commit, ran in (("good", []), ("older", ["a"]), ("good-dirty", ["a"])):
        (place / "work" / "steps" / "a.json").unlink(missing_ok=True)
        document.write_text(json.dumps({"git_sha": commit}))
        assert run(place, [fake(place, "a")]) == (0, ran)
    assert asked == ["good", "older", "good-dirty"]
    monkeypatch.undo()
    assert not reproduce_run.same_code_since("0" * 40)
    assert not reproduce_run.same_code_since("HEAD-dirty")


def test_a_failing_step_stops_what_reads_it_and_nothing_else(place, capsys):
    """Catches an evaluation that ends at its first failure, or hides it."""
    steps = (
        fake(place, "bad", "fail"),
        fake(place, "reads", "write", after=("bad",)),
        fake(place, "half", "half"),
        fake(place, "silent", "nothing"),
        fake(place, "good"),
    )
    assert run(place, steps, "--json") == (1, ["bad", "half", "silent", "good"])
    out, err = capsys.readouterr()
    assert "failed: bad: exit code 1: the reason, in one line" in err
    assert "not run: reads: bad failed" in err
    states = json.loads(out.splitlines()[-1])["steps"]
    assert {name: own["state"] for name, own in states.items()} == {
        "bad": "failed",
        "reads": "not run",
        "half": "failed",
        "silent": "failed",
        "good": "done",
    }
    assert "not JSON" in states["half"]["reason"]
    assert "did not write silent.json" in states["silent"]["reason"]
    assert sorted(path.name for path in (place / "results").iterdir()) == ["good.json"]


def test_what_cannot_run_here_is_left_out_with_its_reason(place, capsys, monkeypatch):
    """Catches a GPU's step on a CPU, and steps left out without a word."""
    monkeypatch.setattr(reproduce_plan, "has_gpu", lambda: False)
    model = ("qwen2.5-coder-0.5b",)
    steps = (
        fake(place, "card", needs=("gpu",)),
        fake(place, "reads", after=("card",)),
        fake(place, "qwen", models=model),
        fake(place, "here"),
    )
    assert run(place, steps) == (0, ["here"])
    err = capsys.readouterr().err
    assert "left out (needs a GPU that torch sees): card, reads" in err
    assert "pass --qwen-0.5b DIR" in err
    (place / "model").mkdir()
    (place / "model" / "config.json").write_text("{}")
    given = ("--qwen-0.5b", str(place / "model"))
    assert run(place, steps, *given) == (0, ["qwen"])
    assert (place / "work" / model[0]).resolve() == place / "model"


def test_report_and_readme_wait_for_what_they_show(place, capsys):
    """Catches a README of half the documents, written over the whole one's place."""
    (place / "results").mkdir()
    assert run(place, [fake(place, "a"), *reproduce_plan.closing(place / "results")]) == (0, ["a"])
    err = capsys.readouterr().err
    assert "left out (no document that it shows is there): report" in err
    assert "of its documents are not there" in err
    assert not (place / "results" / "README.md").exists()


def test_list_and_dry_run_write_nothing(place, capsys):
    """Catches a look that runs something."""
    steps = [fake(place, "a"), fake(place, "b")]
    assert run(place, steps, "--only", "a") == (0, ["a"])
    before = sorted(place.rglob("*"))
    assert run(place, steps, "--dry-run") == (0, [])
    assert f"{place / 'fake.py'} b write" in capsys.readouterr().err
    assert run(place, steps, "--list") == (0, [])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["a", "b"]
    assert "current; there, 0.0 days old" in lines[0]
    assert "run; not there" in lines[1]
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (("--only", "c"), "--only c: no such step"),
        (("--qwen-0.5b", "nowhere"), "nowhere holds no config.json"),
        (("--data-dir", "nowhere"), "wanted a folder with wikitext2-valid.txt"),
        (("--vllm-python", "nowhere"), "--vllm-python nowhere: no such file"),
    ],
)
def test_mistakes_are_one_line(place, capsys, more, line):
    """Catches a traceback, and steps begun before the mistake is seen."""
    assert run(place, [fake(place, "a")], *more) == (2, [])
    err = capsys.readouterr().err
    assert line in err
    assert len(err.splitlines()) == 1


def test_ctrl_c_ends_the_step_and_the_same_command_goes_on(place):
    """Catches a child that lives on, and a step taken for done."""
    step = fake(place, "slow", "hang")
    driver = place / "driver.py"
    driver.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
        "import reproduce\nfrom reproduce_step import Step\n"
        f"step = Step('slow', {step.command!r}, ('slow.json',))\n"
        f"sys.exit(reproduce.main(['--out', {str(place / 'results')!r}, '--work', "
        f"{str(place / 'work')!r}, '--data-dir', {str(place / 'data')!r}], (step,)))\n"
    )
    paths = os.pathsep.join((str(ROOT / "src"), os.environ.get("PYTHONPATH", "")))
    process = subprocess.Popen(
        [sys.executable, str(driver)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    order = place / "work" / "order"
    for _ in range(600):
        if order.exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "the same command goes on" in err
    assert json.loads((place / "work" / "steps" / "slow.json").read_text())["done"] is False
    assert not (place / "results" / "slow.json").exists()
    again = Step("slow", (str(place / "fake.py"), "slow", "write"), ("slow.json",))
    assert run(place, [again]) == (0, ["slow"])


def test_steps_come_behind_what_they_read_and_write_all_that_readme_quotes():
    """Catches a figure of README that nobody can measure again."""
    steps = all_steps()
    names = [own.name for own in steps]
    assert len(set(names)) == len(names)
    for number, own in enumerate(steps):
        assert set(own.after) <= set(names[:number]), own.name
    written = [name for own in steps for name in own.documents]
    assert len(set(written)) == len(written)
    documents = readme.Documents()
    readme.render(documents)
    assert {f"{name}.json" for name in documents.read} <= set(written)


class ParsedError(Exception):
    """The command line was read."""


@pytest.mark.parametrize("step", all_steps(), ids=lambda own: own.name)
def test_every_command_is_one_that_its_program_takes(step, tmp_path, monkeypatch):
    """Catches an option that was renamed."""
    monkeypatch.chdir(tmp_path)
    program, *words = step.command
    read = {"verify": words[1:2], "heal": words[1:2], "times": words[1:2]}.get(words[0], [])
    converted = words[:1] if program == "heal_rates.py" else read
    for folder in ("data", "results", "out", *converted):
        Path(folder).mkdir(exist_ok=True)
    for word in words:
        if word.startswith("results/") or word.endswith((".txt", ".jsonl")):
            Path(word).parent.mkdir(exist_ok=True)
            Path(word).touch()
        elif program == "train_twins.py" and word.startswith(("twins", "mha")) and "judge" in words:
            Path(word).mkdir(parents=True, exist_ok=True)
    if program == "flashhead":
        parsed = build_parser().parse_args(eval_model.with_name(list(words), EVALUATIONS))
        assert callable(parsed.run)
        return
    parse = argparse.ArgumentParser.parse_args

    def read(parser, given=None, namespace=None):  # type: ignore[no-untyped-def]
        parse(parser, given, namespace)
        raise ParsedError

    module = importlib.import_module(program.removesuffix(".py"))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", read)
    monkeypatch.setattr(sys, "argv", list(step.command))
    with pytest.raises(ParsedError):
        module.main()
