"""The body of a compressed-tensors checkpoint, left packed: its linear layers multiply with codes.

transformers has no kernels for them and unpacks to bf16: four times the bytes a token.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from flashhead.errors import FlashHeadError
from flashhead.nn.packed import Int4Linear, Int8Linear, int4_suits

_log = logging.getLogger("flashhead")


def pack_body(model: nn.Module, wanted: bool | None, device: torch.device) -> int:
    """Replace compressed linear layers by `nn.packed` ones, in place.

    Args:
        model: as transformers loaded it, not unpacked yet.
        wanted: True: every compressed layer, or an error; None: those that a product exists for, if
            the model stays on a CPU, and the log says why others are unpacked; False: none.
        device: where the model is going to.

    Returns:
        How many layers were replaced; the others are left as they were.

    Raises:
        FlashHeadError: `wanted` is True and the model has no such layers, or one has no product.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if getattr(module, "quantization_scheme", None) is not None
    }
    if wanted is False or (wanted is None and (device.type != "cpu" or not layers)):
        return 0
    if not layers:
        raise FlashHeadError("packed=True: the checkpoint has no packed linear layers")
    if device.type != "cpu":
        raise FlashHeadError(f"packed=True: torch's packed products are for a CPU, not {device}")
    replaced, reasons = 0, dict[str, int]()
    for name, module in layers.items():
        made = _packed(module)
        if isinstance(made, str):
            if wanted:
                raise FlashHeadError(f"packed=True: {name}: {made}")
            reasons[made] = reasons.get(made, 0) + 1
            continue
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, made)
        replaced += 1
    for reason, count in reasons.items():
        _log.info("%d of %d packed layers are unpacked: %s", count, len(layers), reason)
    if replaced:
        _log.info(
            "%d linear layers stay packed: torch's integer products, activations as they are",
            replaced,
        )
    return replaced


def _packed(layer: Any) -> nn.Module | str:
    """The packed layer, or why there is none."""
    weights = layer.quantization_scheme.weights
    if not isinstance(layer, nn.Linear) or weights.type != "int" or not weights.symmetric:
        return "no integer product of torch takes their layout"
    if getattr(layer, "weight_g_idx", None) is not None:
        return "their columns are in another order (actorder)"
    bias, kept = layer.bias, vars(layer)["_parameters"]
    scales: Tensor = kept["weight_scale"].data
    if weights.num_bits == 4:
        rows, columns = kept["weight_shape"].tolist()
        if not int4_suits(rows, columns, scales.shape[1]):
            return f"[{rows}, {columns}] with {scales.shape[1]} scales a row suit no 4-bit product"
        return Int4Linear(_unpacked(kept["weight_packed"], rows, columns), scales, bias)
    if weights.num_bits == 8 and weights.strategy == "channel":
        return Int8Linear(kept["weight"].data, scales[:, 0], bias)
    return f"torch has no product for {weights.num_bits} bits, a scale a {weights.strategy}"


def _unpacked(packed: Tensor, rows: int, columns: int) -> Tensor:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    codes: Tensor = unpack_from_int32(packed.data, 4, torch.Size([rows, columns]))
    return codes
