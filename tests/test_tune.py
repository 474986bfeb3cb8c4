"""The crossover is measured once a machine: what is kept, under which key, and what is refused."""

import dataclasses
import json
import logging
import multiprocessing
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import clustered_head
from test_cli import flashhead
from torch import nn

from flashhead import ClustersOptions, CodesOptions
from flashhead.cli import main
from flashhead.errors import FlashHeadError
from flashhead.index.build_clusters import build_clusters
from flashhead.index.build_codes import build_codes
from flashhead.integrations.transformers import attach
from flashhead.nn import crossover, tuning
from flashhead.nn.crossover import Timing, crossover_of, key_of, time_rows
from flashhead.nn.head import FlashHead
from flashhead.nn.tuning import (
    Crossover,
    Entry,
    TuneKey,
    clear_entries,
    find_entry,
    read_entries,
    store_entry,
)

KEY = TuneKey("a CPU", "cpu", "codes", 515, 48, "float32", False, "bits", "model", "torch 2")
OPTIONS = {"progress": False, "calibration_tokens": 64}


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    """Where an empty cache of its own will keep what is measured."""
    monkeypatch.setenv("FLASHHEAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FLASHHEAD_TUNE_CACHE")
    return tmp_path / "cache" / "tune.json"


@pytest.fixture
def measured(monkeypatch) -> list[int]:
    """Measuring takes no time, finds 4 and 8 rows, and is counted: the pairs of each call."""
    calls: list[int] = []

    def time_nothing(_head, pairs, **_options):
        calls.append(pairs)
        lasts = {"logits": 4, "token": 8}
        return [
            Timing(use, rows, 1.0, 1.0, 0.5 if rows <= lasts[use] else 2.0, 0.4, 3.0)
            for use, rows in product(lasts, tuning.ROW_COUNTS)
        ]

    monkeypatch.setattr(crossover, "time_rows", time_nothing)
    return calls


def codes_head(dtype=torch.float32, bias=False, sample=True, **options) -> FlashHead:
    """A head of 300 x 32 with a codes index, its crossover whatever it is."""
    weight, hidden = clustered_head(300, 32)
    linear = nn.Linear(32, 300, bias=bias).requires_grad_(False)
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    options = {"bits": 2, "planes": 2, **options}
    index = build_codes(linear.weight, CodesOptions(**options), hidden)
    return FlashHead(linear, index, impl="reference", sample=hidden[:64] if sample else None)


def clusters_head(**options) -> FlashHead:
    """The same with a clusters index."""
    weight, hidden = clustered_head(300, 32)
    linear = nn.Linear(32, 300, bias=False).requires_grad_(False)
    linear.weight = nn.Parameter(weight.float(), requires_grad=False)
    index = build_clusters(linear.weight, ClustersOptions(probes=8, **options), hidden)
    return FlashHead(linear, index, impl="reference", sample=hidden[:64])


def test_second_attach_does_not_measure(tiny_model, file, measured, caplog):
    """Catches a key that differs from one attach to the next, and an answer that is not kept."""
    caplog.set_level(logging.INFO, "flashhead")
    for source in ("measured", "from tune.json"):
        caplog.clear()
        with attach(tiny_model, "codes", **OPTIONS) as attachment:
            assert attachment.head.crossover_rows == 4
            assert attachment.head.token_crossover_rows == 8
        assert f"crossover {source}: the codes search pays up to 4 rows" in caplog.text
    assert measured == [crossover.ATTACH_PAIRS]
    assert [entry.crossover for entry in read_entries()] == [Crossover(4, 8)]


def test_a_lost_crossover_is_not_kept_at_attach(file, measured, monkeypatch):
    """A busy moment must not switch the search off for good: the next attach measures again."""
    monkeypatch.setattr(crossover, "crossover_of", lambda _: tuning.Crossover(logits=0, token=0))
    assert codes_head().crossover_rows == 0
    assert codes_head().crossover_rows == 0
    assert len(measured) == 2
    assert not file.exists()


def test_the_token_is_timed_wherever_the_codes_are_searched():
    """A GPU's search once had complete logits timed alone, so greedy rows were dense there."""
    head = codes_head()
    head.device_search = object()
    assert set(crossover._uses(head)) == {"logits", "token"}
    assert set(crossover._uses(clusters_head())) == {"logits"}


def test_a_search_that_pays_for_the_token_alone_is_kept(file, measured, monkeypatch, caplog):
    """Catches a crossover thrown away, or called lost, because complete logits do not pay."""
    monkeypatch.setattr(crossover, "crossover_of", lambda _: Crossover(logits=0, token=8))
    for _ in range(2):
        head = codes_head()
        assert (head.crossover_rows, head.token_crossover_rows) == (0, 8)
    assert len(measured) == 1
    assert "does not beat" not in caplog.text


def test_cache_can_be_switched_off(file, measured, monkeypatch):
    """Catches a test, or a user who said no, that writes to the cache or believes it."""
    store_entry(Entry(key_of(codes_head()), Crossover(64, 64), 9))
    before = file.read_bytes()
    assert codes_head().crossover_rows == 64
    monkeypatch.setenv("FLASHHEAD_TUNE_CACHE", "0")
    assert codes_head().crossover_rows == 4
    assert file.read_bytes() == before


def test_key_holds_what_decides(measured, monkeypatch):
    """Catches the crossover of one machine, index or version taken for that of another."""
    heads = [
        codes_head(),
        codes_head(torch.bfloat16),
        codes_head(bias=True),
        codes_head(sample=False),
        codes_head(bits=1),
        codes_head(planes=1),
        codes_head(failure_probability=1e-3),
        codes_head(kl_budget=0.5),
        clusters_head(cluster_size=16),
        clusters_head(cluster_size=32),
        clusters_head(centroid_dtype="bf16"),
        clusters_head(always=(1, 2)),
    ]
    keys = [key_of(head) for head in heads]
    assert keys[0] == key_of(codes_head())
    index = dataclasses.replace(heads[8].index, options=ClustersOptions(probes=9, cluster_size=16))
    heads[8].index = index
    keys.append(key_of(heads[8]))
    heads[0].impl = "cpu"
    keys.append(key_of(heads[0]))
    heads[0].impl = "reference"
    for name, value in {"cpu_name": lambda: "another CPU", "__version__": "99"}.items():
        with monkeypatch.context() as patched:
            patched.setattr(crossover, name, value)
            keys.append(key_of(heads[0]))
    for name in ("__version__", "get_num_threads"):
        with monkeypatch.context() as patched:
            patched.setattr(torch, name, "99" if name == "__version__" else lambda: 99)
            keys.append(key_of(heads[0]))
    assert len(set(keys)) == len(keys)


def test_every_part_of_the_key_counts(file):
    """Catches a lookup that compares only some fields."""
    store_entry(Entry(KEY, Crossover(1, 2), 5))
    assert find_entry(KEY).crossover == Crossover(1, 2)
    for field in dataclasses.fields(TuneKey):
        value = getattr(KEY, field.name)
        other = value + "x" if isinstance(value, str) else 1 - value
        assert find_entry(dataclasses.replace(KEY, **{field.name: other})) is None


def test_measured_anew_replaces(file):
    """Catches two answers for one key, and a file that grows without end."""
    for rows in (1, 2, 4):
        store_entry(Entry(KEY, Crossover(rows, rows), 5))
    assert read_entries() == [Entry(KEY, Crossover(4, 4), 5)]
    keys = [dataclasses.replace(KEY, vocab_size=n) for n in range(6)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tuning, "MOST_ENTRIES", 5)
        for key in keys:
            store_entry(Entry(key, Crossover(0, 0), 5))
    assert [entry.key for entry in read_entries()] == keys[1:]


def damaged(**changes) -> str:
    """The file with one entry, some of its values changed."""
    key = dataclasses.asdict(KEY) | changes.pop("key", {})
    entry = {"key": key, "crossover": {"logits": 1, "token": 1}, "pairs": 5, **changes}
    return json.dumps({"format_version": 1, "entries": [entry]})


DAMAGES = {
    "empty": "",
    "cut short": damaged()[:-20],
    "not text": b"\xff\xfe\x00",
    "a list": "[]",
    "deep": "[" * 100_000,
    "a newer format": damaged().replace('"format_version": 1', '"format_version": 2'),
    "entries of another kind": '{"format_version": 1, "entries": [7]}',
    "a field too many": damaged(speed=11),
    "no such batch": damaged(crossover={"logits": 3, "token": 1}),
    "beyond the range": damaged(crossover={"logits": 1, "token": 10**9}),
    "negative": damaged(crossover={"logits": -1, "token": 1}),
    "a truth": damaged(crossover={"logits": True, "token": 1}),
    "not a number": damaged(crossover={"logits": float("nan"), "token": 1}),
    "no token": damaged(crossover={"logits": 1}),
    "no pairs": damaged(pairs=0),
    "a key of another type": damaged(key={"vocab_size": "515"}),
    "a key with more": damaged(key={"speed": 11}),
    "too large": damaged(key={"device": "x" * (1 << 20)}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_measured_again(file, measured, caplog, damage):
    """Catches a traceback at attach, a batch size out of range that is believed, and a warning
    that comes at every attach.
    """
    content = DAMAGES[damage]
    file.parent.mkdir()
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert codes_head().crossover_rows == 4
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    line = warnings[0].getMessage()
    assert line.startswith(f"{file} is not usable (")
    assert line.endswith("the crossover is measured again")
    assert "\n" not in line
    caplog.clear()
    assert codes_head().crossover_rows == 4
    assert (len(measured), caplog.records) == (1, [])


def test_undamaged_is_believed(file):
    """Catches damages that are refused for another reason than theirs."""
    file.parent.mkdir()
    file.write_text(damaged())
    assert read_entries() == [Entry(KEY, Crossover(1, 1), 5)]


def test_cache_that_cannot_be_written(tmp_path, measured, monkeypatch, caplog):
    """Catches an attach that fails for want of a cache."""
    monkeypatch.delenv("FLASHHEAD_TUNE_CACHE")
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLASHHEAD_CACHE", str(tmp_path / "file"))
    assert codes_head().crossover_rows == 4
    assert "cannot be written" in caplog.text
    assert "FLASHHEAD_CACHE moves the cache" in caplog.text


def test_no_home_folder(measured, monkeypatch, caplog):
    """Catches a user without a home, as in some containers, who cannot attach."""
    monkeypatch.delenv("FLASHHEAD_TUNE_CACHE")
    monkeypatch.setenv("FLASHHEAD_CACHE", "~nobody-of-this-name/cache")
    assert codes_head().crossover_rows == 4
    assert "FLASHHEAD_CACHE names one" in caplog.text


def store_many(process: int, start) -> None:
    """What one of several processes keeps, all at the same time."""
    start.wait(120)
    for n in range(40):
        key = dataclasses.replace(KEY, vocab_size=n, hidden_size=process)
        store_entry(Entry(key, Crossover(1, 1), 5))


def test_processes_lose_nothing_of_each_other(file):
    """Catches a read and write without a lock, a shared temporary name, and leftovers."""
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    processes = [context.Process(target=store_many, args=(i, start)) for i in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert len({entry.key for entry in read_entries()}) == 80
    assert {path.name for path in file.parent.iterdir()} <= {"tune.json", ".tune.json.lock"}


def test_interrupted_write_leaves_the_old_file(file, monkeypatch):
    """Catches a file that is cut short by Ctrl-C, and a temporary one that stays."""
    store_entry(Entry(KEY, Crossover(1, 1), 5))

    def interrupt(*_args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store_entry(Entry(KEY, Crossover(2, 2), 5))
    assert read_entries() == [Entry(KEY, Crossover(1, 1), 5)]
    assert not list(file.parent.glob("*partial*"))


def test_crossover_stops_at_the_first_loss():
    """Catches a lucky win at a large batch that sends the losing ones before it to the search."""
    ratios = {"logits": (0.4, 0.9, 1.0, 0.5), "token": (1.2, 0.5, 0.5, 0.5)}
    timings = [
        Timing(use, rows, 1.0, 1.0, ratio, ratio, ratio)
        for use, row in ratios.items()
        for rows, ratio in zip(tuning.ROW_COUNTS, row, strict=False)
    ]
    assert crossover_of(timings) == Crossover(logits=2, token=0)
    assert crossover_of([]) == Crossover(0, 0)


def test_timings_are_real():
    """Catches rows or uses left out, pairs that are not taken, and counters that see the timing."""
    head = codes_head()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    timings = time_rows(head, 2, all_rows=True)
    assert [(timing.use, timing.rows) for timing in timings] == list(
        product(("logits", "token"), tuning.ROW_COUNTS)
    )
    for timing in timings:
        assert 0 < timing.ratio_p10 <= timing.ratio <= timing.ratio_p90
        assert min(timing.search_ms, timing.dense_ms) > 0
    assert head.stats.rows == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert {timing.use for timing in time_rows(clusters_head(), 2)} == {"logits"}


def test_timing_takes_new_states_and_turns():
    """Catches the same few rows read again from the cache, and one side that always goes first."""
    states, seen = torch.arange(6.0)[:, None], []
    search = lambda batch: seen.append(("search", batch[:, 0].tolist()))  # noqa: E731
    dense = lambda batch: seen.append(("dense", batch[:, 0].tolist()))  # noqa: E731
    crossover._time("logits", search, dense, states, rows=4, pairs=2)
    first, second = seen[2:4], seen[4:6]
    assert [name for name, _ in first + second] == ["dense", "search", "search", "dense"]
    assert first[0][1] == first[1][1] == [0, 1, 2, 3]
    assert second[0][1] == second[1][1] == [4, 5, 0, 1]


def test_list_and_clear(file):
    """Catches a list that waits for torch, and a file that stays although it was cleared."""
    store_entry(Entry(dataclasses.replace(KEY, device="\x1b[2J CPU"), Crossover(4, 0), 9))
    done = flashhead("tune", "--list")
    assert (done.returncode, done.stderr) == (0, "")
    assert "complete logits, up to 4 rows; certified token, never" in done.stdout
    assert str(file) in done.stdout
    assert "\x1b" not in done.stdout
    done = flashhead("tune", "--list", "--json")
    document = json.loads(done.stdout)
    assert document["file"] == str(file)
    assert document["entries"][0]["crossover"] == {"logits": 4, "token": 0}
    for removed in (True, False):
        done = flashhead("tune", "--clear", "--json")
        assert json.loads(done.stdout) == {"file": str(file), "removed": removed}
        assert "TORCH" not in done.stderr
    assert not file.exists()
    assert "no crossovers" in flashhead("tune", "--list").stdout


def test_list_of_a_damaged_file(file):
    """Catches a traceback of json, and a file that nobody can get rid of."""
    file.parent.mkdir()
    file.write_text("{")
    done = flashhead("tune", "--list")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "flashhead tune --clear removes it" in done.stderr
    assert clear_entries()


def test_nothing_to_list_when_switched_off(capsys):
    """Catches a list of a cache that no attach reads."""
    assert main(["tune", "--list"]) == 2
    assert "FLASHHEAD_TUNE_CACHE=0" in capsys.readouterr().err


TUNE = ("tune", "--set", "calibration_tokens=64", "--json", "--model")


@pytest.mark.parametrize("head", ["codes", "clusters"])
def test_tune_measures_prints_and_keeps(tiny_folder, file, capsys, monkeypatch, head):
    """Catches a command that believes what is kept instead of measuring, or keeps another result
    than the one on the screen.
    """
    monkeypatch.setattr(tuning, "ROW_COUNTS", (1, 2))
    monkeypatch.setattr(crossover, "ROW_COUNTS", (1, 2))
    assert main([*TUNE, tiny_folder, "--head", head, "--repeats", "9"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["pairs"] == 9
    uses = ["logits", "token"] if head == "codes" else ["logits"]
    assert [(row["use"], row["rows"]) for row in document["rows"]] == list(product(uses, (1, 2)))
    assert document["file"] == str(file)
    assert f"kept in {file}" in captured.err
    assert ("certified token" in captured.err) == (head == "codes")
    (entry,) = read_entries()
    assert dataclasses.asdict(entry.crossover) == document["crossover"]
    assert (entry.pairs, entry.key.head) == (9, head)


def test_tune_with_the_cache_off(tiny_folder, capsys, measured, monkeypatch):
    """Catches a `tune` that fails, or says that it keeps, where nothing is to be kept."""
    assert main([*TUNE, tiny_folder]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["file"] is None
    assert "not kept: FLASHHEAD_TUNE_CACHE=0" in captured.err
    assert measured == [crossover.ATTACH_PAIRS, 15]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_is_one_line(tiny_folder, capsys):
    """Catches torch's own traceback, after the model was loaded."""
    assert main([*TUNE, tiny_folder, "--device", "cuda"]) == 2
    assert capsys.readouterr().err == (
        "flashhead: --device cuda: torch finds no CUDA device here\n"
    )


def test_tests_leave_the_users_cache_alone():
    """Catches a conftest that forgets: every attach of these tests would be kept."""
    assert not tuning.cache_is_on()
    done = flashhead(code="import os; sys.exit(os.environ['FLASHHEAD_TUNE_CACHE'] != '0')")
    assert done.returncode == 0


@pytest.mark.parametrize("rows", [-1, 3, 128, 1.0, "4", None, True])
def test_crossover_has_a_range(rows):
    """Catches a value that no measurement gives."""
    with pytest.raises(FlashHeadError, match="wanted one of 0, 1, 2, 4"):
        Crossover(1, rows)
