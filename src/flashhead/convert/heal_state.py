"""Where a healing run is: weights, optimizer moments, counts; written whole, read strictly."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from flashhead.errors import FlashHeadError


@dataclasses.dataclass
class Progress:
    """Counts of a run.

    Args:
        settings: what must be the same for going on (tokens, rows, stages, rates, seed).
        stage: "a" or "b".
        step: steps done in that stage.
        losses: (stage, step, loss) from time to time.
        seconds: of training so far.
        before: losses on held-out text before the first step.
    """

    settings: dict[str, Any]
    stage: str
    step: int = 0
    losses: list[tuple[str, int, float]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    before: dict[str, float] | None = None


def save(
    folder: Path,
    progress: Progress,
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write a checkpoint; an older one is replaced only when the new one is whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    weights = {name: p.detach().contiguous() for name, p in trained.items()}
    save_file(weights, partial / "weights.safetensors")
    moments = {
        f"{name}.{key}": value.contiguous()
        for name, p in trained.items()
        for key, value in optimizer.state.get(p, {}).items()
    }
    save_file(moments, partial / "optimizer.safetensors")
    (partial / "state.json").write_text(json.dumps(dataclasses.asdict(progress), indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def load_progress(folder: Path, settings: dict[str, Any]) -> Progress | None:
    """Counts of a run that was interrupted; None: there is none.

    Raises:
        FlashHeadError: it is damaged, or of other settings.
    """
    if not folder.exists():
        return None
    try:
        values = json.loads((folder / "state.json").read_text())
        values["losses"] = [tuple(loss) for loss in values["losses"]]
        progress = Progress(**values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FlashHeadError(f"{folder}: no whole checkpoint ({error}); remove it") from error
    for name, value in settings.items():
        if progress.settings.get(name) != value:
            raise FlashHeadError(
                f"{folder}: a run with {name}={progress.settings.get(name)!r} was interrupted, "
                f"got {value!r}: go on with the same, or remove that folder"
            )
    return progress


def load_weights(folder: Path, trained: dict[str, nn.Parameter]) -> None:
    """Put a checkpoint's weights into a model.

    Raises:
        FlashHeadError: damaged, or of another model.
    """
    weights = _read(folder / "weights.safetensors")
    if set(weights) != set(trained):
        raise FlashHeadError(f"{folder}: a checkpoint of another model; remove it")
    with torch.no_grad():
        for name, parameter in trained.items():
            if weights[name].shape != parameter.shape:
                raise FlashHeadError(f"{folder}: {name} has another shape; remove the folder")
            parameter.copy_(weights[name])


def load_moments(
    folder: Path, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Put a checkpoint's moments into an optimizer of the same parameters."""
    moments = _read(folder / "optimizer.safetensors")
    for name, parameter in trained.items():
        own = {k.rpartition(".")[2]: v for k, v in moments.items() if k.rpartition(".")[0] == name}
        if own:
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device)
                for key, value in own.items()
            }


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise FlashHeadError(f"{path}: not readable ({error}); remove its folder") from error
