"""Checkpoints that tests serve: real weights quantized, and a tiny random mixture of experts."""

import json
import shutil
from pathlib import Path

import torch
from compressed_tensors.compressors import pack_to_int32
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

GROUP = 64
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Of the columns in an int32, the lowest bits first."""


def quantized(source: Path, out: Path, kind: str) -> Path:
    """The model of `source`, linear layers rounded to nearest, in the format of a quantizer.

    Args:
        source: bf16 folder without an index.
        out: folder to make.
        kind: "w8a8", "w4a16" and "w8a8-fp8" of compressed-tensors, "awq", "gptq" or "fp8"; the head
            stays as it is, as quantizers leave it.
    """
    shutil.copytree(source, out)
    weights = load_file(out / "model.safetensors")
    coded: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if not name.endswith("_proj.weight") or _is_ignored(name, kind):
            coded[name] = tensor
            continue
        stem = name.removesuffix("weight")
        coded |= {stem + part: code for part, code in _codes(tensor.float(), kind).items()}
    save_file(coded, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = scheme(kind)
    (out / "config.json").write_text(json.dumps(config))
    return out


def _is_ignored(name: str, kind: str) -> bool:
    """FP8 is slow on a CPU: one layer has it, and the checkpoint says so."""
    return kind == "w8a8-fp8" and ".layers.0." not in name


def _codes(weight: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
    """The tensors of a linear layer, whose names follow the layer's."""
    if kind == "w8a8":
        scale = weight.abs().amax(1, keepdim=True) / 127
        codes = (weight / scale).round().clamp(-127, 127).to(torch.int8)
        return {"weight": codes, "weight_scale": scale.bfloat16()}
    if kind == "w8a8-fp8":
        scale = weight.abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
        codes = (weight / scale).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale": scale.bfloat16()}
    groups = weight.unflatten(1, (-1, GROUP))
    if kind == "awq":
        low = groups.amin(2, keepdim=True).clamp(max=0)
        scale = (groups.amax(2, keepdim=True).clamp(min=0) - low) / 15
        zeros = (-low / scale).round()
        codes = (groups / scale + zeros).round().clamp(0, 15).flatten(1)
        return {
            "qweight": _packed(codes.T, AWQ_ORDER),
            "qzeros": _packed(zeros.squeeze(2).T, AWQ_ORDER),
            "scales": scale.squeeze(2).T.bfloat16().contiguous(),
        }
    scale = groups.abs().amax(2, keepdim=True) / 7
    codes = (groups / scale).round().clamp(-8, 7).flatten(1)
    if kind == "gptq":
        zeros = torch.full((weight.shape[1] // GROUP, len(weight)), 7.0)  # one less than they are
        return {
            "qweight": _packed(codes + 8).T.contiguous(),
            "qzeros": _packed(zeros),
            "scales": scale.squeeze(2).T.bfloat16().contiguous(),
            "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
        }
    return {
        "weight_packed": pack_to_int32(codes.to(torch.int8), 4),
        "weight_scale": scale.squeeze(2).bfloat16(),
        "weight_shape": torch.tensor(weight.shape),
    }


def _packed(codes: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight codes of a row in an int32, `order[0]`'s in the lowest bits."""
    eights = codes.to(torch.int64).unflatten(1, (-1, 8))[..., list(order)]
    return (eights << 4 * torch.arange(8)).sum(2).to(torch.int32)


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


def scheme(kind: str) -> dict:
    """What config.json says of a quantized checkpoint."""
    if kind == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True}
    if kind == "gptq":
        form = {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
        return {"quant_method": "gptq", "lm_head": False, **form}
    if kind == "fp8":
        return {"quant_method": "fp8", "activation_scheme": "dynamic"}
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    layout, ignored = "int-quantized", ["lm_head"]
    if kind == "w4a16":
        weights |= {"num_bits": 4, "strategy": "group", "group_size": GROUP}
        inputs, layout = None, "pack-quantized"
    if kind == "w8a8-fp8":
        weights, inputs = weights | {"type": "float"}, inputs | {"type": "float"}
        layout, ignored = "float-quantized", [*ignored, r"re:model\.layers\.[1-9].*"]
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignored,
    }
