"""Training of one twin: next tokens, AdamW, a cosine schedule, the same rows in the same order.

Masters and moments are float32; on a GPU products are bfloat16 by autocast. With `compiled`, decoder
layers and the loss go through torch.compile, layer by layer, so a model costs one layer's
compilation. A run that is interrupted, by Ctrl-C or by its time limit, leaves `OUT/.KIND`, and the
same command goes on from there with the same rows.
"""

import dataclasses
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from flashhead.convert import heal_state
from flashhead.convert.heal import schedule
from flashhead.convert.heal_state import Progress
from flashhead.errors import FlashHeadError

CHECKPOINT_SECONDS = 300.0
LOG_STEPS = 10
EVALUATIONS = 40
"""Points of the held-out curve."""
WEIGHT_DECAY = 0.1
Loss = Callable[[Tensor, nn.Module, Tensor], Tensor]


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
    rate: float = 1.5e-3
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


class Rows:
    """A stream of tokens in rows of `context` and one more, in an order of its own each epoch.

    Args:
        stream: int32[tokens].
        context: of a row.
        seed: of the order.

    Raises:
        FlashHeadError: less than one row.
    """

    def __init__(self, stream: Tensor, context: int, seed: int = 0) -> None:
        self.stream, self.context, self.seed = stream, context, seed
        self.count = (len(stream) - 1) // context
        if self.count < 1:
            raise FlashHeadError(f"text of {len(stream)} tokens: wanted more than {context}")
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def at(self, index: Tensor) -> Tensor:
        """Rows `int64[n, context + 1]` of these numbers, on the stream's device."""
        places = index.to(self.stream.device)[:, None] * self.context
        return self.stream[places + torch.arange(self.context + 1, device=places.device)].long()

    def batch(self, step: int, rows: int) -> Tensor:
        """Rows of a step; epochs follow each other without a gap."""
        wanted = [divmod(i, self.count) for i in range(step * rows, (step + 1) * rows)]
        return self.at(torch.tensor([int(self._of(epoch)[place]) for epoch, place in wanted]))

    def _of(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.count, generator=generator)
        return self._order


def next_token_loss(hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    """Mean cross entropy, nats: `head(hidden)` in float32 against `int64[batch, tokens]`."""
    return functional.cross_entropy(head(hidden).float().flatten(0, 1), targets.flatten())


def compile_layers(model: PreTrainedModel) -> Loss:
    """Compile each decoder layer in place; the loss, compiled too."""
    for layer in model.base_model.layers:
        layer.compile(dynamic=False)
    return torch.compile(next_token_loss, dynamic=False)


def uncompile(model: PreTrainedModel) -> None:
    """Take back what `compile_layers` did."""
    for layer in model.base_model.layers:
        layer._compiled_call_impl = None


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU; nothing elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def make_optimizer(model: nn.Module, rate: float) -> torch.optim.AdamW:
    """AdamW; matrices decay, vectors and rotary mixes do not."""
    named = dict(model.named_parameters())
    decayed = [p for n, p in named.items() if p.dim() == 2]
    rest = [p for n, p in named.items() if p.dim() != 2]
    groups = [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))


def train_step(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    rows: Tensor,
    micro_rows: int,
    loss_of: Loss,
) -> Tensor:
    """One step on `int64[rows, context + 1]`; the loss, nats, still on its device."""
    total = torch.zeros((), device=rows.device)
    for part in rows.split(micro_rows):
        with autocast(rows.device):
            hidden = model.base_model(part[:, :-1], use_cache=False).last_hidden_state
            loss = loss_of(hidden, model.lm_head, part[:, 1:]) * (len(part) / len(rows))
        loss.backward()
        total += loss.detach()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, rows: Rows, tokens: int, micro_rows: int) -> float:
    """Mean loss, nats a token, on the first rows; never compiled."""
    was_training = model.training
    model.eval()
    count = max(1, min(rows.count, tokens // rows.context))
    total = 0.0
    with torch.compiler.set_stance("force_eager"):
        for index in torch.arange(count).split(micro_rows):
            part = rows.at(index).to(model.device)
            with autocast(part.device):
                hidden = model.base_model(part[:, :-1], use_cache=False).last_hidden_state
                loss = next_token_loss(hidden, model.lm_head, part[:, 1:])
            total += float(loss) * len(index) / count
    model.train(was_training)
    return total


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
