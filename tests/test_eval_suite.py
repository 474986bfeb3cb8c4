"""`flashhead eval MODEL --against BASE --tasks ...`, end to end on a tiny model."""

import json
import math
import string
from pathlib import Path

import pytest
import torch
from test_eval_tasks import write_data
from test_next_token import V, head_of

from flashhead.cli import main
from flashhead.evaluate.suite.heads import DenseHead, SearchedHead, token_logprobs
from flashhead.task_names import TASKS

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def base(tiny_folder, tmp_path_factory) -> str:
    """The tiny model in bf16, as real ones are (converting it changes no weight), that reads
    characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from flashhead.integrations.transformers import load_dense

    out = tmp_path_factory.mktemp("suite") / "base"
    model = load_dense(tiny_folder)
    model.config.max_position_embeddings = 4096
    model.save_pretrained(out)
    known = ["<unk>", "<s>", "</s>", *string.printable]
    words = [*known, *(f"<{i}>" for i in range(len(known), 515))]
    tokenizer = Tokenizer(models.WordLevel(dict(zip(words, range(515), strict=True)), "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(out)
    return str(out)


@pytest.fixture(scope="module")
def converted(base, tmp_path_factory) -> str:
    """The tiny model with a codes index."""
    out = tmp_path_factory.mktemp("suite") / "converted"
    assert main(["convert", base, str(out), "--set", "calibration_tokens=256"]) == 0
    return str(out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Data sets of a few questions."""
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


def run(capsys, *arguments: str) -> dict:
    """The document of `flashhead eval ... --json`."""
    assert main(["eval", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_all_tasks_of_a_converted_model(converted, base, folder, tmp_path, capsys):
    """Catches a task that is lost, a score that is not its answers', logits that are not the
    searched head's, and a run that is not repeatable."""
    out = tmp_path / "result.json"
    arguments = [
        *(converted, "--against", base, "--tasks", "all", "--data-dir", str(folder)),
        *("--limit", "4", "--context", "600,900", "--seed", "3", "--cache", str(tmp_path / "kept")),
    ]
    document = run(capsys, *arguments, "--out", str(out))
    assert json.loads(out.read_text()) == document
    assert list(document["tasks"]) == list(TASKS)
    assert document["sides"]["value"]["shares_body"]
    assert "searched" in document["sides"]["value"]["head"]
    for name, row in document["tasks"].items():
        assert row["n"] == 4
        assert row["agreement"] == 1.0
        # the index's own budget, not the zero of a dense head that answers in its place
        assert 0 < row["kl"]["mean"] < 0.05, name
        assert row["examples"] == []
        if "certified" in row and row["certified"] is not None:
            assert row["certified"]["share"] == 1.0
            assert row["certified"]["candidates_mean"] < 515
    assert document["tasks"]["perplexity"]["ratio"] == pytest.approx(1, abs=0.02)
    assert document["tasks"]["perplexity"]["ratio"] != 1
    assert document["tasks"]["needle"]["by_context"].keys() == {"600", "900"}
    assert str(tmp_path) not in out.read_text()
    again = run(capsys, *arguments, "--no-resume")
    for name, row in again["tasks"].items():
        first = document["tasks"][name]
        assert {k: v for k, v in row.items() if k != "seconds"} == {
            k: v for k, v in first.items() if k != "seconds"
        }


def test_scores_are_those_of_plain_logits(converted, base, folder, tmp_path, capsys):
    """Catches a log-likelihood of the wrong position or tokens: perplexity of the base, by hand."""
    import flashhead
    from flashhead.evaluate.suite import data
    from flashhead.integrations.transformers import load_tokenizer

    document = run(
        capsys,
        *(converted, "--against", base, "--tasks", "perplexity", "--limit", "3"),
        *("--data-dir", str(folder), "--cache", str(tmp_path)),
    )
    model = flashhead.load(base, "dense", dtype=torch.float32, progress=False)
    tokenizer = load_tokenizer(base)
    total = count = 0.0
    for doc in data.wikitext(folder, 3, 0):
        context, both = (
            tokenizer(t)["input_ids"] for t in (doc["prompt"], doc["prompt"] + doc["target"])
        )
        with torch.no_grad():
            logits = model(torch.tensor([both])).logits[0].double().log_softmax(1)
        for i in range(len(context), len(both)):
            total -= float(logits[i - 1, both[i]])
            count += 1
    row = document["tasks"]["perplexity"]
    assert row["base"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert row["scored_tokens"] == count
    estimated = row["complete_logits"]
    assert estimated["base"] == row["base"]
    assert estimated["ratio"] == pytest.approx(row["ratio"], abs=0.02)


def test_asked_tokens_are_scored_exactly() -> None:
    """Catches estimates in the log-likelihood of continuations, or a normaliser without them."""
    head, hidden = head_of("codes")
    searched = SearchedHead(head, lambda logits: logits / 2)
    tokens = torch.randint(0, V, (3, 64), generator=torch.Generator().manual_seed(0))
    found = token_logprobs(searched, hidden, tokens)
    logits = head.search(hidden).logits.double() / 2
    for i, row in enumerate(tokens):
        exact = (hidden.double() @ head.weight.double().T / 2).gather(1, row[:, None]).sum()
        estimates = logits.gather(1, row[:, None]).sum()
        normaliser = logits.logsumexp(1).sum()
        assert float(found.values[i]) == pytest.approx(float(exact - normaliser), abs=1e-3)
        assert float(found.complete[i]) == pytest.approx(float(estimates - normaliser), abs=1e-3)
        assert abs(float(exact - estimates)) > 0.01  # so the two can be told apart
    assert not found.greedy.any()
    best = token_logprobs(searched, hidden, logits.argmax(1)[None])
    assert best.greedy.all()
    truth = DenseHead(head, lambda logits: logits / 2)
    known = token_logprobs(truth, hidden, tokens)
    assert torch.equal(known.values, known.complete)


def test_a_head_that_errs_is_seen(converted, base, tmp_path, capsys, monkeypatch):
    """Catches an evaluation that compares the base with itself, and a generation that does not go
    on with its own tokens: a head with noise on its logits must differ, with examples."""
    clean = SearchedHead.logits

    def noisy(self, hidden):
        logits = clean(self, hidden)
        phase = 100 * hidden.float().sum(1, keepdim=True) + torch.arange(logits.shape[1])
        return logits + 4 * logits.std() * torch.sin(phase)

    def choose(self, hidden):
        return [(token, False, 1) for token in noisy(self, hidden).argmax(1).tolist()]

    monkeypatch.setattr(SearchedHead, "logits", noisy)
    monkeypatch.setattr(SearchedHead, "choose", choose)
    document = run(
        capsys,
        *(converted, "--against", base, "--tasks", "copy", "--context", "600"),
        *("--limit", "6", "--cache", str(tmp_path)),
    )
    row = document["tasks"]["copy"]
    assert row["agreement"] < 1
    assert row["identical_answers"] < 6
    assert row["certified"]["share"] == 0
    assert row["kl"]["mean"] > 0
    assert document["greedy"]["agreement"] == row["agreement"]
    example = row["examples"][0]
    assert example["position"] >= row["first_divergence"]["earliest"]
    assert example["base_token"] != example["value_token"]
    best = {
        side: max(example["candidates"], key=lambda c: c[f"{side}_logit"])["token"]
        for side in ("base", "value")
    }
    assert best == {"base": example["base_token"], "value": example["value_token"]}


def test_another_body_runs_on_its_own(base, tmp_path, capsys):
    """Catches a body that is taken for the base's because only one weight differs, and a value
    whose answers are the base's."""
    from flashhead.integrations.transformers import load_dense, load_tokenizer

    other = tmp_path / "other"
    model = load_dense(base)
    model.model.layers[1].mlp.down_proj.weight.data.mul_(-40)
    model.save_pretrained(other)
    load_tokenizer(base).save_pretrained(other)
    document = run(
        capsys,
        *(str(other), "--against", base, "--tasks", "copy", "--context", "600", "--limit", "3"),
        *("--head", "dense", "--cache", str(tmp_path / "kept")),
    )
    row = document["tasks"]["copy"]
    assert document["sides"]["value"]["shares_body"] is False
    assert row["agreement"] < 1
    assert row["kl"]["mean"] > 1e-3
    assert row["certified"] is None
    alike = run(
        capsys,
        *(base, "--against", base, "--tasks", "copy", "--context", "600", "--limit", "3"),
        *("--head", "dense", "--cache", str(tmp_path / "kept")),
    )
    assert alike["tasks"]["copy"]["agreement"] == 1
    assert alike["tasks"]["copy"]["kl"]["max"] == 0


def test_a_stopped_run_goes_on(converted, base, tmp_path, capsys, monkeypatch):
    """Catches answers that are asked again after Ctrl-C, and a resumed run that says otherwise."""
    from flashhead.evaluate.suite.rows import Body

    arguments = [
        *(converted, "--against", base, "--tasks", "needle,addition", "--limit", "6"),
        *("--context", "600", "--batch", "2", "--cache", str(tmp_path)),
    ]
    prefill, calls = Body.prefill, []

    def stopping(self, *given):
        calls.append(len(given[0]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return prefill(self, *given)

    monkeypatch.setattr(Body, "prefill", stopping)
    assert main(["eval", *arguments]) == 130
    kept = sum(len(p.read_text().splitlines()) for p in tmp_path.rglob("needle.jsonl"))
    assert kept == 2 * sum(calls[:2]) > 0  # two batches, by both heads
    monkeypatch.setattr(Body, "prefill", prefill)
    resumed = run(capsys, *arguments)
    afresh = run(capsys, *arguments, "--no-resume")
    for name in ("needle", "addition"):
        rows = [d["tasks"][name] for d in (resumed, afresh)]
        assert [row.pop("resumed_answers") for row in rows] == [kept if name == "needle" else 0, 0]
        assert {**rows[0], "seconds": 0} == {**rows[1], "seconds": 0}


def test_a_changed_answer_is_one_line(converted, base, tmp_path, capsys):
    """Catches figures that rest on an edited file."""
    arguments = [
        *(converted, "--against", base, "--tasks", "addition", "--limit", "3"),
        *("--context", "600", "--cache", str(tmp_path)),
    ]
    assert main(["eval", *arguments]) == 0
    file = next(tmp_path.rglob("addition.jsonl"))
    file.write_text(file.read_text().replace('"certified": ', '"certified": 1', 1))
    capsys.readouterr()
    assert main(["eval", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "addition.jsonl, line 1: changed since it was written" in error


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--tasks", "mmlu"], "pass --data-dir DIR"),
        (["--tasks", "mmlu", "--data-dir", "{empty}"], "no csv file in"),
        (["--tasks", "gsm8k", "--data-dir", "{empty}"], "cannot be read"),
        (["--tasks", "perplexity", "--data-dir", "{empty}"], "no such file"),
        (["--tasks", "mmlu,chess"], "'chess': wanted all, mmlu"),
        (["--tasks", "needle", "--limit", "0"], "wanted an integer, 1 or more"),
        (["--tasks", "needle", "--context", "100"], "wanted an integer, 256 or more"),
        (["--tasks", "needle", "--context", "8192"], "reads at most 4,096 tokens"),
        (["--tasks", "needle", "--context", "256"], "too short for needle"),
        (["--tasks", "needle", "--batch", "many"], "wanted an integer, 1 to 4,096"),
        (["--tasks", "needle", "--data", "{empty}"], "no such file"),
        (["--tasks", "needle", "--kv-dtype", "int8"], "--kv-dtype without --data"),
        (["--tasks", "needle", "--kv-select", "64"], "--kv-select without --data"),
        (["--tasks", "needle", "--data-dir", "{empty}/no"], "no such folder"),
    ],
)
def test_mistakes_are_one_line(arguments, match, base, tmp_path, capsys):
    given = [argument.format(empty=tmp_path) for argument in arguments]
    try:
        code = main(["eval", base, "--against", base, *given, "--head", "dense"])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert match in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.model
def test_smollm2(tmp_path, capsys, tmp_path_factory):
    """Two questions a task of a real model: the searched head's tokens are the dense head's."""
    folder = tmp_path_factory.mktemp("real")
    write_data(folder)
    out = str(tmp_path_factory.mktemp("real") / "converted")
    assert main(["convert", "smollm2-135m", out, "--set", "calibration_tokens=512"]) == 0
    document = run(
        capsys,
        *(out, "--against", "smollm2-135m", "--tasks", "all", "--limit", "2"),
        *("--context", "600", "--data-dir", str(folder), "--cache", str(tmp_path)),
    )
    assert document["greedy"]["tokens"] >= 50
    assert document["greedy"]["agreement"] == 1.0
    assert document["tasks"]["lookup"]["base"] > 0
    assert all(row["kl"]["mean"] < 0.005 for row in document["tasks"].values())
