"""AWQ and GPTQ checkpoints as dense models: their kernels are for GPUs, their layouts are plain.

Both keep eight 4-bit codes (or four of 8 bits) in an int32, a scale and a zero point a group of
inputs: w = scale * (code - zero). GPTQ (arXiv 2210.17323) packs along the inputs and stores zeros
one too small unless its format is "gptq_v2"; `g_idx` names the group of each input. AWQ
(arXiv 2306.00978, "gemm") packs along the outputs, in the order 0 2 4 6 1 3 5 7.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedModel

from flashhead.errors import FlashHeadError

METHODS = ("awq", "gptq")
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where output 0, 1, ... of eight lies in its int32."""


def read_quantization(source: str) -> dict[str, Any] | None:
    """`quantization_config` of a local folder, if it is one of AWQ or GPTQ.

    Raises:
        FlashHeadError: it is, in a layout that is not read here.
    """
    # not by AutoConfig: it knows neither latent attention nor code of the model's own
    path = Path(source) / "config.json"
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        return None  # whoever loads the folder says so
    config = found.get("quantization_config") if isinstance(found, dict) else None
    if not isinstance(config, dict) or config.get("quant_method") not in METHODS:
        return None
    bits = config.get("bits", config.get("w_bit"))
    awq = config["quant_method"] == "awq"
    if bits not in ((4,) if awq else (4, 8)):
        raise FlashHeadError(f"model {source!r}: {config['quant_method']} of {bits} bits: wanted 4")
    if awq and config.get("version", "gemm").lower() != "gemm":
        raise FlashHeadError(f"model {source!r}: awq {config['version']!r}: wanted 'gemm'")
    return config


def load_unpacked(
    source: str, quantization: dict[str, Any], dtype: torch.dtype
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The dense model that an AWQ or GPTQ folder stands for, and transformers' loading info.

    Args:
        source: folder of safetensors.
        quantization: what `read_quantization` returned; the model's config keeps it.
        dtype: of the weights.
    """
    tensors: dict[str, Tensor] = {}
    for path in sorted(Path(source).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for stem in [name.removesuffix("qweight") for name in tensors if name.endswith(".qweight")]:
        parts = {
            part: tensors.pop(stem + part)
            for part in ("qweight", "qzeros", "scales", "g_idx")
            if stem + part in tensors
        }
        tensors[stem + "weight"] = unpacked(parts, quantization).to(dtype)
    config = AutoConfig.from_pretrained(source)
    del config.quantization_config
    model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
    )
    model.config.quantization_config = quantization
    model.name_or_path = model.config._name_or_path = source
    return model, info


def unpacked(parts: dict[str, Tensor], quantization: dict[str, Any]) -> Tensor:
    """Weight of a layer: float32[outputs, inputs].

    Args:
        parts: `qweight`, `qzeros` (int32), `scales` (floating `[groups, outputs]`), and of GPTQ
            `g_idx` (`int32[inputs]`), if its order is not that of the groups.
        quantization: of `read_quantization`.
    """
    scales = parts["scales"].float()
    if quantization["quant_method"] == "awq":
        codes, zeros = (
            _fields(parts[name], 4)[..., list(_AWQ_PLACES)].flatten(1)
            for name in ("qweight", "qzeros")
        )
    else:
        bits = quantization["bits"]
        codes = _fields(parts["qweight"].T.contiguous(), bits).flatten(1).T
        zeros = _fields(parts["qzeros"], bits).flatten(1)
        if quantization.get("checkpoint_format") != "gptq_v2":
            zeros = zeros + 1
    group = parts.get("g_idx")
    if group is None:
        group = torch.arange(len(codes)) // (len(codes) // len(scales))
    group = group.long()
    return (scales[group] * (codes - zeros[group])).T.contiguous()


def _fields(packed: Tensor, bits: int) -> Tensor:
    """The codes in each int32, lowest bits first: int32[..., 32 / bits]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (packed[..., None] >> shifts) & (2**bits - 1)
