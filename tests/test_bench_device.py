"""The benchmark on a device, as far as a CPU goes: what it times is made, checked and told right.

Graphs and their times need a GPU; here calls run one by one and a clock is made up.
"""

import json
import math

import pytest
import torch

from flashhead.bench import device_products, device_timing
from flashhead.bench.device_head import bench_device, states_needed
from flashhead.bench.device_lines import BASELINE, COMPLETE, GREEDY, SAMPLE
from flashhead.bench.device_table import format_device_table
from flashhead.bench.device_timing import Captured, copies_needed
from flashhead.bench.device_verify import (
    Truth,
    check_tokens,
    check_winners,
    int8_kl,
    kl_divergence,
    reference_noise,
    require_kl,
    truth_of,
)
from flashhead.bench.synthetic import make_problem
from flashhead.errors import FlashHeadError
from flashhead.index.build_codes import build_codes
from flashhead.options import CodesOptions


@pytest.fixture(scope="module")
def problem():
    return make_problem("tiny", (2050, 96), states=264, calibration=512)


def yes(count):
    return torch.ones(count, dtype=torch.bool)


def test_wrong_token_is_found(problem):
    """Catches a check that a wrong certificate passes, one that no head can pass because of ties,
    and an index that points outside the vocabulary.
    """
    truth = truth_of(problem.hidden, problem.weight)
    tokens = truth.logits.argmax(1)
    counted = check_tokens("x", tokens, yes(264), truth)
    assert counted == {"agreement": 1, "certified_fraction": 1}
    wrong = tokens.clone()
    wrong[5] = (wrong[5] + 1) % 2050
    with pytest.raises(RuntimeError, match="x, hidden state 5: certified token"):
        check_tokens("x", wrong, yes(264), truth)
    assert check_tokens("x", wrong, ~yes(264), truth)["agreement"] == 263 / 264
    wrong[5] = 2050
    with pytest.raises(RuntimeError, match="token 2050 does not exist"):
        check_tokens("x", wrong, ~yes(264), truth)
    tie = Truth(torch.tensor([[1.0, 1.0 + 1e-9, 0.0]], dtype=torch.float64), 1e-8)
    assert check_tokens("x", torch.tensor([0]), yes(1), tie)["agreement"] == 1


def test_wrong_draw_is_found(problem):
    """Catches noise of another step, and a draw that is compared with the greedy token."""
    hidden = problem.hidden[:8]
    truth = truth_of(hidden, problem.weight)
    noise = reference_noise(7, torch.arange(8), 2050)
    tokens = (truth.logits.float() + noise).argmax(1)
    check_tokens("x", tokens, yes(8), truth, noise, 1.0)
    with pytest.raises(RuntimeError, match="certified"):
        check_tokens("x", tokens, yes(8), truth, noise.roll(1, 0), 1.0)


def test_wrong_logits_are_found(problem):
    """Catches a winner that is not exact, one that is another, and a KL that is never looked at."""
    truth = truth_of(problem.hidden[:8], problem.weight)
    logits = truth.logits.float()
    check_winners("x", logits, truth)
    with pytest.raises(RuntimeError, match="its own off by"):
        check_winners("x", logits + 0.01, truth)
    best = logits.argmax(1, keepdim=True)
    with pytest.raises(RuntimeError, match="the best logit is of token"):
        check_winners("x", logits.scatter(1, best, -100.0), truth)
    with pytest.raises(RuntimeError, match="NaN"):
        check_winners("x", logits * math.nan, truth)
    assert kl_divergence(truth.logits, logits).abs().max() < 1e-6
    assert kl_divergence(truth.logits, logits * 1.01).min() > 0
    require_kl("x", 0.1, 0.1)
    for wrong in (0.2, math.nan):
        with pytest.raises(RuntimeError, match="KL is"):
            require_kl("x", wrong, 0.1)
    assert 0 < int8_kl(problem.hidden[:8], problem.weight, truth) < 0.1


def test_rotation_does_not_fit_the_cache():
    """Catches a head of which the L2 cache holds half."""
    for size in (1, 10, 49, 50, 51, 200):
        copies = copies_needed(size, 50)
        assert copies >= 2
        assert copies * size > 100


@pytest.fixture
def no_device(monkeypatch):
    """Graphs that are calls, times that are made up; quantised products are those of the CPU."""

    def capture(call, calls, keep=False):
        kept = [call(number) for number in range(calls)]
        return Captured(None, calls, kept if keep else [])

    def time_graphs(graphs, baseline, rounds):
        names = ("median_us", "p10_us", "p90_us", "ratio", "ratio_p10", "ratio_p90")
        return {name: dict.fromkeys(names, 1.0 + i) for i, name in enumerate(graphs)}

    monkeypatch.setattr(device_timing, "capture", capture)
    monkeypatch.setattr(device_timing, "time_graphs", time_graphs)
    monkeypatch.setattr(device_timing, "quick_us", lambda call: 1.0)
    monkeypatch.setattr(device_products, "quick_us", lambda call: 1.0)
    alone = {"python_us": 3.0, "host_us": 2.0}
    monkeypatch.setattr(device_timing, "time_from_python", lambda call: alone)
    monkeypatch.setattr(device_timing, "copy_bytes_per_sec", lambda: 1e12)
    monkeypatch.setattr(device_timing, "l2_bytes", lambda: 20_000)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda run, **_: run)


def test_document(problem, no_device, monkeypatch):
    """Catches a method or a batch left out without a word, figures that are no numbers, published
    clusters whose accuracy on made-up rows looks measured.
    """
    document = bench_device(problem, batches=(1, 3), skip=("fp8", "int4"), repeats=2)
    document = json.loads(json.dumps(document, allow_nan=False))
    names = [BASELINE, "bf16 F.linear", "int8 weight-only + argmax"]
    names += [f"clusters (published), P = {probes}" for probes in (256, 512)]
    names += [GREEDY, SAMPLE, COMPLETE]
    got = [(row["batch"], row["method"]) for row in document["rows"]]
    assert sorted(got) == sorted((batch, name) for batch in (1, 3) for name in names)
    rows = {(row["batch"], row["method"]): row for row in document["rows"]}
    assert rows[1, GREEDY]["agreement"] == rows[3, SAMPLE]["agreement"] == 1
    assert rows[1, GREEDY]["certified_fraction"] == 1
    assert 0 < rows[1, GREEDY]["bytes_read"] < rows[3, GREEDY]["bytes_read"]
    assert rows[1, BASELINE]["bytes_read"] == 2050 * 96 * 2
    assert rows[1, BASELINE]["floor_us"] == pytest.approx(0.39, abs=0.01)
    assert rows[1, GREEDY]["calls"] >= rows[1, GREEDY]["copies"] >= 2
    assert document["rows_are"] == "synthetic"
    assert not document["clusters"]["agreement_means_something"]
    table = format_device_table(document)
    assert "synthetic rows" in table
    assert "agreement is meaningless" in table
    assert table.count(GREEDY) == 2
    real = document | {"rows_are": "real", "clusters": None}
    assert "meaningless" not in format_device_table(real)


def test_what_cannot_run_is_told(problem, no_device):
    """Catches a baseline that is missing without a reason: the CPU has no CUDA int4 product."""
    document = bench_device(problem, batches=(1,), skip=("flashhead", "clusters", "int8", "fp8"))
    (left_out,) = document["left_out"]
    assert (left_out["batch"], left_out["method"]) == (1, "int4")
    assert left_out["reasons"][0] in format_device_table(document)


def test_wrong_graph_is_not_timed(problem, no_device, monkeypatch):
    """Catches times of a graph whose tokens differ from those of the calls that were checked."""
    right = device_timing.capture

    def wrong(call, calls, keep=False):
        captured = right(call, calls, keep)
        return Captured(None, calls, [(token + 1) % 2050 for token in captured.tokens])

    monkeypatch.setattr(device_timing, "capture", wrong)
    with pytest.raises(RuntimeError, match="certified token"):
        bench_device(problem, batches=(1,), skip=("int8", "fp8", "int4", "clusters"))


def test_bench_refuses(problem):
    """Catches a benchmark of fewer hidden states than it says it was verified with."""
    assert states_needed((1, 64)) == 320
    for options in ({"batches": (128,)}, {"batches": ()}, {"repeats": 0}):
        with pytest.raises(FlashHeadError, match="wanted"):
            bench_device(problem, **options)


def test_fp8_codes_stand_for_the_weight(problem):
    """Catches a scale that is divided by twice, or one scale where each row has its own."""
    quantised = device_products.quantise("fp8", problem.weight)
    assert (len(quantised.codes), quantised.reasons) == (2, [])
    for codes in quantised.codes:
        error = (codes.rows - problem.weight.float()).norm() / problem.weight.float().norm()
        assert error < 0.04  # three bits of fraction
        hidden = problem.hidden[:3]
        assert (codes.seen(hidden) - hidden.float()).norm() < 0.04 * hidden.float().norm()


def test_index_lies_where_its_weight_does(problem):
    """Catches a build that leaves a tensor on another device than its weight."""
    index = build_codes(problem.weight, CodesOptions(), problem.calibration)
    assert {tensor.device for tensor in index.tensors().values()} == {problem.weight.device}
