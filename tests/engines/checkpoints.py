"""Checkpoints that tests serve: real weights quantized, and a tiny random mixture of experts."""

import json
import shutil
from pathlib import Path

import torch
from compressed_tensors.compressors import pack_to_int32
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

GROUP = 64


def quantized(source: Path, out: Path, kind: str) -> Path:
    """The model of `source`, linear layers rounded to nearest, in compressed-tensors' format.

    Args:
        source: bf16 folder without an index.
        out: folder to make.
        kind: "w8a8" or "w4a16"; the head stays as it is, as quantizers leave it.
    """
    shutil.copytree(source, out)
    weights = load_file(out / "model.safetensors")
    coded: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if not name.endswith("_proj.weight"):
            coded[name] = tensor
            continue
        stem = name.removesuffix(".weight")
        if kind == "w8a8":
            scale = tensor.float().abs().amax(1, keepdim=True) / 127
            coded[name] = (tensor.float() / scale).round().clamp(-127, 127).to(torch.int8)
            coded[f"{stem}.weight_scale"] = scale.bfloat16()
        else:
            groups = tensor.float().unflatten(1, (-1, GROUP))
            scale = groups.abs().amax(2, keepdim=True) / 7
            codes = (groups / scale).round().clamp(-8, 7).flatten(1).to(torch.int8)
            coded[f"{stem}.weight_packed"] = pack_to_int32(codes, 4)
            coded[f"{stem}.weight_scale"] = scale.squeeze(2).bfloat16()
            coded[f"{stem}.weight_shape"] = torch.tensor(tensor.shape)
    save_file(coded, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = _scheme(kind)
    (out / "config.json").write_text(json.dumps(config))
    return out


def mixture_of_experts(tokenizer: Path, out: Path) -> Path:
    """A random Qwen3-MoE of a few million weights with another model's tokenizer."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=49152,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=1024,
        eos_token_id=2,
        bos_token_id=1,
        tie_word_embeddings=False,
    )
    model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    # random rows all alike give flat distributions: spread the norms as real heads do
    with torch.no_grad():
        model.lm_head.weight.mul_(20 * torch.rand(len(model.lm_head.weight), 1).bfloat16() + 5)
    model.save_pretrained(out)
    for path in tokenizer.glob("*token*"):
        shutil.copy(path, out)
    return out


def _scheme(kind: str) -> dict:
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    layout = "int-quantized"
    if kind == "w4a16":
        weights |= {"num_bits": 4, "strategy": "group", "group_size": GROUP}
        inputs, layout = None, "pack-quantized"
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
