"""Quantizing file by file: the same bytes as with the model in memory, also after a kill."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from flashhead.cli import main
from flashhead.convert import shards
from flashhead.convert.head import convert
from flashhead.convert.source import default_name, local_source
from flashhead.convert.workspace import Workspace
from flashhead.errors import FlashHeadError
from flashhead.options import QUANTIZE

SETTINGS = {"quantize": "w4a16", "calibration_tokens": 64, "bits": 2.0, "planes": 1}
SHARDED = 6


@pytest.fixture(scope="module")
def sharded(tiny_folder, tmp_path_factory) -> Path:
    """A Qwen2 (biases, untied) in several weight files, with the tiny model's tokenizer."""
    folder = tmp_path_factory.mktemp("sharded") / "Qwen2-Tiny"
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=515,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="70KB")
    assert len(list(folder.glob("*.safetensors"))) >= SHARDED
    for path in Path(tiny_folder).glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)
    (folder / "LICENSE").write_text("MIT License")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def placed(folder: Path, name: str = "variant") -> Path:
    """A path for a variant; its card holds its name, so equal folders need equal names."""
    folder.mkdir()
    return folder / name


@pytest.mark.parametrize("kind", QUANTIZE)
def test_the_bytes_are_those_of_the_whole_model(kind, sharded, tmp_path, monkeypatch):
    """Catches a cast, a scale or a config that differs where float32 weights are read one by one;
    the only change to what runs is which of the two ways is taken."""
    source = tmp_path / "source"
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=515,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(source)
    for path in sharded.glob("tokenizer*"):
        shutil.copyfile(path, source / path.name)
    one, other = placed(tmp_path / "a"), placed(tmp_path / "b")
    done = convert(str(source), one, head="dense", quantize=kind, progress=False)
    monkeypatch.setattr(shards, "plan_shards", lambda *_: "asked by the test")
    whole = convert(str(source), other, head="dense", quantize=kind, progress=False)
    assert (done["by_shards"], whole["by_shards"]) == (True, False)
    assert contents(one) == contents(other)


def test_a_file_for_each_file(sharded, tmp_path, monkeypatch):
    """Biases, an untied head, tensors that are placed in a file that the index does not name."""
    one, other = placed(tmp_path / "a"), placed(tmp_path / "b")
    convert(str(sharded), one, head="dense", quantize="w4a16", progress=False)
    monkeypatch.setattr(shards, "plan_shards", lambda *_: "asked by the test")
    convert(str(sharded), other, head="dense", quantize="w4a16", progress=False)
    files = sorted(path.name for path in one.glob("*.safetensors"))
    assert len(files) == len(list(sharded.glob("*.safetensors")))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((one / "model.safetensors.index.json").read_text())
    tensors = {}
    for file in files:
        held = load_file(one / file)
        assert all(index["weight_map"][name] == file for name in held)
        tensors |= held
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    expected = load_file(other / "model.safetensors")
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name
    for name in ("config.json", "generation_config.json", "LICENSE", "tokenizer.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    config = json.loads((one / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert "flashhead" not in config


KILLED = """
import os, signal, sys
from flashhead.convert.head import convert
from flashhead.convert.workspace import Workspace
finish = Workspace.finish
def killed(self, name):
    if len(self.finished) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    finish(self, name)
Workspace.finish = killed
convert(sys.argv[1], sys.argv[2], progress=False, quantize="w4a16", calibration_tokens=64,
        bits=2.0, planes=1)
"""


def kill(source: Path, out: Path) -> Path:
    """Convert in a process that dies while its fourth weight file is unfinished."""
    command = [sys.executable, "-c", KILLED, str(source), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    partial = out.parent / f".{out.name}.partial"
    assert len(list((partial / "folder").glob("model-*.safetensors"))) == 3
    assert not out.exists()
    return partial


def test_a_killed_convert_goes_on(sharded, tmp_path, capsys):
    """Catches a file that is taken for whole, one that is made twice, leftovers in the folder."""
    out = placed(tmp_path / "a")
    partial = kill(sharded, out)
    before = {p.name: p.stat().st_mtime_ns for p in (partial / "folder").glob("model-*")}
    convert(str(sharded), out, **SETTINGS)
    total = len(list(sharded.glob("*.safetensors")))
    assert f"resuming: 3 of {total} shards are done" in capsys.readouterr().err
    for name, made in before.items():
        assert (out / name).stat().st_mtime_ns == made
    undisturbed = placed(tmp_path / "b")
    convert(str(sharded), undisturbed, **SETTINGS)
    assert contents(out) == contents(undisturbed)
    assert list(out.parent.iterdir()) == [out]


def test_another_source_or_option_starts_again(sharded, tmp_path, capsys):
    """Catches files of two models, or of two layouts, in one folder."""
    source = shutil.copytree(sharded, tmp_path / "source")
    out = placed(tmp_path / "a")
    kill(source, out)
    first = sorted(source.glob("*.safetensors"))[0]
    save_file({k: 2 * v for k, v in load_file(first).items()}, first, {"format": "pt"})
    convert(str(source), out, head="dense", quantize="w4a16")
    err = capsys.readouterr().err
    assert "starting again" in err
    assert "resuming" not in err
    fresh = placed(tmp_path / "b")
    convert(str(source), fresh, head="dense", quantize="w4a16", progress=False)
    assert contents(out) == contents(fresh)


def test_ctrl_c_keeps_what_is_finished(sharded, tmp_path, capsys, monkeypatch):
    out = tmp_path / "variant"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("flashhead.convert.head.save_index", interrupt)
        arguments = ["--quantize", "w4a16", "--set", "calibration_tokens=64", "--set", "bits=2"]
        assert main(["convert", str(sharded), str(out), *arguments]) == 130
    total = len(list(sharded.glob("*.safetensors")))
    said = f"{total} of {total} shards are kept in .variant.partial; the same command goes on"
    assert said in capsys.readouterr().err
    assert not out.exists()
    assert main(["convert", str(sharded), str(out), *arguments]) == 0
    assert f"resuming: {total} of {total} shards are done" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [out]


def test_two_converts_of_one_folder(sharded, tmp_path):
    """Catches two processes that write the same files; the lock ends with its process."""
    out = tmp_path / "variant"
    with Workspace(out, {}), pytest.raises(FlashHeadError, match="another process is making it"):
        convert(str(sharded), out, progress=False, **SETTINGS)
    assert list(tmp_path.iterdir()) == []
    with Workspace(out, {}):
        pass


MEASURED = """
import json, sys
from pathlib import Path
import torch
from flashhead.convert.shards import plan_shards
from flashhead.convert.workspace import Workspace
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
    return 1024 * int(found["VmHWM"]), 1024 * int(found["VmRSS"])
with Workspace(Path(sys.argv[2]).with_name("warm"), {}, False) as work:
    plan_shards(Path(sys.argv[1]), "w4a16").write(work, False)  # lazy imports, thread pools
with Workspace(Path(sys.argv[3]), {}, False) as work:
    plan = plan_shards(Path(sys.argv[2]), "w4a16")
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()[1]
    plan.write(work, False)
    print(json.dumps([peak()[0] - before, plan.head_bytes]))
"""


def test_memory_is_that_of_a_shard(sharded, tmp_path):
    """Catches the whole model in memory: peak of all resident pages, those of the mapped file too,
    under 1.3 times the largest of 8 files and the head."""
    config = LlamaConfig(
        vocab_size=4000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    torch.manual_seed(0)
    folder = tmp_path / "source"
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="48MB")
    del model
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert len(sizes) >= 6
    assert sum(sizes) >= 300e6
    command = [sys.executable, "-c", MEASURED, str(sharded), str(folder), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, head = json.loads(done.stdout.splitlines()[-1])
    print(
        f"peak {peak / 1e6:.0f} MB, largest file {max(sizes) / 1e6:.0f} MB, head {head / 1e6:.0f}"
    )
    assert 0.3 * max(sizes) < peak < 1.3 * max(sizes) + head


def test_what_goes_through_memory_is_said(sharded, tmp_path, caplog):
    """Catches a tensor that is dropped, or copied into a folder whose model has no place for it."""
    source = shutil.copytree(sharded, tmp_path / "source")
    index = source / "model.safetensors.index.json"
    named = json.loads(index.read_text())
    file = named["weight_map"]["model.norm.weight"]
    tensors = load_file(source / file) | {"model.rotary.inv_freq": torch.ones(4)}
    save_file(tensors, source / file, {"format": "pt"})
    named["weight_map"]["model.rotary.inv_freq"] = file
    index.write_text(json.dumps(named))
    report = convert(str(source), tmp_path / "o", head="dense", quantize="fp8", progress=False)
    assert not report["by_shards"]
    assert "model.rotary.inv_freq of the checkpoint is no parameter of Qwen2" in caplog.text


def test_names_by_convention(tiny_folder, sharded, tmp_path, monkeypatch, capsys):
    def named(source: Path, **changes: object) -> str:
        asked = {"head": "codes", "quantize": None, **changes}
        return str(default_name(str(source), source, **asked))

    assert named(sharded) == "Qwen2-Tiny-FlashHead"
    assert named(sharded, quantize="w4a16") == "Qwen2-Tiny-FlashHead-W4A16"
    assert named(sharded, head="dense", quantize="w8a8-int8") == "Qwen2-Tiny-W8A8-INT8"
    assert named(Path("x/Model.Q4_K.gguf")) == "Model.Q4_K-FlashHead"
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(sharded), "--head", "dense", "--quantize", "w8a16"]) == 0
    assert "wrote Qwen2-Tiny-W8A16: its dense head" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["Qwen2-Tiny-W8A16"]
    source = shutil.copytree(tiny_folder, tmp_path / "snapshot")
    config = json.loads((source / "config.json").read_text()) | {"_name_or_path": "owner/Base-1B"}
    (source / "config.json").write_text(json.dumps(config))
    assert named(source, quantize="fp8") == "Base-1B-FlashHead-FP8"


def test_a_snapshot_has_the_weights_that_are_named(sharded, monkeypatch):
    """Catches gigabytes of `consolidated.safetensors` that nothing reads."""
    asked = []

    def snapshot(model: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(sharded)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert local_source("owner/Qwen2-Tiny") == sharded
    weights = {path.name for path in sharded.glob("*.safetensors")}
    assert {name for name in asked[1] if "safetensors" in name} == weights
    assert not any("safetensors" in name or name == "*.py" for name in asked[0])


def test_inspect_says_what_is_stored_twice(sharded, tmp_path, capsys):
    out = tmp_path / "variant"
    convert(str(sharded), out, progress=False, **SETTINGS)
    assert main(["inspect", str(out)]) == 0
    text = capsys.readouterr().out
    assert "Stored twice: the head, and nothing of the body. Its exact rows (0.1 MB, bfloat" in text
    assert "as codes, because" in text
