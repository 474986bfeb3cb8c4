"""`flashhead verify`: a whole folder passes, and each way to break one is named and fails."""

import io
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashhead.cli import main
from flashhead.convert.checksums import read_checksums, write_checksums
from flashhead.convert.head import convert
from flashhead.evaluate.against import compare_models
from flashhead.integrations.transformers import load_dense

FEW = ("--positions", "48")


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory):
    """A W8A8 variant of the tiny model with its checksums."""
    out = tmp_path_factory.mktemp("made") / "tiny-w8"
    settings = {"progress": False, "calibration_tokens": 64, "quantize": "w8a8-int8"}
    convert(tiny_folder, out, **settings)
    write_checksums(out)
    return out


@pytest.fixture
def folder(made, tmp_path):
    """A copy to break."""
    return shutil.copytree(made, tmp_path / "copy")


def failed(folder, capsys, *options) -> str:
    """The one line that says what failed; verify must end with 1, and write nothing."""
    before = sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*"))
    assert main(["verify", str(folder), *FEW, *options]) == 1
    captured = capsys.readouterr()
    assert sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*")) == before
    assert "Traceback" not in captured.err
    lines = [line for line in captured.out.splitlines() if line.startswith("FAILED")]
    assert len(lines) == 1
    assert captured.out.splitlines()[-1] == lines[0], "a step ran on a folder that is broken"
    return lines[0]


def shard(folder) -> list[str]:
    """The folder's one weight file as two shards, with the list renewed."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for file, half in zip(files, halves, strict=True):
        save_file({name: tensors[name] for name in half}, folder / file, {"format": "pt"})
    placed = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    write_checksums(folder)
    return files


def flip(path, place: int = -5) -> None:
    """Change one byte of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 0x40
    path.write_bytes(data)


def test_a_whole_folder_passes(folder, tiny_folder, tmp_path, capsys):
    """Figures that are missing from the document, or a folder that is written to."""
    text = tmp_path / "words.txt"
    text.write_text(" ".join(f"w{3 + 7 * i % 500}" for i in range(400)))
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    command = ["verify", str(folder), *FEW, "--against", tiny_folder, "--json"]
    assert main([*command, "--data", str(text)]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    names = ["files", "checksums", "reload", "positions", "against", "speed"]
    assert [step["name"] for step in document["steps"]] == names
    assert captured.err.count("ok  ") == len(names)
    figures = document["positions"]
    assert figures["positions"] == 48
    assert (figures["certified_agreement"], figures["certified_wrong"]) == (1, 0)
    assert figures["text"] == "words.txt"
    assert 0 < document["against"]["kl"] < 0.1
    assert document["against"]["perplexity_ratio"] == pytest.approx(1, abs=0.05)
    assert document["speed"]["speedup"] > 0
    assert str(tmp_path) not in json.dumps(document)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_shards_pass(folder, capsys):
    """Shards that are taken for a broken single file; text that is not 48 positions long."""
    shard(folder)
    assert main(["verify", str(folder), *FEW, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["positions"]["positions"] == 48
    assert document["positions"]["text"] == "text that the model sampled"


def test_a_dense_folder(tiny_folder, capsys):
    """A folder without index for which an index is built, as `load` would do."""
    assert main(["verify", tiny_folder, *FEW, "--against", tiny_folder]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "there is no flashhead.sha256.json, so weights are not compared" in lines[1]
    assert lines[3] == "ok      positions: no index, so the head is the dense one"
    assert lines[4].startswith("ok      against: ")
    assert "agreement of dense heads 100.0%" in lines[4]
    assert len(lines) == 5


def test_tampered_byte_of_a_shard(folder, capsys):
    files = shard(folder)
    flip(folder / files[1])
    assert f"checksums: {files[1]}: altered" in failed(folder, capsys)


def test_truncated_shard(folder, capsys):
    files = shard(folder)
    data = (folder / files[0]).read_bytes()
    (folder / files[0]).write_bytes(data[:-100])
    line = failed(folder, capsys)
    assert f"files: {files[0]}: {len(data) - 100:,} bytes, its header says {len(data):,}" in line
    (folder / files[0]).write_bytes(data[:20])
    assert f"files: {files[0]}: its header is damaged" in failed(folder, capsys)


def test_missing_shard(folder, capsys):
    files = shard(folder)
    (folder / files[1]).unlink()
    line = failed(folder, capsys)
    assert f"files: {files[1]}: missing, but model.safetensors.index.json names it" in line


def test_a_shard_without_its_tensor(folder, capsys):
    """transformers makes up a tensor that no file has."""
    files = shard(folder)
    tensors = load_file(folder / files[1])
    lost = min(tensors)
    del tensors[lost]
    save_file(tensors, folder / files[1], {"format": "pt"})
    write_checksums(folder)
    assert f"files: {files[1]}: no tensor {lost!r}" in failed(folder, capsys)


@pytest.mark.parametrize("lost", ["up_proj.weight", "up_proj.weight_scale", "model.norm.weight"])
def test_a_lost_tensor_is_not_made_up(folder, lost, capsys):
    """transformers fills a gap in a single file with random numbers, and says so in a log only."""
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith(lost))
    packed = not tensors[name].is_floating_point()
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_checksums(folder)
    line = failed(folder, capsys)
    assert "reload: " in line
    assert "is not whole: no file of it holds" in line
    assert ("packed" if packed else name) in line


def test_edited_config(folder, capsys):
    config = folder / "config.json"
    edited = json.loads(config.read_text()) | {"rms_norm_eps": 0.5}
    config.write_text(json.dumps(edited, indent=2) + "\n")
    assert "checksums: config.json: " in failed(folder, capsys)
    config.write_text("{")
    assert "files: config.json: not JSON" in failed(folder, capsys)
    edited["hidden_size"] = 64
    config.write_text(json.dumps(edited))
    write_checksums(folder)  # even if the list agrees, the weights do not
    assert "reload: " in failed(folder, capsys)


def test_index_of_another_head(folder, tiny_folder, tmp_path, capsys):
    """An index of other weights, copied in with its section: every checksum agrees."""
    model = load_dense(tiny_folder)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.25)
    model.save_pretrained(tmp_path / "other")
    for path in folder.glob("tokenizer*"):
        shutil.copyfile(path, tmp_path / "other" / path.name)
    convert(str(tmp_path / "other"), tmp_path / "b", progress=False, calibration_tokens=64)
    index = "flashhead/index.safetensors"
    shutil.copyfile(tmp_path / "b" / index, folder / index)
    assert f"{index}: " in failed(folder, capsys)
    section = json.loads((tmp_path / "b" / "config.json").read_text())["flashhead"]
    config = json.loads((folder / "config.json").read_text()) | {"flashhead": section}
    (folder / "config.json").write_text(json.dumps(config))
    write_checksums(folder)
    line = failed(folder, capsys)
    assert "reload: " in line
    assert f"{index}: built from other weights" in line


def test_index_without_its_section(folder, capsys):
    """A folder that would silently be served by its dense head."""
    config = json.loads((folder / "config.json").read_text())
    del config["flashhead"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "files: config.json: no flashhead section" in failed(folder, capsys)


def test_weights_that_are_not_the_base_s(folder, tiny_folder, capsys):
    """Noise in the layers is seen against the base only: the head is still its own dense head's."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
            tensors[name] = (40 * noise).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_checksums(folder)
    assert "against: " in failed(folder, capsys, "--against", tiny_folder)


def test_mistakes_are_exit_code_2(folder, tmp_path, capsys):
    """A typing mistake that looks like a broken folder to a script."""
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(tmp_path / "nowhere")])
    assert stopped.value.code == 2
    text = tmp_path / "short.txt"
    text.write_text("w5 w6")
    assert main(["verify", str(folder), "--data", str(text)]) == 2
    assert "the text has only 2 tokens" in capsys.readouterr().err
    assert main(["verify", str(folder), "--against", "./nowhere"]) == 2
    assert "model './nowhere': no such file or folder" in capsys.readouterr().err


def test_checksums_leave_the_card_out(folder):
    """A card written anew that makes its folder fail."""
    (folder / "README.md").write_text("a card")
    (folder / ".env").write_text("SECRET=1")
    write_checksums(folder)
    listed = read_checksums(folder)
    assert {"config.json", "model.safetensors", "flashhead/index.safetensors"} <= set(listed)
    assert not {"README.md", ".env", "flashhead.sha256.json"} & set(listed)
    assert listed["config.json"]["bytes"] == (folder / "config.json").stat().st_size


def test_a_model_against_itself(tiny_folder):
    """Windows of the two models that part, or a perplexity that counts the wrong token."""
    model = load_dense(tiny_folder)
    windows = [torch.tensor([1, 5, 9, 30, 7]), torch.tensor([1, 8, 2, 300])]
    figures = compare_models(model, model, windows, 1, (lambda x: x, lambda x: x))
    assert figures["positions"] == 7
    assert (figures["agreement"], figures["kl"], figures["perplexity_ratio"]) == (1, 0, 1)
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(
                model(window[None]).logits[0, 1:-1].float(), window[2:], reduction="sum"
            )
            for window in windows
        ]
    expected = float(torch.exp((losses[0] + losses[1]) / 5))
    assert figures["perplexity"] == pytest.approx(expected, rel=0.02)


@pytest.mark.model
def test_a_variant_of_a_real_model_is_verified_and_chatted_with(tmp_path, capsys, monkeypatch):
    """SmolLM2-135M in W4A16: steps that only the tiny one passes, a chat that cannot load it."""
    out = tmp_path / "SmolLM2-135M-FlashHead-W4A16"
    settings = {"calibration_tokens": 512, "bits": 1.5, "planes": 2, "quantize": "w4a16"}
    convert("smollm2-135m", out, progress=False, **settings)
    write_checksums(out)
    assert main(["verify", str(out), "--against", "smollm2-135m", "--positions", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["ok", f"{name}:"]
        for name in ("files", "checksums", "reload", "positions", "against", "speed")
    ]
    assert "certified token 100.00% the float32 head's" in lines[3]
    monkeypatch.setattr("sys.stdin", io.StringIO("Name a colour.\n"))
    assert main(["chat", str(out), "--max-new-tokens", "8", "--json"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["totals"]["new_tokens"] > 0
