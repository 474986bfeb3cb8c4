"""What `flashhead convert` refuses: one line, exit code 2, and nothing left beside the source."""

import errno
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from flashhead.cli import main
from flashhead.convert.head import convert
from flashhead.errors import FlashHeadError

FEW = ("--set", "calibration_tokens=64", "--set", "bits=2", "--set", "planes=1")
QUANTIZED = ("--quantize", "w8a8-int8", *FEW)


@pytest.fixture
def source(tiny_folder, tmp_path) -> Path:
    """The tiny model in two weight files, to break."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "source"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, placed = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        placed |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder


def refused(source: Path, capsys, *options: str, out: Path | None = None) -> str:
    """The line; convert must end with 2 and leave nothing."""
    out = out or source.parent / "out"
    assert main(["convert", str(source), str(out), *(options or QUANTIZED)]) == 2
    assert sorted(path.name for path in source.parent.iterdir()) == [source.name]
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("flashhead: ")]
    assert len(lines) == 1
    return lines[0]


def edit(source: Path, **changes: object) -> None:
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("options", [QUANTIZED, FEW])
def test_a_disk_that_is_too_small(source, capsys, monkeypatch, options):
    usage = shutil._ntuple_diskusage(10**9, 10**9, 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    assert "out: needs 0.0 GB, 0.0 GB are free there" in refused(source, capsys, *options)


@pytest.mark.parametrize("text", ["python", "safetensors"])
def test_a_disk_that_fills_up(source, capsys, monkeypatch, text):
    """Catches a partial folder that keeps the disk full; the second weight file does not fit."""
    from safetensors import SafetensorError

    calls = []
    error = OSError(errno.ENOSPC, "No space left on device")
    if text == "safetensors":
        error = SafetensorError("I/O error: No space left on device (os error 28)")

    def full(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 2:
            raise error
        save_file(tensors, path, metadata)

    monkeypatch.setattr("flashhead.convert.shards.save_file", full)
    assert "out: the disk is full; what was written is removed" in refused(source, capsys)
    assert len(calls) == 2


def test_a_write_to_a_full_device_is_one_line(source, capsys, monkeypatch):
    """Catches a full disk that is told by a traceback (written by Python, not by safetensors)."""
    monkeypatch.setattr(
        "flashhead.convert.shards.save_file", lambda *a: Path("/dev/full").write_bytes(b"x" * 9999)
    )
    assert "the disk is full" in refused(source, capsys)


def test_a_missing_or_truncated_shard(source, capsys):
    file = source / "model-00002-of-00002.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    line = refused(source, capsys)
    assert f"is not whole: {file.name}: {len(data) - 100:,} bytes, its header says" in line
    file.unlink()
    assert f"{file.name}: missing, but model.safetensors.index.json" in refused(source, capsys)
    assert f"{file.name}: missing" in refused(source, capsys, *FEW)


def test_a_missing_tensor(source, capsys):
    index = source / "model.safetensors.index.json"
    placed = json.loads(index.read_text())["weight_map"]
    file = source / placed.pop("model.norm.weight")
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, {"format": "pt"})
    index.write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    assert "is not whole: no file of it holds model.norm.weight" in refused(source, capsys)


def test_a_head_that_is_replaced_already(source, capsys):
    edit(source, flashhead={"index": "codes"})
    assert "has an index already: convert its base, or make a new" in refused(source, capsys)
    assert "has an index already" in refused(source, capsys, *FEW)


def test_unsupported_architectures(source, capsys):
    edit(source, quantization_config={"quant_method": "gptq"})
    assert "the model is quantized already" in refused(source, capsys)
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    bert = {**config, "model_type": "bert", "architectures": ["BertForMaskedLM"]}
    (source / "config.json").write_text(json.dumps(bert))
    assert "BertForMaskedLM predicts masked tokens: wanted a causal LM" in refused(source, capsys)
    unknown = {**config, "model_type": "nobody-knows", "architectures": ["NobodyKnows"]}
    (source / "config.json").write_text(json.dumps(unknown))
    assert "cannot be loaded: " in refused(source, capsys)


def test_unknown_words(source):
    for changes, said in (
        ({"quantize": "w3a16"}, "wanted one of w4a16"),
        ({"head": "sparse"}, "wanted one of codes"),
        ({"head": "dense"}, "nothing to convert"),
        ({"head": "dense", "quantize": "w4a16", "bits": 2}, "takes no options"),
    ):
        with pytest.raises(FlashHeadError, match=said):
            convert(str(source), source.parent / "out", progress=False, **changes)
    assert sorted(source.parent.iterdir()) == [source]


def test_places_that_cannot_be_written(source, capsys):
    assert "exists: nothing is written over" in refused(source, capsys, out=source)
    nowhere = source.parent / "no" / "out"
    assert "its parent folder does not exist" in refused(source, capsys, out=nowhere)
    assert "cannot write to /proc" in refused(source, capsys, out=Path("/proc/flashhead-out"))


def test_a_layout_that_nobody_knows(source, capsys):
    """The same by the command: one line, nothing written."""
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(source), str(source.parent / "out"), "--quantize", "w3a16"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--quantize: invalid choice: 'w3a16'" in line
    assert sorted(source.parent.iterdir()) == [source]
