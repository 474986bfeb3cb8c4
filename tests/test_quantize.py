"""Quantized variants: what is written is what was rounded, and the head still finds its winners."""

import builtins
import copy
import json

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import flashhead
from flashhead.convert.head import convert
from flashhead.convert.quantize import Quantized
from flashhead.errors import FlashHeadError
from flashhead.integrations.transformers import head_of, load_dense, load_tokenizer
from flashhead.models import resolve
from flashhead.options import QUANTIZE

NAME = "model.layers.1.mlp.up_proj"
TEXT = "The river was higher than anyone had seen it, and the bridge had been closed since noon."


def tiny(hidden: int = 64, **changes: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=515,
        hidden_size=hidden,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **changes,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def linear_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: module.weight.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


@pytest.mark.parametrize("kind", QUANTIZE)
def test_the_folder_holds_the_rounded_weights(kind, tmp_path):
    """Catches codes that differ by one, scales at the wrong group, a head that was rounded too."""
    model = tiny()
    before = linear_weights(model)
    quantized = Quantized(model, kind, progress=False)
    rounded = linear_weights(model)
    assert torch.equal(rounded["lm_head"], before["lm_head"])
    bits = 4 if kind == "w4a16" else 8
    for name in before.keys() - {"lm_head"}:
        error = float((rounded[name].float() - before[name].float()).abs().max())
        # half a step of the widest scale (of fp8 at its largest: 1/14 of that value), and bf16's
        # rounding of the scale and of the product
        largest = float(before[name].float().abs().max())
        step = largest / (14 if kind == "fp8" else 2 ** (bits - 1) - 0.5)
        assert 0 < error <= step / 2 + largest * 2**-8
    quantized.save(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (written["quant_method"], written["ignore"]) == ("compressed-tensors", ["lm_head"])
    loaded = load_dense(str(tmp_path), dtype=torch.bfloat16)
    with torch.no_grad():
        loaded(torch.tensor([[1, 2, 3]]))  # the library unpacks at the first call
    for name, weight in linear_weights(loaded).items():
        assert torch.equal(weight, rounded[name]), name


def test_groups_divide_the_layers():
    assert Quantized(tiny(), "w4a16", progress=False).group == 64
    assert Quantized(tiny(96), "w4a16", progress=False).group == 32
    with pytest.raises(FlashHeadError, match="has 72 inputs, no multiple of 32"):
        Quantized(tiny(72), "w4a16", progress=False)


def test_what_cannot_be_quantized_is_refused(tmp_path):
    model = tiny()
    with pytest.raises(FlashHeadError, match="wanted one of w4a16"):
        Quantized(model, "w3a16", progress=False)
    Quantized(model, "w8a16", progress=False).save(tmp_path)
    with pytest.raises(FlashHeadError, match="quantized already"):
        Quantized(load_dense(str(tmp_path)), "w4a16", progress=False)
    experts = MixtralConfig(
        vocab_size=515,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    with pytest.raises(FlashHeadError, match="not in linear layers"):
        Quantized(MixtralForCausalLM(experts), "w4a16", progress=False)


def test_a_missing_library_is_named(monkeypatch):
    found = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("compressed_tensors"):
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'flashhead\[quantize\]'"):
        Quantized(tiny(), "w4a16", progress=False)


def test_an_index_alone_has_nothing_to_quantize(tmp_path):
    with pytest.raises(FlashHeadError, match="index_only"):
        convert("smollm2-135m", tmp_path / "x", quantize="w4a16", index_only=True)
    assert not (tmp_path / "x").exists()


def test_a_quantized_checkpoint_keeps_its_files(tiny_folder, tmp_path):
    """An index for it is built on the unpacked model, whose weights must not be what is written."""
    settings = {"progress": False, "calibration_tokens": 64}
    first, second = tmp_path / "first", tmp_path / "second"
    convert(tiny_folder, first, head="dense", quantize="w8a8-int8", progress=False)
    report = convert(str(first), second, bits=2, planes=1, **settings)
    assert report["quantize"] is None
    for name in ("model.safetensors", "generation_config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (first, second)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert ("flashhead" in configs[0], "flashhead" in configs[1]) == (False, True)
    models = [flashhead.load(str(folder), progress=False) for folder in (first, second)]
    ids = torch.tensor([[1, 5, 9, 30, 7]])
    with torch.no_grad():
        states = [model.base_model(ids).last_hidden_state[0] for model in models]
    assert torch.equal(*states)
    tokens = [
        head_of(model).next_token(own).tokens for model, own in zip(models, states, strict=True)
    ]
    assert torch.equal(*tokens)


@pytest.mark.model
def test_a_variant_of_a_real_model(tmp_path):
    """SmolLM2-135M in W4A16: winners are those of the quantized model's own float32 head."""
    out = tmp_path / "SmolLM2-135M-FlashHead-W4A16"
    report = convert(
        "smollm2-135m", out, quantize="w4a16", progress=False, calibration_tokens=512, bits=1.5,
        planes=2,
    )  # fmt: skip
    rounded = {"kind": "w4a16", "layers": 210, "group_size": 64, "method": "rounded to nearest"}
    assert report["quantize"] == rounded
    assert report["folder_bytes"] < 0.6 * report["model_bytes"]
    model = flashhead.load(str(out), progress=False)
    dense = load_dense(resolve("smollm2-135m"))
    head = head_of(model)
    assert torch.equal(head.weight, dense.get_output_embeddings().weight)
    ids = load_tokenizer(str(out))(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        hidden = model.base_model(ids).last_hidden_state[0]
        other = dense.base_model(ids).last_hidden_state[0]
    assert not torch.equal(hidden, other), "the layers were not rounded"
    found = head.next_token(hidden)
    assert bool(found.certified.all())
    assert not found.fallback.any()
    exact = hidden.double() @ head.weight.double().T
    assert torch.equal(found.tokens, exact.argmax(1))


def test_loading_without_the_library_names_it(tmp_path, monkeypatch):
    """A packed checkpoint is no GGUF: the hint must not send its user there."""
    Quantized(tiny(), "w8a16", progress=False).save(tmp_path)
    module = "transformers.quantizers.quantizer_compressed_tensors"
    monkeypatch.setattr(f"{module}.is_compressed_tensors_available", lambda: False)
    with pytest.raises(FlashHeadError, match=r"pip install 'flashhead\[quantize\]'"):
        load_dense(str(tmp_path))


def learned(steps: int = 60) -> tuple[LlamaForCausalLM, list[torch.Tensor]]:
    """A tiny model that has learned a simple language (each word names the next), and its text."""
    model = tiny()
    order = torch.randperm(512, generator=torch.Generator().manual_seed(3)) + 3
    starts = torch.randint(0, 512, (96, 1), generator=torch.Generator().manual_seed(4))
    text = order[(starts * 7 + torch.arange(48) * (starts % 5 + 1)) % 512]
    optimizer = torch.optim.AdamW(model.float().parameters(), lr=3e-3)
    for step in range(steps):
        batch = text[step % 4 * 16 : step % 4 * 16 + 16]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.bfloat16().eval(), list(text)


@torch.no_grad()
def divergence(model: nn.Module, truth: torch.Tensor, text: torch.Tensor) -> float:
    found = model(input_ids=text).logits.float().log_softmax(-1)
    return float((truth.exp() * (truth - found)).sum(-1).mean())


def test_calibration_rounds_better_than_to_nearest(tmp_path):
    """GPTQ runs, keeps the head, and costs less on other text than rounding to nearest does."""
    model, text = learned()
    model.save_pretrained(tmp_path / "learned")  # the library wants a model with a place
    model = load_dense(str(tmp_path / "learned"))
    before = linear_weights(model)
    held_out = torch.stack(text[64:])
    with torch.no_grad():
        truth = model(input_ids=held_out).logits.float().log_softmax(-1)
    nearest = copy.deepcopy(model)
    Quantized(nearest, "w4a16", progress=False)
    quantized = Quantized(model, "w4a16", progress=False, windows=text[:64])
    assert quantized.described()["method"] == "GPTQ"
    rounded = linear_weights(model)
    assert torch.equal(rounded["lm_head"], before["lm_head"])
    assert not torch.equal(rounded[NAME], linear_weights(nearest)[NAME])
    assert divergence(model, truth, held_out) < divergence(nearest, truth, held_out)
    out = tmp_path / "out"
    out.mkdir()
    quantized.save(out)
    loaded = load_dense(str(out))
    for name, weight in linear_weights(loaded).items():
        assert torch.equal(weight, rounded[name]), name
    packed = load_dense(str(out), packed=True)
    assert type(packed.get_submodule(NAME)).__name__ == "Int4Linear"


def test_calibration_that_cannot_be_used_is_refused():
    with pytest.raises(FlashHeadError, match=r"40 tokens: wanted 1,024 or more"):
        Quantized(tiny(), "w4a16", progress=False, windows=[torch.arange(40)])
    with pytest.raises(FlashHeadError, match=r"quantize='fp8' with calibration"):
        Quantized(tiny(), "fp8", progress=False, windows=[torch.arange(2000)])


def test_converting_with_a_text(tiny_folder, tmp_path):
    """The files go through `convert` into the card, and a text without a use is an error."""
    text, out = tmp_path / "words.txt", tmp_path / "out"
    words = torch.randint(3, 515, (3000,), generator=torch.Generator().manual_seed(0)).tolist()
    text.write_text(" ".join(f"w{word}" for word in words))
    folder = tmp_path / "wide"
    tiny(tie_word_embeddings=True).save_pretrained(folder)
    load_tokenizer(tiny_folder).save_pretrained(folder)
    with pytest.raises(FlashHeadError, match="calibration without quantize"):
        convert(str(folder), out, calibration=[text], progress=False)
    short = tmp_path / "short.txt"
    short.write_text("w5 w6 w7")
    settings = {"quantize": "w4a16", "head": "dense", "progress": False}
    with pytest.raises(FlashHeadError, match="wanted 1,024 or more"):
        convert(str(folder), out, calibration=[short], **settings)
    assert not out.exists()
    assert list(tmp_path.glob(".out*")) == []
    report = convert(str(folder), out, calibration=[text], **settings)
    assert report["quantize"]["method"] == "GPTQ"
    assert load_dense(str(out)).config.tie_word_embeddings
    assert "words.txt" in (out / "README.md").read_text()
