"""Questions, scores and kept answers, without a model."""

import csv
import json
import math

import numpy as np
import pytest

from flashhead.errors import FlashHeadError
from flashhead.evaluate.suite import data, paired, probes
from flashhead.evaluate.suite.answers import Answers
from flashhead.evaluate.suite.fidelity import generations


def write_data(folder, questions: int = 12) -> None:
    """The data sets of the tasks, small."""
    (folder / "mmlu").mkdir()
    for subject in ("tiny_things", "large_things"):
        with (folder / "mmlu" / f"{subject}_test.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["question", "A", "B", "C", "D", "answer"])
            for i in range(questions):
                rows.writerow([f"{subject} {i}, which?", "w3", "w4", "w5", "w6", i % 4])
    lines = [
        {"question": f"What is {i} and {i}?", "answer": f"It is <<{i}+{i}>>.\n#### {2 * i}"}
        for i in range(questions)
    ]
    (folder / "gsm8k-train.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    words = " ".join(f"w{3 + (7 * i) % 500}" for i in range(192 * questions))
    (folder / "wikitext2-valid.txt").write_text(words)


def test_questions_are_drawn_by_the_seed_and_never_among_their_examples(tmp_path):
    """Catches an answer that stands in the prompt, and a draw that ignores the seed."""
    write_data(tmp_path)
    docs, skipped = data.mmlu(tmp_path, 8, 0)
    assert (len(docs), skipped) == (8, 0)
    assert docs == data.mmlu(tmp_path, 8, 0)[0] != data.mmlu(tmp_path, 8, 1)[0]
    for doc in docs:
        asked = doc["prompt"].rsplit("\n\n", 1)[1].split("\n")[0]
        assert doc["prompt"].count(asked) == 1
        assert doc["prompt"].count("Answer:") == data.MMLU_SHOTS + 1
        assert doc["prompt"].endswith("Answer:")
        assert doc["gold"] == int(asked.split()[1].rstrip(",")) % 4
    problems = data.gsm8k(tmp_path, 5, 0)
    assert [int(p["target"]) % 2 for p in problems] == [0] * 5
    assert all(p["prompt"].count("####") == data.GSM8K_SHOTS for p in problems)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("So it is 12.\n#### 1,234", "1234"),
        ("#### -7 and 9", "-7"),
        ("first 3 then 4.50", "4.5"),
        ("10", "10"),
        ("none", None),
        ("#### none, 5", "5"),
    ],
)
def test_last_number(text, number):
    """Catches commas, signs, trailing zeros and a mark without a number."""
    assert data.last_number(text) == number


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("mmlu/tiny_things_test.csv", "q,a,b\n" * 30, "row 1: wanted question, A, B"),
        ("mmlu/tiny_things_test.csv", "q,a,b,c,d,7\n" * 30, "row 1: wanted question"),
        ("mmlu/tiny_things_test.csv", "q,a,b,c,d,1\n", "has 1 rows, wanted 6"),
        ("mmlu/tiny_things_test.csv", b"\xff\xfe\x00", "cannot be read"),
        ("gsm8k-train.jsonl", "{}\n", "line 1: wanted an object with question, answer"),
        ("gsm8k-train.jsonl", "not json\n", "line 1: wanted"),
        ("gsm8k-train.jsonl", "", "is empty"),
        ("wikitext2-valid.txt", "too short", "2 words"),
        ("HumanEval.jsonl.gz", b"not gzip", "cannot be read"),
    ],
)
def test_malformed_data_is_one_line(tmp_path, file, text, message):
    """Catches a traceback, and a file that is half understood."""
    write_data(tmp_path)
    raw = text if isinstance(text, bytes) else text.encode()
    (tmp_path / file).write_bytes(raw)
    readers = {"mmlu": data.mmlu, "gsm8k": data.gsm8k, "wiki": data.wikitext, "Hum": data.humaneval}
    reader = next(read for name, read in readers.items() if file.startswith(name))
    with pytest.raises(FlashHeadError, match=message) as caught:
        reader(tmp_path, 4, 0)
    assert "\n" not in str(caught.value)


def test_a_broken_row_of_many_is_left_out_and_counted(tmp_path):
    """Catches the real copy's unbalanced quotation marks, and rows that vanish unsaid."""
    write_data(tmp_path, questions=40)
    file = tmp_path / "mmlu" / "tiny_things_test.csv"
    file.write_text(file.read_text() + "torn, row,w3,w4,w5,w6,1\n")
    assert data.mmlu(tmp_path, 4, 0)[1] == 1


@pytest.mark.parametrize("name", probes.PROBES)
def test_probes_fill_their_context_and_hold_their_answer(name):
    """Catches a document that is too long or much too short, an answer that is not in it, and a
    question that comes twice."""

    def count(text: str) -> int:
        return len(text.split())

    docs = probes.probe(name, (256, 1024), 50, 3, count)
    assert docs == probes.probe(name, (256, 1024), 50, 3, count)
    assert len(docs) == 50
    assert [d["context"] for d in docs].count(256) == 25
    assert len({d["prompt"] for d in docs}) == 50
    for doc in docs:
        length = count(doc["prompt"])
        assert 0.9 * doc["context"] <= length <= doc["context"]
        if name == "addition":
            a, b = doc["prompt"].split("\n")[-1].rstrip(" =").split(" + ")
            assert int(a) + int(b) == int(doc["target"])
        else:
            assert doc["target"] in doc["prompt"]
    assert len({d["group"] for d in docs}) == 4


def test_probe_context_too_short():
    """Catches an endless search for a document that fits."""
    with pytest.raises(FlashHeadError, match="wanted 256 tokens or more"):
        probes.probe("needle", (16,), 4, 0, len)


def test_paired_errors_and_interval():
    """Catches errors of unpaired scores, questions of a document taken as independent, and an
    interval of something else than the difference."""
    rng = np.random.default_rng(0)
    base = rng.random(400) < 0.5
    value = base.copy()
    value[:20] = ~value[:20]
    row = paired.compare(base.tolist(), value.tolist(), list(range(400)), 0)
    assert row["difference"] == pytest.approx(float(value.mean() - base.mean()))
    assert row["stderr"] == pytest.approx(value.std(ddof=1) / 20, rel=1e-9)
    gaps = value.astype(float) - base
    assert row["difference_stderr"] == pytest.approx(gaps.std(ddof=1) / 20, rel=1e-9)
    low, high = row["interval"]
    assert low <= row["difference"] <= high
    assert (high - low) / 2 == pytest.approx(1.96 * row["difference_stderr"], rel=0.15)
    # the same answers, each five times: five times as many questions, and no more knowledge
    several = paired.compare(
        np.repeat(base, 5).tolist(), np.repeat(value, 5).tolist(), np.repeat(range(400), 5), 0
    )
    assert several["stderr"] == pytest.approx(row["stderr"], rel=1e-9)
    assert paired.compare([0.0, 1.0], [1.0, 1.0], ["a", "a"], 0)["interval"] is None
    assert paired.compare([0.0, 1.0], [1.0, 1.0], ["a", "a"], 0)["stderr"] is None


def test_paired_ratio_of_perplexities():
    """Catches a mean of perplexities, and windows that are not weighted by their tokens."""
    nll, tokens = np.array([2.0, 3.0, 4.0]), np.array([10.0, 20.0, 70.0])
    row = paired.compare(
        nll.tolist(), (nll + 0.1).tolist(), [0, 1, 2], 0, weights=tokens.tolist(), exponential=True
    )
    assert row["base"] == pytest.approx(math.exp(nll @ tokens / 100))
    assert row["ratio"] == pytest.approx(math.exp(0.1))
    assert row["interval"] == pytest.approx([math.exp(0.1)] * 2)


def test_token_agreement_counts_positions_of_the_longer_answer():
    """Catches an answer that ends early counted as identical."""
    base = [{"tokens": [1, 2, 3, 4]}, {"tokens": [5, 6]}, {"tokens": [7]}]
    value = [{"tokens": [1, 2, 9, 4]}, {"tokens": [5]}, {"tokens": [7]}]
    row = generations(base, value)
    assert (row["tokens"], row["identical_tokens"]) == (7, 5)
    assert row["identical_answers"] == 1
    assert row["first_divergence"] == {"earliest": 1, "mean": 1.5}


def test_kept_answers_survive_a_torn_line_and_not_a_changed_one(tmp_path):
    """Catches a figure that rests on an edited file, and a run that Ctrl-C made useless."""
    path = tmp_path / "kept" / "task.jsonl"
    answers = Answers(path, "model", resume=True)
    answers.add("a", {"tokens": [1]})
    answers.add("b", {"tokens": [2]})
    answers.close()
    whole = path.read_text()
    path.write_text(whole + whole[:25])
    again = Answers(path, "model", resume=True)
    assert again.known == {"a": {"tokens": [1]}, "b": {"tokens": [2]}}
    again.add("c", {"tokens": [3]})
    again.close()
    assert len(Answers(path, "model", resume=True).known) == 3
    assert Answers(tmp_path / "no.jsonl", "model", resume=True).known == {}
    for broken in (whole.replace("[2]", "[3]"), whole.replace('"b"', '"d"'), "{}\n", "junk\n"):
        path.write_text(broken)
        with pytest.raises(FlashHeadError, match=r"task.jsonl, line \d: changed"):
            Answers(path, "model", resume=True)
    path.write_text(whole)
    with pytest.raises(FlashHeadError, match="of another model"):
        Answers(path, "other", resume=True)
    assert Answers(path, "other", resume=False).known == {}
