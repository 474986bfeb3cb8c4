"""Verdicts on a served head, on answers made up here, and the command with engines made up here."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from flashhead.cli import eval_vllm, main
from flashhead.evaluate.answers import bf16_step, with_logits
from flashhead.evaluate.features import Feature, Request, all_features, choose
from flashhead.evaluate.served import (
    Row,
    format_table,
    judge,
    two_sample_p,
    with_distribution,
)

GREEDY = {"temperature": 0.0, "max_tokens": 4}
SEEDED = {"temperature": 1.0, "max_tokens": 40, "seed": 1}
DENSE_TEXT, FLASH_TEXT = [5, 6, 7, 8], [5, 6, 9, 1]
"""They differ at position 2."""


def output(tokens: list[int], logprobs: Any = None, finish: str = "length") -> dict[str, Any]:
    return {"tokens": tokens, "text": "", "finish": finish, "logprobs": logprobs}


def request(*outputs: dict[str, Any], **more: Any) -> dict[str, Any]:
    shared = {"prompt_tokens": 6, "cached_tokens": 0, "prompt_logprobs": None}
    return {**shared, "outputs": list(outputs), **more}


def answers(*rounds: list[dict[str, Any]], searched: int = 4, dense: int = 0) -> dict[str, Any]:
    counted = {"searched_rows": searched, "dense_rows": dense, "seconds": 1.0}
    return {"rounds": list(rounds), "refused": None, **counted}


def text(tokens: list[int], **counted: int) -> dict[str, Any]:
    return answers([request(output(tokens))], **counted)


def again(gap: float, tokens: list[int] = DENSE_TEXT, flash: int = 9) -> dict[str, Any]:
    """The dense head once more: its logit at the difference is 20, FlashHead's token `gap` below"""
    logits = [[[token, 20.0], [flash, 20.0 - gap]] for token in tokens]
    return answers([request(output(tokens, logits))])


def greedy(**changes: Any) -> Feature:
    return Feature(
        **({"name": "greedy", "head": "search"} | {"requests": (Request("a", GREEDY),)} | changes)
    )


def test_equal_tokens_are_equal() -> None:
    """Catches a third engine that nothing asks for."""
    row = judge(greedy(), text(DENSE_TEXT), text(DENSE_TEXT))
    assert (row.verdict, row.failures, row.identical, row.tokens) == ("equal", (), 4, 4)
    assert with_logits(greedy(), text(DENSE_TEXT), text(DENSE_TEXT)) is None


@pytest.mark.parametrize("gap", [0.0, 0.125])
def test_a_tie_is_listed_and_no_failure(gap: float) -> None:
    """Catches an honest tie that fails, or that nobody is told of: at 20 a bf16 step is 1/8."""
    row = judge(greedy(), text(DENSE_TEXT), text(FLASH_TEXT), again(gap))
    assert (row.verdict, row.failures, row.identical) == ("ties (1 listed)", (), 2)
    found = row.differences[0]
    assert (found.position, found.dense, found.flash) == (2, 7, 9)
    assert (found.kind, found.gap, found.step) == ("tie", gap, 0.125)


@pytest.mark.parametrize(
    "logits",
    [
        again(0.25),
        again(0.0, flash=10),
        again(0.0, tokens=[5, 6, 4, 8]),
        None,
    ],
    ids=["two steps", "not among the best", "not repeated", "not run"],
)
def test_any_other_difference_is_wrong(logits: dict[str, Any] | None) -> None:
    """Catches a wrong token that passes for a tie."""
    row = judge(greedy(), text(DENSE_TEXT), text(FLASH_TEXT), logits)
    assert (row.verdict, row.failures) == ("differs", ("1 outputs differ",))


def test_an_answer_that_ends_early_is_wrong() -> None:
    """Catches a comparison of the shorter length only, and of tokens without their end."""
    row = judge(greedy(), text(DENSE_TEXT), text(DENSE_TEXT[:2]), again(0.0))
    assert row.failures == ("1 outputs differ",)
    stopped = answers([request(output(DENSE_TEXT, finish="stop"))])
    assert judge(greedy(), text(DENSE_TEXT), stopped, again(0.0)).verdict == "differs"


def test_dense_rows_have_no_ties() -> None:
    """Catches a penalty that one of the heads ignores, excused as a tie."""
    feature = greedy(head="dense")
    flash = text(FLASH_TEXT, searched=0, dense=4)
    assert judge(feature, text(DENSE_TEXT), flash, again(0.0)).verdict == "differs"
    assert with_logits(feature, text(DENSE_TEXT), flash) is None


@pytest.mark.parametrize(
    ("head", "searched", "dense", "all_searchable", "failures"),
    [
        ("search", 4, 0, True, ()),
        ("search", 0, 4, True, ("no row was searched", "4 rows dense, wanted none")),
        ("search", 3, 1, True, ("1 rows dense, wanted none",)),
        ("search", 3, 1, False, ()),
        ("search", 0, 4, False, ("no row was searched",)),
        ("dense", 0, 4, True, ()),
        ("dense", 1, 3, True, ("1 rows searched, wanted none",)),
        ("mixed", 2, 2, True, ()),
        ("mixed", 4, 0, True, ("no row was dense",)),
        ("mixed", 0, 4, True, ("no row was searched",)),
    ],
)
def test_a_path_that_was_not_taken_is_a_failure(
    head: Any, searched: int, dense: int, all_searchable: bool, failures: tuple[str, ...]
) -> None:
    """Catches a matrix that passes because the dense head answered everything."""
    flash = text(DENSE_TEXT, searched=searched, dense=dense)
    row = judge(greedy(head=head), text(DENSE_TEXT), flash, all_searchable=all_searchable)
    assert row.failures == failures
    assert ("FAILED" in format_table([row])) == bool(failures)


@pytest.mark.parametrize(("error", "passes"), [(0.005, True), (0.02, False)])
@pytest.mark.parametrize("place", ["prompt", "output"])
def test_log_probabilities_are_compared(error: float, passes: bool, place: str) -> None:
    """Catches prompts left out, and errors where only the ranks agree."""

    def listed(shift: float) -> dict[str, Any]:
        pairs: list[Any] = [[[5, -1.0], [6, -2.0 + shift]]] * 4
        if place == "prompt":
            return request(output(DENSE_TEXT), prompt_logprobs=[[], *pairs])
        return request(output(DENSE_TEXT, pairs))

    row = judge(
        greedy(head="dense"),
        answers([listed(0.0)]),
        answers([listed(error)], searched=0, dense=4),
    )
    assert row.logprob_error == pytest.approx(error)
    assert bool(row.failures) != passes
    assert row.verdict == ("equal" if passes else "differs")


def drawn(equal: int) -> Row:
    """A seeded request whose draws part after so many tokens."""
    texts = [[1] * 40, [1] * equal + [2] * (40 - equal)]
    feature = greedy(requests=(Request("a", SEEDED),))
    assert with_logits(feature, text(texts[0]), text(texts[1])) is None
    return judge(feature, text(texts[0]), text(texts[1]))


def test_draws_part_now_and_then() -> None:
    """Catches a sampler that ignores a filter, and one that is blamed for rounding."""
    row = drawn(30)
    assert (row.verdict, row.failures) == ("close (1 apart)", ())
    assert drawn(3).verdict == "differs"
    fits = dataclasses.replace(row, p_values=(0.5,), differences=())
    misfits = dataclasses.replace(fits, p_values=(0.5, 1e-4))
    assert with_distribution([row, fits]) == [row, fits]
    assert with_distribution([row, misfits])[0].verdict == "differs"
    assert with_distribution([row, misfits])[0].failures


def test_checks_beyond_equal_answers() -> None:
    """Catches a seed that repeats nothing, a cache that is off, a prompt that fits one step."""
    seeds = greedy(requests=(Request("a", SEEDED),), rounds=2, check="repeats")
    same = answers([request(output([1, 2]))], [request(output([1, 2]))])
    other = answers([request(output([1, 2]))], [request(output([1, 3]))])
    assert judge(seeds, same, same).failures == ()
    assert "a seed did not repeat its tokens" in judge(seeds, other, other).failures
    caches = greedy(rounds=2, check="caches")
    assert judge(caches, same, same).failures == ("nothing was read from the prefix cache",)
    warm = answers(same["rounds"][0], [request(output([1, 2]), cached_tokens=128)])
    assert judge(caches, same, warm).failures == ()
    chunks = greedy(check="chunks")
    one = text(DENSE_TEXT)
    assert judge(chunks, one, one, most_tokens=6).failures == (
        "prompts of 6 tokens are one chunk of 6",
    )
    assert judge(chunks, one, one, most_tokens=5).failures == ()


def test_a_refusal_is_a_failure() -> None:
    """Catches a feature that passes because neither engine takes it."""
    refused = {**answers(), "refused": "no such backend"}
    row = judge(greedy(), refused, refused)
    assert row.verdict == "refused"
    assert row.failures[0] == "refused by the engine of the dense head: no such backend"
    assert with_logits(greedy(), refused, refused) is None


def test_bf16_steps_are_torchs() -> None:
    """Catches a step that is off by one power of two."""
    for value in (1.0, 1.9, 2.0, -3.0, 20.0, 127.0, 128.0, 0.3):
        number = torch.tensor(abs(value)).bfloat16()
        bits = number.view(torch.int16) + 1
        assert bf16_step(value) == float(bits.view(torch.bfloat16)) - float(number)


def test_two_samples_of_one_source_fit() -> None:
    """Catches expected counts of one sample for both, and a wrong number of degrees of freedom."""
    a, b = [0] * 60 + [1] * 40, [0] * 45 + [1] * 55
    expected = 2 * (60 - 52.5) ** 2 / 52.5 + 2 * (40 - 47.5) ** 2 / 47.5
    assert two_sample_p(a, b) == pytest.approx(math.erfc(math.sqrt(expected / 2)), rel=1e-9)
    assert two_sample_p(a, a) == 1
    generator = torch.Generator().manual_seed(0)
    shares = torch.arange(1, 301).float().reciprocal()

    def draw(shares: torch.Tensor, count: int = 2000) -> list[int]:
        drawn = torch.multinomial(shares, count, replacement=True, generator=generator)
        return [int(token) for token in drawn]

    p_values = torch.tensor([two_sample_p(draw(shares), draw(shares)) for _ in range(200)])
    assert 0.4 < float(p_values.mean()) < 0.6
    assert float((p_values < 0.05).double().mean()) < 0.12
    assert two_sample_p(draw(shares), draw(shares.square())) < 1e-6
    assert two_sample_p(draw(shares), draw(shares[:50], 1000)) < 1e-6


def test_a_distribution_is_judged_prompt_by_prompt() -> None:
    """Catches prompts that are pooled: the second one's draws are the first one's here."""
    requests = tuple(Request(prompt, SEEDED) for prompt in "abab")
    feature = greedy(name="drawn", requests=requests, check="distribution")

    def sample(*tokens: int) -> dict[str, Any]:
        return answers([request(*[output([token])] * 100) for token in tokens])

    row = judge(feature, sample(1, 2, 1, 2), sample(1, 2, 1, 2))
    assert (row.failures, row.p_values, row.identical) == ((), (1.0, 1.0), None)
    row = judge(feature, sample(1, 2, 1, 2), sample(2, 1, 2, 1))
    assert max(row.p_values) < 1e-6
    assert row.failures
    assert row.verdict.startswith("differs (p = ")


def test_features_are_plain_values_with_names_of_their_own() -> None:
    """Catches a feature that a job file cannot hold, or that `--features` cannot name."""
    features = all_features(64)
    names = [feature.name for feature in features]
    assert len(set(names)) == len(names)
    assert not any(set(name) & set(" ,") for name in names)
    values = [dataclasses.asdict(feature) for feature in features]
    assert json.loads(json.dumps(values))[0]["requests"][0] == values[0]["requests"][0]
    assert [feature.name for feature in choose(features, ["top-k", "greedy", "top-k"])] == [
        "top-k",
        "greedy",
    ]
    for feature in features:
        if feature.head == "search":  # every logit counts for these
            for wants in ("logprobs", "structured_outputs", "min_tokens", "biased_tokens"):
                assert not any(wants in each.params for each in feature.requests)


class Engines:
    """Stands in for the child processes: FlashHead's greedy answers differ where the logits tie."""

    def __init__(self, searched: int, gap: float = 0.0) -> None:
        self.searched, self.gap = searched, gap
        self.jobs: list[dict[str, Any]] = []

    def run(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        job = json.loads(Path(command[-1]).read_text())
        enabled = environment["FLASHHEAD_ENABLED"] == "1"
        self.jobs.append(job | {"enabled": enabled})
        if name == "dense logits":
            found = again(self.gap)
        elif enabled:
            found = text(FLASH_TEXT, searched=self.searched, dense=4 - self.searched)
        else:
            found = text(DENSE_TEXT, searched=0)
        heads = [{"crossover_rows": 16, "token_crossover_rows": 16}] if enabled else []
        features = {feature["name"]: found for feature in job["features"]}
        answer = {"vllm": "0", "features": features, "heads": heads, "seconds": 1.0}
        Path(job["answer"]).write_text(json.dumps(answer))


@pytest.fixture
def engines(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Engines:
    made = Engines(*request.param)
    monkeypatch.setattr("flashhead.cli.child.run_child", made.run)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("flashhead.evaluate.features.all_features", lambda tokens: (greedy(),))
    return made


@pytest.mark.parametrize("engines", [(4,)], indirect=True)
def test_the_command_passes_with_ties(
    engines: Engines, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches engines in the wrong order, or with FlashHead where the dense head should be."""
    assert main(["eval", "vllm", "--model", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["passed"]
    assert document["features"][0]["verdict"] == "ties (1 listed)"
    assert document["features"][0]["differences"][0]["gap"] == 0
    assert [job["enabled"] for job in engines.jobs] == [False, True, False]
    assert engines.jobs[0]["engine"]["seed"] != engines.jobs[1]["engine"]["seed"]
    assert engines.jobs[0]["engine"]["seed"] == engines.jobs[2]["engine"]["seed"]
    assert engines.jobs[2]["engine"]["logprobs_mode"] == "raw_logits"
    assert engines.jobs[2]["features"][0]["requests"][0]["params"]["logprobs"] == 5


@pytest.mark.parametrize(
    ("engines", "told"),
    [((0,), "no row was searched"), ((4, 0.25), "1 outputs differ")],
    indirect=["engines"],
)
def test_the_command_fails_after_the_table(
    engines: Engines, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a failure that shows nothing, or that CI does not see."""
    out = tmp_path / "out.json"
    assert main(["eval", "vllm", "--model", str(tmp_path), "--out", str(out)]) == 2
    printed = capsys.readouterr()
    assert f"greedy: {told}" in printed.out
    assert "1 of 1 features fail: greedy" in printed.err
    assert json.loads(out.read_text())["failed"] == ["greedy"]


def test_arguments_of_the_engines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches --extra that undoes more than it names, and one that the command relies on."""
    given = {"max_num_seqs": 4, "hf_overrides": {"flashhead_options": {"bits": 2}}}
    arguments = eval_vllm.engine_arguments(given)
    assert arguments["max_num_seqs"] == 4
    assert arguments["max_model_len"] == 1024
    assert arguments["hf_overrides"] == {"flashhead_options": {"crossover": 16, "bits": 2}}
    for extra, wanted in (("[]", "wanted a JSON object"), ('{"seed": 1}', "not for --extra")):
        with pytest.raises(SystemExit):
            main(["eval", "vllm", "--model", str(tmp_path), "--extra", extra])
        assert wanted in capsys.readouterr().err


def test_without_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback where a line of advice is wanted."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["eval", "vllm", "--model", str(tmp_path)]) == 2
    assert "pip install 'flashhead[vllm]'" in capsys.readouterr().err
