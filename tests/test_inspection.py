"""Whether a head suits: figures against slow ones, and a verdict for heads that are known."""

import dataclasses
import json

import pytest
import torch
from conftest import clustered_head
from test_error_model import with_sigma
from torch import nn

from flashhead.cli import main
from flashhead.errors import FlashHeadError
from flashhead.evaluate.estimates import estimate_chunks
from flashhead.evaluate.inspection import DATA, SAMPLE_POSITIONS, inspect_head, text_windows
from flashhead.evaluate.recall import DEPTHS, cluster_ranks, depth_for, recall_at, winner_ranks
from flashhead.evaluate.samples import NAMES, load_samples
from flashhead.evaluate.text import scored_positions
from flashhead.evaluate.verdict import LEAST_SPEEDUP, Evidence, judge
from flashhead.evaluate.vocabulary import PERCENTILES, vocabulary
from flashhead.index.build_clusters import build_clusters
from flashhead.index.build_codes import build_codes
from flashhead.ledger.tokens import Ledger
from flashhead.nn.head import FlashHead
from flashhead.nn.search import search_clusters
from flashhead.options import ClustersOptions, CodesOptions

GOOD = Evidence([], 0, 0.15, 0.6, 2.0, 4)


def flash_head(weight, hidden, sigma=1.0):
    """A FlashHead over a weight; `sigma` falsifies its standard errors."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    index = with_sigma(build_codes(weight, CodesOptions(), hidden), sigma)
    return FlashHead(linear, index, impl="cpu", sample=hidden[:64])


def evidence(head, inspected, head_share):
    """Evidence of an inspection, in a model where the head has this share of the bytes."""
    book = Ledger(1, 1, True, 1, head_bytes=head_share, kv_bytes=0.0, body_bytes=1 - head_share)
    fraction = inspected.whole.bytes_fraction
    return Evidence(
        error_findings=inspected.errors.too_small,
        certified_wrong=inspected.whole.certified_wrong,
        bytes_fraction=fraction,
        head_share=head_share,
        speedup_bound=book.speedup_bound(fraction),
        crossover_rows=head.crossover_rows,
    )


@pytest.fixture(scope="module")
def steep():
    """A head with a steep spectrum, as real ones have, inspected on unseen states."""
    weight, hidden = clustered_head(4096, 192, states=1280)
    head = flash_head(weight, hidden[:1024])
    return head, inspect_head(head, {"one": hidden[1024:1100], "two": hidden[1100:]})


def test_steep_head_converts(steep):
    """A verdict that never recommends."""
    head, inspected = steep
    found = dataclasses.replace(evidence(head, inspected, 0.6), crossover_rows=8)
    verdict = judge(found)
    assert verdict.decision == "convert"
    assert "up to 8 rows" in verdict.then
    assert inspected.whole.bytes_fraction < 0.2


def test_small_share_gains_little(steep):
    """A recommendation to convert what no head can speed up."""
    head, inspected = steep
    assert judge(evidence(head, inspected, 0.1)).decision == "little gain"
    below = judge(dataclasses.replace(GOOD, speedup_bound=LEAST_SPEEDUP - 0.001))
    assert below.decision == "little gain"
    assert judge(dataclasses.replace(GOOD, speedup_bound=LEAST_SPEEDUP)).decision == "convert"


def test_slow_search_gains_little():
    """A recommendation to convert for a machine on which the dense product then runs."""
    verdict = judge(dataclasses.replace(GOOD, crossover_rows=0))
    assert verdict.decision == "little gain"
    assert "does not beat the dense product on this machine" in verdict.reasons[0]
    assert "crossover_rows is 0" in verdict.then


def test_isotropic_head_does_not_suit():
    """Bytes of a head without any structure counted too low, or a slow search that still runs."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4096, 32, generator=generator).bfloat16()
    hidden = (torch.randn(768, 32, generator=generator) / 32**0.5).bfloat16()  # flat logits
    head = flash_head(weight, hidden[:512])
    inspected = inspect_head(head, {"flat": hidden[512:]})
    assert inspected.whole.bytes_fraction > 1
    verdict = judge(evidence(head, inspected, 0.6))
    assert verdict.decision == "does not suit"
    assert inspected.errors.too_small == []
    assert "dense" in verdict.then
    head.crossover_rows = 0
    assert torch.equal(head(hidden[:3]), head.dense(hidden[:3]).float())


def test_broken_error_model_does_not_suit():
    """A head recommended although its certificates promise more than they hold."""
    weight, hidden = clustered_head(4096, 192, states=1216)
    head = flash_head(weight, hidden[:1024], sigma=0.8)
    inspected = inspect_head(head, {"one": hidden[1024:]})
    verdict = judge(evidence(head, inspected, 0.6))
    assert verdict.decision == "does not suit"
    assert all("error model off" in reason for reason in verdict.reasons)
    wrong = judge(dataclasses.replace(GOOD, certified_wrong=1))
    assert wrong.decision == "does not suit"


def test_texts_are_counted_apart(steep):
    """Positions of one text in the figures of another, or a pool that is not their union."""
    _, inspected = steep
    one, two, whole = inspected.texts["one"], inspected.texts["two"], inspected.whole
    assert (one.positions, two.positions, whole.positions) == (76, 180, 256)
    for name in ("candidates_mean", "agreement", "certified_fraction", "bytes_fraction"):
        joined = (76 * getattr(one, name) + 180 * getattr(two, name)) / 256
        assert getattr(whole, name) == pytest.approx(joined)
    assert inspected.errors.positions == inspected.recall.document()["positions"] == 256
    json.dumps(inspected.document(), allow_nan=False)


def test_own_text_decides(steep):
    """Samples that dilute what the user asked about."""
    head, _ = steep
    _, hidden = clustered_head(4096, 192, states=1280)
    inspected = inspect_head(head, {DATA: hidden[1024:1054], "one": hidden[1054:1154]})
    assert inspected.pooled == (DATA,)
    assert inspected.whole == inspected.texts[DATA]
    assert inspected.errors.positions == 30


def test_clusters_head_is_refused():
    """An attribute error deep inside for an index without standard errors."""
    weight, hidden = clustered_head(64, 24)
    linear = nn.Linear(24, 64, bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    index = build_clusters(weight, ClustersOptions(probes=2, iterations=1), hidden)
    with pytest.raises(FlashHeadError, match="a clusters head: wanted"):
        inspect_head(FlashHead(linear, index, impl="reference"), {"one": hidden})


def test_ranks_are_the_definitions(steep):
    """Ranks of the wrong stage or from 0, and a recall that counts one place too few."""
    head, _ = steep
    _, hidden = clustered_head(4096, 192, states=1280)
    (chunk,) = estimate_chunks(head.index, head.weight, None, hidden[1024:1064])
    ranks = winner_ranks(chunk)
    assert len(ranks) == head.index.planes + 1
    for stage in range(len(ranks)):
        for n in range(40):
            order = chunk.estimate[stage, n].sort(descending=True, stable=True).indices.tolist()
            assert ranks[stage, n] == 1 + order.index(int(chunk.truth[n].argmax()))
    assert recall_at(torch.tensor([1, 4, 5, 5000])) == [0.25, 0.5, *[0.75] * (len(DEPTHS) - 2)]


def test_depth_for_recall():
    """One rank too deep or too shallow, and an answer that the positions cannot give."""
    ranks = torch.arange(1, 1001)
    assert [depth_for(ranks, recall) for recall in (0.95, 0.99, 0.999)] == [950, 990, 999]
    assert depth_for(ranks[:999], 0.999) is None
    assert depth_for(torch.tensor([7]), 0.5) is None


def test_needed_probes_find_the_winner():
    """Ranks of clusters that the search would not probe in this order."""
    weight, hidden = clustered_head(1024, 32)
    index = build_clusters(weight, ClustersOptions(cluster_size=4, iterations=3), hidden)
    ranks = cluster_ranks(index, weight, None, hidden[:64], impl="cpu")
    truth = hidden[:64].float() @ weight.float().T
    assert 1 <= ranks.min() <= ranks.max() <= index.clusters
    assert ranks.max() > 1
    for probes in (int(ranks.max()), int(ranks.max()) - 1):
        options = dataclasses.replace(index.options, probes=probes)
        probed = dataclasses.replace(index, options=options)
        logits = search_clusters(hidden[:64], weight, None, probed, "cpu").logits
        exact = (logits == truth).gather(1, truth.argmax(1, keepdim=True))
        close = (logits - truth).abs().gather(1, truth.argmax(1, keepdim=True)) < 1e-4
        assert bool((exact | close).all()) is (probes == int(ranks.max()))


def test_vocabulary_figures():
    """Percentiles of the wrong thing, equal rows not found, or a spectrum of other matrices."""
    weight, hidden = clustered_head(600, 48)
    weight[3], weight[5], weight[7] = 0, weight[9], -torch.zeros(48)
    direction = hidden.mean(0) / hidden.mean(0).norm()
    rows = vocabulary(weight, direction, hidden)
    norms = weight.double().norm(dim=1)
    assert (rows.rows, rows.dimensions) == (600, 48)
    assert (rows.zero_rows, rows.duplicate_rows) == (2, 2)
    assert rows.norms[0] == 0
    assert rows.norms[-1] == pytest.approx(norms.max().item())
    assert rows.norms[PERCENTILES.index(50)] == pytest.approx(norms.median().item(), rel=0.01)
    share = (hidden @ direction).square().sum() / hidden.square().sum()
    assert rows.mean_share == pytest.approx(share.item(), rel=1e-4)
    assert 1 < rows.effective_dimension < 24


def test_flat_spectrum_has_all_its_dimensions():
    """An effective dimension that reads structure into none."""
    generator = torch.Generator().manual_seed(0)
    weight, hidden = (torch.randn(20_000, 16, generator=generator) for _ in range(2))
    rows = vocabulary(weight, torch.eye(16)[0], hidden)
    assert rows.effective_dimension == pytest.approx(15, rel=0.01)
    assert rows.mean_share == pytest.approx(1 / 16, rel=0.05)


class CharacterTokenizer:
    """Characters as tokens, without BOS."""

    bos_token_id = None

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [ord(c) for c in text]}


def test_samples_are_there_and_whole():
    """A file left out of the package, damaged, or in the wrong place of the table."""
    samples = load_samples()
    assert tuple(samples) == NAMES
    blocks = {"russian": "а", "arabic": "ا", "hindi": "न", "chinese": "的", "japanese": "は"}
    for name, text in samples.items():
        assert 200 < len(text) < 2000
        assert "\ufffd" not in text
        assert blocks.get(name, "e") in text
    compile(samples["code"], "code.txt", "exec")
    assert "🎉" in samples["chat"]


def test_windows_of_all_texts(tmp_path):
    """A sample longer than asked for, or the user's text cut to the samples' length."""
    path = tmp_path / "own.txt"
    path.write_text("x" * 700)
    windows = text_windows(CharacterTokenizer(), path, 600, 128)
    lengths = {
        name: sum(int(scored_positions(w, None).sum()) for w in own)
        for name, own in windows.items()
    }
    assert lengths.pop(DATA) == 600
    assert tuple(lengths) == NAMES
    assert set(lengths.values()) <= set(range(200, SAMPLE_POSITIONS + 1))
    assert all(len(w) <= 128 for own in windows.values() for w in own)


@pytest.fixture
def own_text(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text(" ".join(f"w{3 + i * 7 % 500}" for i in range(90)))
    return path


def test_inspect_head_of_a_model(tiny_folder, own_text, capsys):
    """A document with a part missing, or with figures of the samples for the user's text."""
    arguments = ("--head", "--clusters", "--data", str(own_text), "--positions", "80", "--json")
    assert main(["inspect", tiny_folder, *arguments]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    head = document["head"]
    parts = {
        "vocabulary",
        "error_model",
        "recall",
        "texts",
        "whole",
        "clusters",
        "speed",
        "verdict",
    }
    assert parts | {"options", "impl", "versions", "git_sha", "argv", "hardware"} <= head.keys()
    assert {"bytes_per_token", "share", "index"} <= document.keys()
    assert set(head["texts"]) == {DATA, *NAMES}
    assert head["whole"]["positions"] == head["error_model"]["positions"] == 80
    assert head["clusters"]["probes_for_recall"]["0.999"] is None
    share, fraction = document["share"]["head"], head["whole"]["bytes_fraction"]
    assert head["speed"]["token_speedup_bound"] == pytest.approx(1 / (1 - share * (1 - fraction)))
    assert head["verdict"]["decision"] in ("convert", "little gain", "does not suit")
    for word in ("error model", "candidates", "winner within", head["verdict"]["decision"].upper()):
        assert word in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--head", "--data", "OWN", "--positions", "91"), "the text has only 90 tokens"),
        (("--data", "OWN"), "--data without --head: wanted both"),
        (("--clusters",), "--clusters without --head"),
        (("--head", "--positions", "9"), "--positions without --data"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tiny_folder, own_text, capsys):
    """A traceback, an option that is ignored, or a wait for the index before the complaint."""
    arguments = [str(own_text) if word == "OWN" else word for word in arguments]
    assert main(["inspect", tiny_folder, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "loading" not in error
    assert error.count("\n") == 1


def test_folder_with_clusters_is_refused(tiny_folder, tmp_path, capsys):
    """A report on an index that the folder does not hold, after minutes of building it."""
    out = tmp_path / "out"
    options = ("--set", "probes=2", "--set", "calibration_tokens=64")
    assert main(["convert", tiny_folder, str(out), "--head", "clusters", *options]) == 0
    capsys.readouterr()
    assert main(["inspect", str(out), "--head"]) == 2
    error = capsys.readouterr().err
    assert "holds a clusters index: wanted a codes index" in error
    assert error.count("\n") == 1


def test_saved_index_is_inspected(tiny_folder, tmp_path, capsys):
    """Another index inspected than the one that the folder serves."""
    out = tmp_path / "out"
    options = ("--set", "bits=3", "--set", "calibration_tokens=128")
    assert main(["convert", tiny_folder, str(out), *options]) == 0
    capsys.readouterr()
    assert main(["inspect", str(out), "--head", "--json"]) == 0
    head = json.loads(capsys.readouterr().out)["head"]
    assert (head["options"]["bits"], head["calibration_tokens"]) == (3.0, 128)
