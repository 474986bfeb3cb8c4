"""The parts of `benchmarks/vllm_gpu_step.py` that need neither a GPU nor vLLM."""

import configparser
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import clustered_head

pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

# ruff: noqa: E402
import vllm_gpu_engine
from gpu_trace import step_times, union
from vllm_gpu_engine import Measurement
from vllm_gpu_models import MadeUpModel, make_model, summary, survivors, unpacked
from vllm_gpu_shapes import SHAPES
from vllm_gpu_step import ENTRY_POINTS, parse, write_plugin
from vllm_gpu_summary import add_summary, divergences, table

from flashhead.index.build_codes import build_codes
from flashhead.nn.head import FlashHead
from flashhead.nn.tuning import Crossover, read_entries
from flashhead.options import CodesOptions

TINY = {
    "vocab_size": 900,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny(shape):  # type: ignore[no-untyped-def]
    config = SHAPES[shape] | TINY
    if "layer_types" in config:
        config = config | {"layer_types": ["sliding_attention", "full_attention"]}
    return config


@pytest.fixture(scope="module", params=list(SHAPES))
def made(request, tmp_path_factory):  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp(request.param) / "model"
    return request.param, folder, make_model(folder, tiny(request.param), "cpu")


def test_checkpoint_loads(made):
    """A tensor missing, misnamed or of another size; an embedding that is not the states'."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    shape, folder, facts = made
    assert facts["noise"] == pytest.approx(0.2, rel=0.1)
    tensors = load_file(folder / "model.safetensors")
    if shape.endswith("w4a16"):
        stem = "model.layers.1.mlp.down_proj"
        assert tensors[f"{stem}.weight_shape"].tolist() == [128, 256]
        assert tensors[f"{stem}.weight_packed"].shape == (128, 32)
        assert tensors[f"{stem}.weight_scale"].shape == (128, 2)
        assert f"{stem}.weight" not in tensors
        return
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
    again = MadeUpModel(tiny(shape), "cpu")
    again.set_noise(0.2)
    with torch.no_grad():
        tokens = torch.arange(64)[None]
        wanted = again.model(tokens).logits
        torch.testing.assert_close(model(tokens).logits, wanted, rtol=0, atol=0)


def test_index_is_found(made):
    """An index that the plugin does not find, or not of the head that vLLM loads."""
    from safetensors.torch import load_file

    from flashhead.index.store import load_index

    _, folder, _ = made
    section = json.loads((folder / "config.json").read_text())["flashhead"]
    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    index, sample = load_index(folder, section, head)
    assert index.vocab_size == TINY["vocab_size"]
    assert sample.shape == (64, 128)


def test_texts_do_not_stand_still():
    """A token whose winner is itself: all hidden states alike, and a search that has one answer."""
    model = MadeUpModel(tiny("qwen3-0.6b"), "cpu")
    model.set_noise(0.2)
    start = torch.randint(900, (4, 8), generator=torch.Generator().manual_seed(0))
    texts = model.model.generate(start, max_new_tokens=24, do_sample=False, eos_token_id=None)
    for text in texts[:, 8:].tolist():
        assert len(set(text)) >= 12


def test_codes_are_unpacked_as_they_are_packed():
    """Nibbles in another order, or without their offset."""
    codes = torch.randint(-8, 8, (3, 256), generator=torch.Generator().manual_seed(0))
    words = sum(((codes[:, i::8] + 8) << (4 * i)) for i in range(8))
    packed = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    scale = torch.tensor([[0.5, 2.0]] * 3).bfloat16()
    wanted = codes.float() * torch.tensor([0.5] * 128 + [2.0] * 128)
    assert torch.equal(unpacked(packed, scale), wanted)


def test_states_as_hard_as_real_ones(monkeypatch):
    """A search that runs away from the median wanted, or a model left at the last one tried."""
    import vllm_gpu_models

    model = MadeUpModel(tiny("gemma-3-270m"), "cpu")
    plain = model.head.float() @ model.model.model.embed_tokens.weight.float()[model.cycle[0]]

    def counted(*_):  # type: ignore[no-untyped-def] # 370 at 0.3, the mean of real text at 0.4
        ease, spread = model.ease
        count = 370 * 8 ** (0.3 - ease)
        rest = 1400 * 3 - 2 * count if spread == 0.4 else count
        return [int(count), int(count), int(rest)]

    monkeypatch.setattr(vllm_gpu_models, "survivors", counted)
    tried = vllm_gpu_models.choose_ease(model)
    assert len(tried) == 18
    assert model.ease[0] == pytest.approx(0.3, abs=0.1)
    assert model.ease[1] == 0.4
    model.set_ease(1.0, 0.0)
    raised = model.head.float() @ model.model.model.embed_tokens.weight.float()[model.cycle[0]]
    assert float((raised - plain)[model.cycle[1]]) == pytest.approx(3.0, rel=0.3)


def test_survivors_are_counted():
    """A row of the answers that counts something else."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight, states = clustered_head(333, 48)
    index = build_codes(weight.float().to(device), CodesOptions(bits=1.5), states.to(device))
    counts = survivors(index, weight.float().to(device), states[:5].to(device))
    assert len(counts) == 5
    assert all(1 <= count <= 333 for count in counts)


def test_counts():
    assert summary([1, 2, 3, 4, 90]) == {"mean": 20.0, "median": 3.0, "p90": 55.6, "max": 90.0}


def test_union_of_intervals():
    """Kernels that overlap counted twice, or a gap counted as work."""
    assert union([]) == 0
    assert union([(5, 7), (0, 2), (1, 3), (1.5, 2.5), (7, 8)]) == 6


def event(cat, name, ts, dur, tid=1, **args):  # type: ignore[no-untyped-def]
    return {"cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def decode(steps):  # type: ignore[no-untyped-def]
    """A trace whose step is head (10 us of which 4 overlap), sampler (3 us) and body (50 us)."""
    events = []
    for step in range(steps):
        host, gpu, first = 1000.0 * step, 1000.0 * step + 300, 10 * step
        events += [
            event("user_annotation", "HEAD", host, 20),
            event("cuda_runtime", "cudaLaunchKernel", host + 1, 2, correlation=first),
            event("cuda_runtime", "cudaGraphLaunch", host + 5, 2, correlation=first + 1),
            event("cuda_driver", "cuLaunchKernelEx", host + 9, 2, correlation=first + 2),
            event("cuda_runtime", "cudaMemcpyAsync", host + 6, 2, tid=2, correlation=first + 6),
            event("user_annotation", "SAMPLER", host + 30, 9),
            event("cuda_runtime", "cudaLaunchKernel", host + 31, 2, correlation=first + 3),
            event("cuda_runtime", "cudaGraphLaunch", host + 100, 2, correlation=first + 4),
            event("kernel", "copy", gpu, 2, correlation=first),
            event("kernel", "scan", gpu + 2, 6, correlation=first + 5),  # a graph's own number
            event("kernel", "scatter", gpu + 4, 6, correlation=first + 2),
            event("gpu_memcpy", "other thread", gpu + 400, 1, correlation=first + 6),
            event("kernel", "argmax", gpu + 20, 3, correlation=first + 3),
            event("kernel", "body", gpu + 100, 50, correlation=first + 4),
        ]
    return events


def test_steps_of_a_trace():
    """A kernel of a replay missed, another thread's taken, or sums said to be times."""
    found = step_times(decode(14), skip=2)
    assert found["steps"] == 11
    assert found["head_union_us"]["median"] == 10
    assert found["head_sum_us"]["median"] == 14
    assert found["sampler_union_us"] == {"median": 3, "p10": 3, "p90": 3}
    assert found["step_union_us"]["median"] == 64
    assert found["step_sum_us"]["median"] == 68
    assert found["step_wall_us"]["median"] == 1000
    assert {kernel["name"]: kernel["us"] for kernel in found["head_kernels"]} == {
        "scan": 6,
        "scatter": 6,
        "copy": 2,
    }
    with pytest.raises(ValueError, match="wanted 11"):
        step_times(decode(4))
    without = [item for item in decode(14) if item["cat"] not in ("cuda_runtime", "cuda_driver")]
    with pytest.raises(ValueError, match="launched nothing"):
        step_times(without)


def test_entry_points_are_the_packages():
    """The plugin under another name than the package's own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    written = configparser.ConfigParser()
    written.read_string(ENTRY_POINTS)
    found = {group: dict(written[group]) for group in written.sections()}
    assert found == project["entry-points"]


def test_a_child_finds_the_plugin(tmp_path, monkeypatch):
    """A folder of metadata that importlib.metadata does not take for a distribution."""
    import vllm_gpu_step

    monkeypatch.setattr(vllm_gpu_step.importlib.metadata, "entry_points", lambda **_: ())
    folder = write_plugin(tmp_path)
    code = (
        "import importlib.metadata as m, json;"
        "groups = ('vllm.general_plugins', 'vllm.logits_processors');"
        "print(json.dumps([[e.value for e in m.entry_points(group=g)] for g in groups]))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],  # without the environment's own packages
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == [
        ["flashhead.integrations.vllm.plugin:register"],
        ["flashhead.integrations.vllm.requests:RowNeeds"],
    ]


def test_an_installed_plugin_is_not_doubled(tmp_path, monkeypatch):
    import vllm_gpu_step

    monkeypatch.setattr(vllm_gpu_step.importlib.metadata, "entry_points", lambda **_: ("one",))
    assert write_plugin(tmp_path) is None


def result(texts, step, head, gaps=None, rows=None):  # type: ignore[no-untyped-def]
    times = {f"{name}_union_us": {"median": us} for name, us in (("step", step), ("head", head))}
    found = {
        "ms_per_token": {"median": step / 1000, "min": 0, "max": 9},
        "texts": texts,
        "distinct_tokens": 5,
        "profile": times,
        "exact": {"beyond_rounding": 0},
        "answers": {"gaps": gaps, "tops": [[12.0] * 3], "winners": [[1, 2, 4]]},
    }
    if rows:
        found["rows"] = dict(zip(("searched_rows", "dense_rows", "expected"), rows, strict=True))
    return found


def test_summary():
    """A saving that is not the step's, a tie taken for an error or an error for a tie."""
    dense = result([[1, 2, 3]], 1000.0, 200.0, [[0.0, 0.0, 0.1]])
    flash = result([[1, 2, 4]], 830.0, 20.0, rows=(6, 0, 6))
    shape = {"crossover": 64, "engines": {}}
    shape["engines"] = {"dense": {"batches": {"1": dense}}, "flashhead": {"batches": {"1": flash}}}
    add_summary(shape)
    assert shape["errors"] == []
    (row,) = shape["summary"]
    assert (row["saved_us"], row["head_saved_us"]) == (170, 180)
    assert row["saved_share"] == pytest.approx(170 / 180)
    assert row["meets_target"]
    assert row["divergences"]["gaps"] == [0.1]
    assert "830.0" in table({"shapes": {"one": shape}})
    dense["answers"]["gaps"] = [[0.0, 0.0, 0.2]]
    flash["rows"]["dense_rows"] = 1
    add_summary(shape)
    assert len(shape["errors"]) == 2
    shape["crossover"], shape["engines"]["flashhead"]["crossover"] = None, {"token": 0}
    flash["rows"] = {"searched_rows": 0, "dense_rows": 6, "expected": 6}
    add_summary(shape)
    (row,) = shape["summary"]
    assert (row["path"], row["meets_target"], len(shape["errors"])) == ("dense", None, 1)
    shape["engines"]["flashhead"]["crossover"] = {"token": 1}
    add_summary(shape)
    assert len(shape["errors"]) == 2
    dense.pop("answers")
    told, errors = divergences(dense, flash)
    assert (told["parted"], errors) == (1, [])
    assert "counted only" in told["note"]


def test_crossover_is_measured_where_it_serves(monkeypatch, tmp_path):
    """A crossover that is told and not used, or measured again by the next engine."""
    monkeypatch.setenv("FLASHHEAD_CACHE", str(tmp_path))
    monkeypatch.setenv("FLASHHEAD_TUNE_CACHE", "1")
    weight, _ = clustered_head(900, 64)
    linear = torch.nn.Linear(64, 900, bias=False)
    linear.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
    head = FlashHead(
        linear, build_codes(linear.weight.detach(), CodesOptions()), crossover=Crossover(64, 64)
    )
    monkeypatch.setattr(vllm_gpu_engine, "CROSSOVER_PAIRS", 2)
    measurement = Measurement.__new__(Measurement)
    measurement.probe = SimpleNamespace(flash_head=head)
    found = measurement.measure_crossover()
    assert (head.crossover_rows, head.token_crossover_rows) == (found["logits"], found["token"])
    (entry,) = read_entries()
    assert (entry.crossover.token, entry.pairs) == (found["token"], 2)
    assert {timing["use"] for timing in found["timings"]} == {"logits", "token"}


def test_command_line(tmp_path):
    assert parse([]).shapes == list(SHAPES)
    assert parse([]).crossover is None
    assert parse(["--crossover", "64"]).crossover == 64
    assert parse(["--batches", "1,8"]).batches == [1, 8]
    assert parse(["--smoke"]).shapes == ["smoke"]
    (tmp_path / "file").touch()
    for wrong in (
        ["--shapes", "one"],
        ["--batches", "64"],
        ["--kinds", "dense"],
        ["--work", str(tmp_path)],
    ):
        with pytest.raises(SystemExit):
            parse(wrong)
