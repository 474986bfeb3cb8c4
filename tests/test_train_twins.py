"""Training a model and its latent twin from scratch: same text, same rows, whole folders."""

import json
import random
import sys
import time
from pathlib import Path

import pytest
import torch

from flashhead.errors import FlashHeadError
from flashhead.integrations.transformers import load_dense

EXAMPLES = str(Path(__file__).parent.parent / "examples")
sys.path.insert(0, EXAMPLES)
import train_twins  # noqa: E402
from twins import run, tasks, train  # noqa: E402
from twins.corpus import CorpusOptions, load_corpus, read_corpus  # noqa: E402
from twins.judge import accuracy  # noqa: E402
from twins.models import TwinSizes, cache_numbers, make_twin, parameter_counts  # noqa: E402
from twins.rows import Rows  # noqa: E402
from twins.train import TrainOptions  # noqa: E402

sys.path.remove(EXAMPLES)
SIZES = ["--layers", "2", "--hidden", "32", "--heads", "8", "--head-dim", "8"]
SIZES += ["--intermediate", "64", "--context", "32", "--vocab-size", "400"]
STEPS = ["--tokens", "5120", "--batch-tokens", "256", "--micro-tokens", "128", "--rate", "1e-2"]
SMALL = [*SIZES, *STEPS, "--held-tokens", "512"]
SETTINGS = {"tokens": 5120}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 files of words that follow each other in a pattern, two of them alike."""
    folder, rng = tmp_path_factory.mktemp("corpus"), random.Random(0)
    words = ["alpha", "beta", "gamma", "delta"]
    for i in range(60):
        start = rng.randrange(4)
        text = " ".join(words[(start + j) % 4] for j in range(80)) + f" file{i:03d}"
        (folder / f"{i}.py").write_text(text)
    (folder / "again.md").write_text((folder / "0.py").read_text())
    (folder / "no.txt").write_bytes(b"\xff\xfe no text")
    return folder


@pytest.fixture(scope="module")
def out(folder, tmp_path_factory):
    """Both trained."""
    out = tmp_path_factory.mktemp("twins")
    assert train_twins.main(["train", str(out), "--corpus", str(folder), *SMALL]) == 0
    return out


def test_sizes():
    """A twin whose cache is not an eighth, or that has more than 5 % more parameters."""
    sizes = TwinSizes()
    assert cache_numbers("mha", sizes) == 8 * cache_numbers("latent", sizes)
    counts = [
        parameter_counts(make_twin(kind, TwinSizes(layers=1), 0)) for kind in ("mha", "latent")
    ]
    assert counts[0]["embeddings"] == counts[1]["embeddings"] == 8192 * 1024
    assert 0.99 * counts[0]["all"] < counts[1]["all"] <= counts[0]["all"]


def test_corpus(folder, out):
    """Held-out files in the training text, files twice, tasks that are missing."""
    corpus = read_corpus(out)
    assert corpus.about["files"] + corpus.about["held_out_files"] == 60
    assert 0.05 < corpus.about["task_tokens"] / corpus.about["tokens"] < 0.2
    names = [
        {word for word in corpus.tokenizer.decode(part).split() if word.startswith("file")}
        for part in (corpus.train, corpus.held_out)
    ]
    found = [{name.split("<")[0] for name in part} for part in names]
    assert len(found[0]) == corpus.about["files"]
    assert len(found[1]) == corpus.about["held_out_files"]
    assert not found[0] & found[1]
    lines = (out / "heal.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["text"] in corpus.tokenizer.decode(corpus.train)


def test_both_learn_from_the_same_rows(out, folder, tmp_path, monkeypatch):
    """A twin on other rows than the model, or in another order; a loss that does not fall."""
    document = json.loads((out / "train.json").read_text())
    for kind in ("mha", "latent"):
        curve = [loss for _, loss in document["twins"][kind]["held_out"]]
        assert curve[-1] < curve[0] - 1
    seen: list[torch.Tensor] = []
    step = train.train_step

    def recorded(model, optimizer, rows, *rest):
        seen.append(rows.clone())
        return step(model, optimizer, rows, *rest)

    monkeypatch.setattr(train, "train_step", recorded)
    assert train_twins.main(["train", str(tmp_path), "--corpus", str(folder), *SMALL]) == 0
    assert len(seen) == 40
    assert all(torch.equal(a, b) for a, b in zip(seen[:20], seen[20:], strict=True))
    again = json.loads((tmp_path / "train.json").read_text())
    for kind in ("mha", "latent"):  # and a second run is the same
        assert again["twins"][kind]["held_out"] == document["twins"][kind]["held_out"]


def test_an_interrupted_run_goes_on(out, folder, tmp_path, monkeypatch, capsys):
    """Other weights, moments, rows or schedule after Ctrl-C than without it."""
    step, calls = train.train_step, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 13:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(train, "train_step", interrupted)
    command = ["train", str(tmp_path), "--corpus", str(folder), *SMALL]
    assert train_twins.main(command) == 130
    assert (tmp_path / ".mha").is_dir()
    assert not (tmp_path / "mha").exists()
    assert train_twins.main([*command[:-1], "1024"]) == 2
    assert "held_tokens" in capsys.readouterr().err
    assert train_twins.main([*command, "--only", "mha"]) == 0
    documents = [json.loads((p / "train.json").read_text()) for p in (out, tmp_path)]
    for curve in ("held_out", "train"):
        assert documents[0]["twins"]["mha"][curve] == documents[1]["twins"]["mha"][curve]


def test_time_limit(folder, tmp_path):
    """A run that outlasts --minutes, or that says it is done."""
    command = ["train", str(tmp_path), "--corpus", str(folder), *SMALL]
    assert train_twins.main([*command, "--minutes", "1e-6"]) == 0
    document = json.loads((tmp_path / "train.json").read_text())
    assert not document["twins"]["mha"]["finished"]
    assert document["twins"]["mha"]["tokens"] == 256
    assert (tmp_path / ".mha").is_dir()


@pytest.mark.parametrize("kind", ["mha", "latent"])
def test_folders(kind, out):
    """A folder that gives other logits than were trained, or others through its cache."""
    corpus, sizes = read_corpus(out), run._sizes(out)
    model = load_dense(str(out / kind), dtype=torch.float32)
    loss = train.held_out_loss(model, Rows(corpus.held_out, sizes.context), 512, 4)
    document = json.loads((out / "train.json").read_text())
    assert loss == pytest.approx(document["twins"][kind]["held_out"][-1][1], abs=2e-2)
    ids = corpus.held_out[None, :24].long()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        past = model(ids[:, :20], use_cache=True).past_key_values
        parts = [model(ids[:, i : i + 1], past_key_values=past) for i in range(20, 24)]
    got = torch.cat([part.logits for part in parts], 1)
    assert torch.allclose(got, whole[:, 20:], atol=1e-4)


def test_rows():
    """Rows that overlap, are left out, or come twice in an epoch."""
    rows = Rows(torch.arange(101, dtype=torch.int32), 10, seed=3)
    assert rows.count == 10
    batches = [rows.batch(step, 4) for step in range(5)]
    starts = [int(row[0]) for batch in batches for row in batch]
    assert sorted(starts[:10]) == sorted(starts[10:]) == list(range(0, 100, 10))
    assert starts[:10] != starts[10:]
    assert batches[0].shape == (4, 11)
    assert torch.equal(batches[0][0], torch.arange(starts[0], starts[0] + 11))


def test_tasks():
    """Sums that are asked and were trained on; wrong answers."""
    asked = tasks.questions(5, 2000)
    assert len(asked["copy"]) == 2000
    assert len(asked["addition"]) == 810
    source = tasks.Documents(5)
    lines = {line for _ in range(400) for line in next(source).splitlines()}
    sums = {line.partition("=")[0] for line in lines if "+" in line and "=>" not in line}
    assert len(sums) > 2000
    for question in asked["addition"]:
        left = question.prompt.splitlines()[-1].removesuffix("=")
        assert left not in sums
        assert sum(int(part) for part in left.split("+")) == int(question.answer)
    for question in asked["copy"][:50]:
        assert question.prompt.splitlines()[-1] == f"copy{question.answer} =>"


@pytest.mark.parametrize("wrong", [False, True])
def test_accuracy(wrong, out):
    """Answers that are cut short, read from the wrong place, or counted when they only begin."""
    tokenizer = read_corpus(out).tokenizer
    asked = tasks.questions(0, 30)["copy"]

    class Oracle:
        device = torch.device("cpu")

        def generate(self, input_ids, attention_mask, max_new_tokens, do_sample):
            made = []
            for row, mask in zip(input_ids, attention_mask, strict=True):
                prompt = tokenizer.decode(row[mask.bool()][1:])
                own = next(q for q in asked if q.prompt == prompt)
                text = own.answer + ("x" if wrong else "") + "\ncopy more"
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                made.append([*row.tolist(), *(ids + [1] * 60)[:60]])
            return torch.tensor(made)

    found = accuracy(Oracle(), tokenizer, asked, 60)
    assert found["correct"] == (0 if wrong else 30)


def test_judge(out, capsys):
    """A document without the ratio, or whose loss is not the folder's."""
    command = ["judge", str(out), str(out / "mha"), str(out / "latent"), "--json"]
    assert train_twins.main([*command, "--questions", "4", "--tokens", "512"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    trained = json.loads((out / "train.json").read_text())["twins"]
    for kind, found in document["folders"].items():
        assert found["loss"] == pytest.approx(trained[kind]["held_out"][-1][1], abs=2e-2)
        assert found["loss_ratio"] == found["loss"] / document["folders"]["mha"]["loss"]
        assert found["tasks"]["addition"]["asked"] == 4


def test_times(out, capsys):
    """A cache that is not of the context, a method that is left out."""
    command = ["times", str(out), "--contexts", "40", "--batches", "2", "--repeats", "2"]
    assert train_twins.main([*command, "--step-tokens", "80", "--json"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["train"]["40"]["latent"]["rows"] == 2
    decode = document["decode"]["2x40"]
    assert decode["static"]["cache_bytes"] == 8 * decode["latent"]["cache_bytes"]


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["train", "{new}", "--corpus", "{out}/nothing"], "no such folder"),
        (["train", "{new}", "--corpus", "{out}/tokenizer"], "different text files"),
        (["train", "{out}", "--corpus", "{folder}", "--vocab-size", "500"], "vocab_size=400"),
        (["train", "{out}", "--corpus", "{folder}", *SMALL, "--seed", "1"], "seed=0, got 1"),
        (["train", "{new}", "--corpus", "{folder}", *SMALL, "--heads", "4"], "heads=4"),
        (["train", "{new}", "--corpus", "{folder}", "--tokens", "100"], "tokens=100"),
        (["train", "{new}", "--tokens", "x"], "wanted an integer"),
        (["judge", "{folder}", "{out}/mha"], "no corpus.json"),
        (["times", "{folder}"], "no train.json"),
    ],
)
def test_mistakes_get_one_line(argv, match, out, folder, tmp_path, capsys):
    given = [a.format(new=tmp_path / "new", out=out, folder=folder) for a in argv]
    try:
        code = train_twins.main(given)
    except SystemExit as error:
        code = error.code
    assert code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert match in lines[-1]
    assert "Traceback" not in "".join(lines)


def test_loss_that_explodes(out):
    """Training that goes on with NaN."""
    corpus, sizes = read_corpus(out), run._sizes(out)
    model = make_twin("latent", sizes, 0)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    options = TrainOptions(5120, 32, 256, 128, held_tokens=512, compiled=False)
    rows = Rows(corpus.train, 32)
    training = train.Training(model, rows, rows, options, out / ".x", SETTINGS)
    with pytest.raises(FlashHeadError, match="lower --rate"):
        training.run(bar=False)


def test_corpus_is_made_once(folder, out):
    """A corpus that is tokenised again in every run."""
    started = time.perf_counter()
    settings = json.loads((out / "corpus.json").read_text())["settings"]
    load_corpus(out, CorpusOptions(**{**settings, "folders": tuple(settings["folders"])}))
    assert time.perf_counter() - started < 2
