"""One folder, one load: latents, index and quantized layers; strict about what it reads."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import flashhead
from flashhead.cli import main
from flashhead.convert.head import convert
from flashhead.errors import FlashHeadError
from flashhead.integrations.latent_cache import LatentCache
from flashhead.integrations.latent_model import latent_modules
from flashhead.integrations.transformers import head_of, load_dense, load_tokenizer
from flashhead.options_latent import LatentOptions

SETTINGS = {"progress": False, "calibration_tokens": 64}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """500 words of the tiny tokenizer."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, 515, (700,), generator=generator).tolist()
    path.write_text(" ".join(f"w{word}" for word in words))
    return path


@pytest.fixture(scope="module")
def folder(tiny_folder, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("latent") / "out"
    options = LatentOptions(kv_ratio=1.0, kv_dtype="int8", calibration=(text,))
    convert(tiny_folder, out, attention=options, **SETTINGS)
    return out


def test_one_folder_one_load(folder, tiny_model):
    """The index and the latents come back together, and ratio 1 is the same model."""
    model = flashhead.load(str(folder), dtype=torch.float32, progress=False)
    assert head_of(model).index is not None
    assert model.latent_store.kind == "int8"
    ids = torch.tensor([[1, 5, 9, 30, 7, 77]])
    with torch.no_grad():
        got = model.base_model(ids, use_cache=False).last_hidden_state
        want = tiny_model.base_model(ids, use_cache=False).last_hidden_state
    # weights went through bf16; the tiny model's own did not
    assert (got - want).abs().max() < 0.03 * want.abs().max()
    out = model.generate(ids, max_new_tokens=4, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, LatentCache)
    weights = load_file(folder / "model.safetensors")
    assert not [name for name in weights if "k_proj" in name or "v_proj" in name]
    assert load_tokenizer(str(folder)).vocab_size == 515


def test_plain_transformers_refuses_it(folder):
    """It would fill keys and values with noise."""
    from transformers import AutoModelForCausalLM

    with pytest.raises(ValueError, match="flashhead_latent"):
        AutoModelForCausalLM.from_pretrained(folder)


def changed(folder, tmp_path, change):
    other = tmp_path / "changed"
    shutil.copytree(folder, other)
    path = other / "config.json"
    config = json.loads(path.read_text())
    change(config["flashhead_latent"])
    path.write_text(json.dumps(config))
    return str(other)


def _layer(section):
    return section["layers"]["model.layers.1.self_attn"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.update(version=3), "version 3, this flashhead reads 2"),
        (lambda s: s.pop("kv_dtype"), "wanted kv_dtype, layers"),
        (lambda s: s.update(kv_dtype="int3"), "kv_dtype='int3'"),
        (lambda s: s.update(model_type="nothing"), "known model type"),
        (lambda s: s["layers"].popitem(), "1 layers, the model has 2"),
        (lambda s: _layer(s).update(rank=10**12), "rank="),
        (lambda s: _layer(s).update(rank=24), "wanted"),
        (lambda s: _layer(s).update(hidden_size=64), "hidden_size=64, wanted 48"),
        (lambda s: _layer(s).update(scale="x"), "scale='x'"),
        (lambda s: _layer(s).update(extra=1), "a layer's fields"),
    ],
)
def test_a_section_that_does_not_fit(change, match, folder, tmp_path):
    with pytest.raises(FlashHeadError, match=match):
        load_dense(changed(folder, tmp_path, change))


@pytest.mark.parametrize("what", ["missing", "shape", "unknown", "damaged"])
def test_weights_that_do_not_fit(what, folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    path = other / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.0.self_attn.key_up"
    if what == "missing":
        del weights[name]
    elif what == "shape":
        weights[name] = weights[name][:, :-1].contiguous()
    else:
        weights["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(3)
    save_file(weights, path, metadata={"format": "pt"})
    if what == "damaged":
        path.write_bytes(path.read_bytes()[:1000])
    match = {"missing": "no tensor", "shape": "wanted", "unknown": "not known",
             "damaged": "damaged"}[what]  # fmt: skip
    with pytest.raises(FlashHeadError, match=match):
        load_dense(str(other))


def test_a_latent_model_gets_a_new_index(folder, tmp_path):
    """A converted folder is not converted again; an index alone can be made of it."""
    again = tmp_path / "again"
    with pytest.raises(FlashHeadError, match="has an index already"):
        convert(str(folder), again, head="clusters", **SETTINGS)
    assert not again.exists()
    convert(str(folder), again, head="clusters", index_only=True, **SETTINGS)
    assert '"clusters"' in (again / "config.json").read_text()


def test_with_quantized_layers(tiny_folder, text, tmp_path):
    pytest.importorskip("compressed_tensors")
    from transformers import LlamaConfig, LlamaForCausalLM

    wide, out = tmp_path / "wide", tmp_path / "both"  # groups of 32 divide its layers
    shutil.copytree(tiny_folder, wide)
    config = LlamaConfig.from_pretrained(tiny_folder)
    config.hidden_size, config.head_dim = 64, 16
    LlamaForCausalLM(config).save_pretrained(wide)
    tiny_folder = str(wide)
    options = LatentOptions(kv_ratio=8.0, calibration=(text,))
    report = convert(tiny_folder, out, attention=options, quantize="w8a16", **SETTINGS)
    assert report["latent"]["kv_ratio"] >= 8
    model = flashhead.load(str(out), progress=False)
    assert len(latent_modules(model)) == 2
    assert torch.isfinite(model(torch.tensor([[1, 5, 9]])).logits).all()
    plain = tmp_path / "plain"
    convert(tiny_folder, plain, quantize="w8a16", head="dense", progress=False)
    with pytest.raises(FlashHeadError, match="quantized already"):
        convert(str(plain), tmp_path / "no", attention=options, **SETTINGS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tiny_folder, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--attention", "latent", "--head", "dense", "--device", "cuda"]
    assert main(["convert", tiny_folder, str(out), *arguments]) == 2
    assert "--device cuda: torch sees no GPU" in capsys.readouterr().err
    assert not out.exists()


def test_eval_against(folder, tiny_folder, text, capsys):
    """`eval MODEL` is found by its absence of a subcommand; decoded tokens and bytes are stated."""
    arguments = ["--against", tiny_folder, "--data", str(text), "--limit", "300", "--window", "64"]
    assert main(["eval", str(folder), *arguments, "--decode-share", "0.25", "--json"]) == 0
    task = json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"]["perplexity"]
    assert task["ratio"] == pytest.approx(1, abs=0.01)
    assert task["value"] / task["base"] == pytest.approx(task["ratio"])
    assert set(task["rows"]) == {"base", "fp8", "int4", "value"}
    base, value = (task["cache_bytes_per_token"][name] for name in ("base", "value"))
    assert base == 2 * 2 * 24 * 2
    assert value == 2 * (48 + 2)  # ratio 1, int8, one scale
    decoded = task["rows"]["value"]["decoded_tokens"] / (task["rows"]["value"]["tokens"] + 5)
    assert 0.2 < decoded < 0.3
    assert "select" not in task


def test_eval_of_a_selection(folder, tiny_folder, text, capsys):
    """A selection that is asked for and not made; codes that are not counted."""
    arguments = ["--against", tiny_folder, "--data", str(text), "--limit", "300", "--window", "64"]
    assert main(["eval", str(folder), *arguments, "--kv-select", "20", "--json"]) == 0
    task = json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"]["perplexity"]
    assert task["select"]["tokens"] == 20
    assert 1e-6 < abs(task["ratio"] - 1) < 0.2
    assert task["cache_bytes_per_token"]["value"] == 2 * (48 + 2 + 2 * (3 + 2))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["convert", "{tiny}", "{out}", "--kv-ratio", "2"], "--kv-ratio: wanted --attention"),
        (["convert", "{tiny}", "{out}", "--attention", "latent", "--kv-ratio", "0.5"], "from 1"),
        (["convert", "{tiny}", "{out}", "--attention", "latent", "--index-only"], "index-only"),
        (["convert", "{tiny}", "{out}", "--device", "cuda"], "--device: wanted --attention"),
        (["eval", "{tiny}", "--against", "{tiny}", "--data", "{text}", "--limit", "9999"], "has"),
        (["eval", "{tiny}", "--against", "{tiny}", "--data", "{text}", "--kv-dtype", "int4",
          "--limit", "20"],
         "no latent attention"),
        (["eval", "{tiny}", "--against", "{tiny}", "--data", "{text}", "--kv-select", "64",
          "--limit", "20"],
         "--kv-select: {tiny} has no latent attention"),
        (["eval", "{tiny}", "--against", "{tiny}", "--data", "{text}", "--kv-select", "17"],
         "'17': wanted an integer, 18 or more"),
        (["eval", "{tiny}", "--data", "{text}"], "--against"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(arguments, match, tiny_folder, text, tmp_path, capsys):
    places = {"tiny": tiny_folder, "out": tmp_path / "out", "text": text}
    try:
        code = main([argument.format(**places) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2
    assert match.format(**places) in error
