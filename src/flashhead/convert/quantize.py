"""Quantize a model's linear layers, in the compressed-tensors layouts that vLLM serves.

Weights are rounded to nearest, by the compressed-tensors library: scales from each group's or row's
largest weight; or, with calibration text, by GPTQ (`calibrated`), into the same layout. The output
embedding stays as it is, for its rows are what FlashHead scores exactly; input embeddings, norms
and biases stay too.
"""

import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from flashhead.convert.calibrated import gptq, require_calibratable
from flashhead.errors import FlashHeadError
from flashhead.options import QUANTIZE, QUANTIZE_GROUPS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OTHERS = 0.05
"""Share of the weights, embeddings aside, that may lie outside of linear layers."""


class Quantized:
    """A model whose weights stand on their grids, still in its own dtype, until it is saved.

    Args:
        model: changed in place; on the meta device it gets its layout only.
        kind: a key of `options.QUANTIZE`.
        progress: progress bar on stderr.
        windows: `int64[tokens]` each, calibration text; None: round to nearest.

    Raises:
        FlashHeadError: the kind is unknown or not one of GPTQ's, the text is too short, the model
            is quantized already, or too much of it is not in linear layers (fused experts, say).
        ImportError: compressed-tensors or llm-compressor is not installed; the message names the
            command.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        kind: str,
        *,
        progress: bool = True,
        windows: list[Tensor] | None = None,
    ) -> None:
        _require_quantizable(model, kind)
        if windows is not None:
            require_calibratable(kind, windows)
        ct = library()
        head = model.get_output_embeddings()
        layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        }
        ignored = [name for name, module in model.named_modules() if module is head]
        scheme = ct.preset_name_to_scheme(QUANTIZE[kind], ["Linear"])
        if scheme.weights.group_size is not None:
            scheme.weights.group_size = _group_of(layers, kind)
        self.kind, self.model = kind, model
        self.layer_count, self.group = len(layers), scheme.weights.group_size
        self.calibration_tokens = sum(len(window) for window in windows or ())
        if windows is not None:
            gptq(model, scheme, ignored, windows)
            for module in layers.values():
                ct.disable_quantization(module)  # activations stay exact until the folder is served
            return
        config = ct.QuantizationConfig(
            config_groups={"group_0": scheme},
            ignore=ignored,
        )
        ct.apply_quantization_config(model, config)
        bar = tqdm(layers.values(), desc=f"rounding to {kind}", unit="layer", disable=not progress)
        with torch.no_grad():
            for module in bar:
                if not module.weight.is_meta:  # else `shards` rounds each as it is read
                    round_layer(ct, module)

    def described(self) -> dict[str, Any]:
        """What was done, JSON-able."""
        told = {"kind": self.kind, "layers": self.layer_count, "group_size": self.group}
        if not self.calibration_tokens:
            return told | {"method": "rounded to nearest"}
        return told | {"method": "GPTQ", "calibration_tokens": self.calibration_tokens}

    def save(self, folder: Path) -> None:
        """Write the packed weights, config.json with `quantization_config`, and the rest; the model
        is not usable afterwards.
        """
        ct = library()
        compressor = ct.ModelCompressor.from_pretrained_model(self.model)
        for module in self.model.modules():
            if getattr(module, "quantization_scheme", None) is not None:
                compress_layer(ct, module)
        compressor.quantization_config.quantization_status = ct.QuantizationStatus.COMPRESSED
        self.model.save_pretrained(folder)
        compressor.update_config(str(folder))


def library() -> Any:
    """compressed-tensors, as one namespace."""
    try:
        from compressed_tensors.compressors import ModelCompressor, compress_module
        from compressed_tensors.quantization import (
            QuantizationConfig,
            QuantizationStatus,
            apply_quantization_config,
            disable_quantization,
            fake_quantize,
            preset_name_to_scheme,
        )
        from compressed_tensors.quantization.utils import calculate_qparams
    except ImportError as error:
        raise ImportError(
            "compressed-tensors is not installed: pip install 'flashhead[quantize]'",
            name="compressed_tensors",
        ) from error
    return types.SimpleNamespace(
        ModelCompressor=ModelCompressor,
        compress_module=compress_module,
        QuantizationConfig=QuantizationConfig,
        QuantizationStatus=QuantizationStatus,
        apply_quantization_config=apply_quantization_config,
        disable_quantization=disable_quantization,
        fake_quantize=fake_quantize,
        preset_name_to_scheme=preset_name_to_scheme,
        calculate_qparams=calculate_qparams,
    )


def _require_quantizable(model: "PreTrainedModel", kind: str) -> None:
    if kind not in QUANTIZE:
        raise FlashHeadError(f"quantize={kind!r}: wanted one of {', '.join(QUANTIZE)}")
    if getattr(model.config, "quantization_config", None) is not None:
        raise FlashHeadError("the model is quantized already: convert it without --quantize")
    embeddings = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    head = model.get_output_embeddings()
    embeddings |= {id(p) for p in head.parameters()}
    linear = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)
    } - embeddings
    sizes = {id(p): p.numel() for p in model.parameters() if id(p) not in embeddings}
    others = sum(size for key, size in sizes.items() if key not in linear)
    total = sum(sizes.values())
    if others > OTHERS * total:
        raise FlashHeadError(
            f"{others / max(1, total):.0%} of {type(model).__name__}'s weights are not in linear "
            "layers, so quantizing these would leave most of it as it is: not supported"
        )


def _group_of(layers: dict[str, nn.Linear], kind: str) -> int:
    for group in QUANTIZE_GROUPS:
        if all(module.in_features % group == 0 for module in layers.values()):
            return group
    odd = next(name for name, m in layers.items() if m.in_features % QUANTIZE_GROUPS[-1] != 0)
    raise FlashHeadError(
        f"{kind}: {odd} has {layers[odd].in_features} inputs, no multiple of {QUANTIZE_GROUPS[-1]}"
    )


def round_layer(ct: Any, module: Any) -> None:
    """Scale from the largest weights, and the weight onto its grid."""
    args, weight = module.quantization_scheme.weights, module.weight
    scale, zero_point = ct.calculate_qparams(*_extremes(weight, args), args)
    module.weight_scale.data.copy_(scale)
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data.copy_(zero_point)
    rounded = ct.fake_quantize(
        weight.float(),
        module.weight_scale.float(),
        getattr(module, "weight_zero_point", None),
        args,
    )
    weight.data.copy_(rounded)
    ct.disable_quantization(module)  # activations stay exact until the folder is served


def compress_layer(ct: Any, module: Any) -> None:
    """Codes in place of a weight that stands on its grid."""
    # the library divides in the weight's own dtype: bf16 would miss codes by one
    module.weight.data = module.weight.data.float()
    ct.compress_module(module)


def _extremes(weight: Tensor, args: Any) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of each row, or of each group of a row: [rows, 1 or groups]."""
    groups = weight.float().unflatten(1, (-1, args.group_size or weight.shape[1]))
    return groups.amin(2), groups.amax(2)
