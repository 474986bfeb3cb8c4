"""Checkpoints that others quantized: an index is added, the body stays byte by byte."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

import flashhead
from flashhead.cli import main
from flashhead.convert.head import convert
from flashhead.errors import FlashHeadError
from flashhead.integrations.transformers import head_of, load_dense, load_tokenizer
from flashhead.integrations.unpacked import unpacked

sys.path.append(str(Path(__file__).parent / "engines"))
import checkpoints

LAYER = "model.layers.1.mlp.down_proj"
IDS = torch.tensor([[1, 5, 9, 30, 7, 400, 12]])


@pytest.fixture
def base(tiny_folder, tmp_path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=515,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    folder = tmp_path / "base"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    load_tokenizer(tiny_folder).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["awq", "gptq", "w4a16", "w8a8"])
def test_an_index_is_added_and_the_body_is_not_touched(kind, base, tmp_path):
    """Catches codes read in another order, weights written anew, a scheme that config.json loses.

    The layouts are written here as AutoAWQ's and AutoGPTQ's are, without their libraries.
    """
    source = checkpoints.quantized(base, tmp_path / kind, kind)
    out = tmp_path / "out"
    convert(str(source), out, progress=False, calibration_tokens=64, bits=2, planes=1)
    name = "model.safetensors"
    assert (out / name).read_bytes() == (source / name).read_bytes()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, out)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert configs[1]["flashhead"]["index"] == "codes"
    model, dense = flashhead.load(str(out), progress=False), load_dense(str(base))
    with torch.no_grad():
        hidden = model.base_model(IDS).last_hidden_state[0]
    found = head_of(model).next_token(hidden)
    exact = hidden.double() @ dense.get_output_embeddings().weight.double().T
    assert torch.equal(found.tokens, exact.argmax(1))
    weight = dense.get_submodule(LAYER).weight.float()
    rounded = load_dense(str(source)).get_submodule(LAYER).weight.float()
    groups = weight.unflatten(1, (-1, checkpoints.GROUP))
    step = (groups.amax(2) - groups.amin(2).clamp(max=0)).amax() / (15 if kind != "w8a8" else 255)
    error = (rounded - weight).abs()
    # half a step of the widest group, which a symmetric scale doubles at most; bf16's rounding
    assert 0 < float(error.max()) <= float(step) * 1.1 + float(weight.abs().max()) * 2**-8
    assert float(error.square().mean().sqrt()) < float(step) / 2


def test_gptq_in_an_order_of_its_own(base, tmp_path):
    """`desc_act`: inputs belong to groups in any order; zeros of "gptq_v2" are as they are."""
    source = checkpoints.quantized(base, tmp_path / "gptq", "gptq")
    with safe_open(source / "model.safetensors", "pt") as file:
        parts = {
            part: file.get_tensor(f"{LAYER}.{part}")
            for part in ("qweight", "qzeros", "scales", "g_idx")
        }
    settings = {"quant_method": "gptq", "bits": 4}
    plain = unpacked(parts, settings)
    by_default = {name: tensor for name, tensor in parts.items() if name != "g_idx"}
    assert torch.equal(unpacked(by_default, settings), plain)
    order = torch.randperm(len(parts["g_idx"]), generator=torch.Generator().manual_seed(0))
    codes = plain.T / parts["scales"].float()[parts["g_idx"].long()]
    swapped = unpacked(parts | {"g_idx": parts["g_idx"][order]}, settings)
    wanted = codes * parts["scales"].float()[parts["g_idx"][order].long()]
    assert torch.allclose(swapped, wanted.T, rtol=1e-5)
    newer = unpacked(parts, settings | {"checkpoint_format": "gptq_v2"})
    difference = (newer - plain).T / parts["scales"].float()[parts["g_idx"].long()]
    assert torch.allclose(difference, torch.ones(()), atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("awq", {"version": "gemv"}, "awq 'gemv': wanted 'gemm'"),
        ("gptq", {"bits": 3}, "gptq of 3 bits: wanted 4"),
    ],
)
def test_layouts_that_are_not_read_are_refused(kind, changes, said, base, tmp_path, capsys):
    source = checkpoints.quantized(base, tmp_path / kind, kind)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] |= changes
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(FlashHeadError, match=said):
        load_dense(str(source))
    assert main(["convert", str(source), str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
