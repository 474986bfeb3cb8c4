"""Round to nearest and pack a checkpoint file by file, without ever holding the model.

A tensor's role (a linear layer's weight, or not) is read off the model on the meta device. A weight
file is memory-mapped, its linear layers are compressed one by one by the functions that `Quantized`
uses on a whole model, the rest is copied, and one file is written for it. In memory is what is
written of one file, some rows while they are rounded, and pages of the file that is read.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from flashhead.convert.files import SHARDS_FILE, SINGLE_FILE, weight_files
from flashhead.convert.quantize import Quantized, compress_layer, library, round_layer
from flashhead.convert.workspace import Workspace
from flashhead.errors import FlashHeadError
from flashhead.integrations.skeleton import save_configs, skeleton, stored_parameters
from flashhead.ledger.files import read_safetensors

CHUNK_WEIGHTS = 1 << 18
"""Weights rounded at a time: the library's temporary tensors take some 50 bytes a weight."""


class Shards:
    """A checkpoint to be quantized file by file.

    Args:
        source: its folder.
        model: it, on the meta device.
        kind: a key of `options.QUANTIZE`.

    Raises:
        FlashHeadError: as `Quantized`, or a tensor that is missing or has another shape.
        ImportError: compressed-tensors is not installed; the message names the command.
    """

    def __init__(self, source: Path, model: Any, kind: str) -> None:
        self.source, self.model = source, model
        self.parameters = stored_parameters(model)
        self.files = _written(sorted(weight_files(source)))
        _require_shapes(source, self.files, self.parameters)
        head = model.get_output_embeddings()
        self.head_bytes: int = head.weight.numel() * head.weight.element_size()
        self.model_bytes = sum(p.numel() * p.element_size() for p in self.parameters.values())
        self.quantized = Quantized(model, kind, progress=False)
        self._layers = {
            f"{name}.weight": module
            for name, module in model.named_modules()
            if getattr(module, "quantization_scheme", None) is not None
        }

    def needed_bytes(self, finished: dict[str, int]) -> int:
        """Bytes still to be written: weights that are copied, codes and scales."""
        total = 0
        for name, parameter in self.parameters.items():
            size = parameter.numel() * parameter.element_size()
            if name in self._layers:
                module: Any = self._layers[name]
                bits = module.quantization_scheme.weights.num_bits
                size = parameter.numel() * bits // 8 + 2 * module.weight_scale.numel()
            total += size
        return max(0, total - sum(finished.values()))

    def write(self, work: Workspace, progress: bool = True) -> None:
        """Write the weight files that `work` lacks, their index, and the configs."""
        ct = library()
        compressor = ct.ModelCompressor.from_pretrained_model(self.model)
        work.expect(len(self.files))
        sizes = {written: (self.source / read).stat().st_size for read, written in self.files}
        bar = tqdm(
            total=sum(sizes.values()),
            initial=sum(sizes[name] for name in work.finished),
            desc=f"rounding to {self.quantized.kind}",
            unit="B",
            unit_scale=True,
            disable=not progress,
        )
        with bar:
            for read, written in self.files:
                if written not in work.finished:
                    tensors = self._converted(ct, self.source / read, bar, sizes[written])
                    save_file(tensors, work.unfinished(written), {"format": "pt"})
                    del tensors
                    work.finish(written)
        if len(self.files) > 1:
            _write_index(work.folder, [written for _, written in self.files])
        save_configs(self.model, work.folder)
        compressor.quantization_config.quantization_status = ct.QuantizationStatus.COMPRESSED
        compressor.update_config(str(work.folder))

    def _converted(self, ct: Any, path: Path, bar: Any, size: int) -> dict[str, Tensor]:
        """What is written for one file."""
        tensors: dict[str, Tensor] = {}
        done = 0
        for name in read_safetensors(path):
            with safe_open(path, framework="pt") as file:  # anew: its pages go with its tensor
                tensor, dtype = file.get_tensor(name), self.parameters[name].dtype
            read = tensor.numel() * tensor.element_size()
            if name in self._layers:
                codes = _packed(ct, self._layers[name], tensor, dtype)
                tensors |= {name.removesuffix("weight") + own: t for own, t in codes.items()}
            else:
                tensors[name] = tensor.to(dtype).contiguous()
            del tensor
            done += read
            bar.update(read)
        bar.update(size - done)  # its header
        return tensors


def plan_shards(source: Path, kind: str) -> Shards | str:
    """How a checkpoint can be quantized file by file, or why it cannot.

    Args:
        source: a folder, or a `.gguf` file.
        kind: a key of `options.QUANTIZE`.

    Raises:
        FlashHeadError: as `Shards`.
    """
    if not source.is_dir():
        return "a GGUF file is dequantized as a whole"
    model = skeleton(source)
    if isinstance(model, str):
        return model
    wanted = set(stored_parameters(model))
    named = [read_safetensors(source / file) for file in weight_files(source)]
    extra = sorted({name for tensors in named for name in tensors} - wanted)
    if extra:
        return f"{extra[0]} of the checkpoint is no parameter of {type(model).__name__}"
    return Shards(source, model, kind)


def _packed(ct: Any, layer: nn.Module, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Codes and scales of a linear layer: rows do not depend on each other, so some at a time."""
    rows = max(1, CHUNK_WEIGHTS // weight.shape[1])
    parts = [_packed_rows(ct, layer, w.to(dtype, copy=True)) for w in weight.split(rows)]
    made = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if "weight_shape" in made:
        made["weight_shape"] = torch.tensor(weight.shape)
    return made


def _packed_rows(ct: Any, layer: Any, weight: Tensor) -> dict[str, Tensor]:
    """The same of some rows of the layer's weight."""
    rows, columns = weight.shape
    part: Any = nn.Linear(columns, rows, bias=False, device="meta")
    part.quantization_scheme = layer.quantization_scheme
    part.weight = nn.Parameter(weight, requires_grad=False)
    for name, kept in layer.named_parameters(recurse=False):
        if name not in ("weight", "bias"):
            real = torch.empty(rows, *kept.shape[1:], dtype=kept.dtype)
            setattr(part, name, nn.Parameter(real, requires_grad=False))
    with torch.no_grad():
        round_layer(ct, part)
        compress_layer(ct, part)
    return {name: p.detach().contiguous() for name, p in part.named_parameters(recurse=False)}


def _written(names: list[str]) -> list[tuple[str, str]]:
    """Files that are read, in order, each with the name of the one that is written for it."""
    if len(names) == 1:
        return [(names[0], SINGLE_FILE)]
    return [
        (name, f"model-{i:05}-of-{len(names):05}.safetensors") for i, name in enumerate(names, 1)
    ]


def _require_shapes(
    source: Path, files: list[tuple[str, str]], parameters: dict[str, Tensor]
) -> None:
    missing = set(parameters)
    for read, _ in files:
        for name, info in read_safetensors(source / read).items():
            shape = list(parameters[name].shape)
            if list(info.shape) != shape:
                raise FlashHeadError(
                    f"model {str(source)!r}: {name} is {list(info.shape)}, config.json says {shape}"
                )
            missing.discard(name)
    if missing:
        names = ", ".join(sorted(missing)[:3])
        raise FlashHeadError(f"model {str(source)!r} is not whole: no file of it holds {names}")


def _write_index(folder: Path, files: list[str]) -> None:
    placed, total = {}, 0
    for file in files:
        for name, info in read_safetensors(folder / file).items():
            placed[name] = file
            total += int(info.size_bytes)
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    (folder / SHARDS_FILE).write_text(json.dumps(document, indent=2) + "\n")
