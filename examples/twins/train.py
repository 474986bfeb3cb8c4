"""Training of one twin: next tokens, AdamW, a cosine schedule, the same rows in the same order.

A run that is interrupted, by Ctrl-C or by its time limit, leaves `OUT/.KIND`, and the same command
goes on from there with the same rows.
"""

import dataclasses
import math
import shutil
import time
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from flashhead.convert import heal_state
from flashhead.convert.heal import schedule
from flashhead.convert.heal_state import Progress
from flashhead.errors import FlashHeadError
from twins.rows import Rows
from twins.steps import (
    Loss,
    compile_layers,
    held_out_loss,
    make_optimizer,
    next_token_loss,
    train_step,
    uncompile,
)

CHECKPOINT_SECONDS = 300.0
LOG_STEPS = 10
EVALUATIONS = 40
"""Points of the held-out curve."""


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """How a twin is trained.

    Args:
        tokens: trained on in all, counting repetitions.
        context: tokens of a row.
        batch_tokens: of one step.
        micro_tokens: of one pass; a step adds up the gradients of several.
        rate: largest learning rate.
        held_tokens: of the held-out text, for the curve.
        compiled: whether torch.compile is used.
        seed: of first weights and of the order.

    Raises:
        FlashHeadError: a value out of range.
    """

    tokens: int
    context: int = 1024
    batch_tokens: int = 65536
    micro_tokens: int = 32768
    rate: float = 1e-3
    held_tokens: int = 262_144
    compiled: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.context < 16:
            raise FlashHeadError(f"context={self.context}: wanted 16 or more")
        for name in ("batch_tokens", "micro_tokens", "held_tokens"):
            if getattr(self, name) < self.context:
                raise FlashHeadError(f"{name}={getattr(self, name)}: wanted a row or more")
        if self.tokens < self.batch_tokens:
            raise FlashHeadError(f"tokens={self.tokens}: wanted {self.batch_tokens} or more")
        if not 0 < self.rate < 1:
            raise FlashHeadError(f"rate={self.rate}: wanted a number from 0 to 1")

    @property
    def batch_rows(self) -> int:
        """Rows of one step."""
        return self.batch_tokens // self.context

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self.tokens // (self.batch_rows * self.context)


class Training:
    """A twin, its text and its progress.

    Args:
        model: in float32, on its device.
        rows: trained on.
        held_out: rows of the curve.
        options: how long, how fast.
        folder: of the checkpoint.
        settings: what an interrupted run must share with the one that goes on.

    Raises:
        FlashHeadError: a checkpoint of other settings.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: Rows,
        held_out: Rows,
        options: TrainOptions,
        folder: Path,
        settings: dict[str, Any],
    ) -> None:
        self.model, self.rows, self.held_out, self.options = model, rows, held_out, options
        self.folder = folder
        self.named = dict(model.named_parameters())
        self.optimizer = make_optimizer(model, options.rate)
        self.micro_rows = max(1, options.micro_tokens // options.context)
        progress = heal_state.load_progress(folder, settings)
        if progress is not None:
            heal_state.load_weights(folder, self.named)
            heal_state.load_moments(folder, self.named, self.optimizer)
        self.progress = progress or Progress(settings, "train")

    def run(self, until: float | None = None, bar: bool = True) -> bool:
        """Train to the end, or until `time.perf_counter()` has reached `until`: False."""
        self.model.train()
        loss_of = compile_layers(self.model) if self.options.compiled else next_token_loss
        try:
            finished = self._run(until, bar, loss_of)
        except KeyboardInterrupt:
            self._save()
            raise
        finally:
            uncompile(self.model)
            self.model.eval()
        if finished:
            shutil.rmtree(self.folder, ignore_errors=True)
        return finished

    def _run(self, until: float | None, bar: bool, loss_of: Loss) -> bool:
        options, progress = self.options, self.progress
        every = max(1, options.steps // EVALUATIONS)
        if not progress.losses:
            self._evaluate()
        saved = last = time.perf_counter()
        name = self.folder.name.lstrip(".")
        with tqdm(total=options.steps, initial=progress.step, desc=name, disable=not bar) as ticks:
            while progress.step < options.steps:
                for group in self.optimizer.param_groups:
                    group["lr"] = options.rate * schedule(progress.step, options.steps)
                rows = self.rows.batch(progress.step, options.batch_rows).to(self.model.device)
                loss = train_step(self.model, self.optimizer, rows, self.micro_rows, loss_of)
                progress.step += 1
                ticks.update()
                now = time.perf_counter()
                if progress.step % LOG_STEPS == 0 or progress.step == options.steps:
                    ticks.set_postfix_str(f"loss {self._log(loss):.4f}")
                    now = time.perf_counter()  # the device has caught up
                progress.seconds, last = progress.seconds + now - last, now
                if progress.step % every == 0 or progress.step == options.steps:
                    self._evaluate()
                    last = time.perf_counter()
                if until is not None and last > until and progress.step < options.steps:
                    self._save()
                    return False
                if last - saved > CHECKPOINT_SECONDS:
                    self._save()
                    saved = last = time.perf_counter()
        return True

    def _log(self, loss: Tensor) -> float:
        value = float(loss)
        if not math.isfinite(value):
            step = self.progress.step
            raise FlashHeadError(f"step {step}: the loss is {value}; lower --rate")
        self.progress.losses.append(("train", self.progress.step, round(value, 5)))
        return value

    def _evaluate(self) -> None:
        options = self.options
        loss = held_out_loss(self.model, self.held_out, options.held_tokens, self.micro_rows)
        self.progress.losses.append(("held_out", self.progress.step, round(loss, 5)))

    def _save(self) -> None:
        heal_state.save(self.folder, self.progress, self.named, self.optimizer)

    def curve(self, kind: str) -> list[tuple[int, float]]:
        """Points of "train" or "held_out": tokens, nats a token."""
        tokens = self.options.batch_rows * self.options.context
        return [(step * tokens, loss) for k, step, loss in self.progress.losses if k == kind]
