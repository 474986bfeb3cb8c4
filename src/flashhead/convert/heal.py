"""Heal a folder with latent attention: train it towards its teacher, in two stages, resumable.

Stage a (a quarter of the tokens when both run) regresses every layer's attention on the teacher's;
stage b distils the logits. Latents are rounded as the folder's cache rounds them. Embeddings and
head stay, so a folder's index stays valid. Masters and moments are float32; on a GPU products are
bfloat16 by autocast. A run that is interrupted, by Ctrl-C or by its time limit, leaves `OUT/.heal`,
and the same command goes on from there.
"""

import contextlib
import json
import math
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from flashhead.convert import heal_state
from flashhead.convert.heal_loss import distillation, regression
from flashhead.convert.heal_state import Progress
from flashhead.environment import provenance
from flashhead.errors import FlashHeadError
from flashhead.options_heal import HealOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHECKPOINT_SECONDS = 300.0
HELD_OUT_ROWS = 64


class Healing:
    """A student and its teacher.

    Args:
        out: folder with latent attention, rewritten when a run ends.
        student: of it, in float32.
        teacher: the model it was made from.
        rows: int64[rows, tokens], text; the first `HELD_OUT_ROWS`, at most a tenth, are held out.
        options: how long, how fast.

    Raises:
        FlashHeadError: no latent attention, or a teacher of another model.
    """

    def __init__(
        self,
        out: Path,
        student: "PreTrainedModel",
        teacher: "PreTrainedModel",
        rows: Tensor,
        options: HealOptions,
    ) -> None:
        from flashhead.integrations.latent_model import latent_modules
        from flashhead.integrations.transformers import logit_postprocess

        self.out, self.student, self.teacher, self.options = out, student, teacher, options
        self.latents = latent_modules(student)
        require_teacher(student, teacher)
        held = max(1, min(HELD_OUT_ROWS, len(rows) // 10))
        self.held_out, self.rows = rows[:held], rows[held:]
        self.post = logit_postprocess(student.config)
        self.folder = out / ".heal"
        for latent in self.latents.values():  # heal what the cache will do, too
            latent.rounding = student.latent_store
        self.batch_rows = max(1, min(len(self.rows), options.batch_tokens // rows.shape[1]))
        self.micro_rows = max(1, options.micro_tokens // rows.shape[1])

    def run(self, progress_bar: bool = True) -> dict[str, Any]:
        """Train, write the folder, and say what came of it; JSON-able.

        A model that is worse on text that it was not trained on is not written.
        """
        settings = self.options.settings()
        progress = heal_state.load_progress(self.folder, settings)
        resumed = progress is not None
        progress = progress or Progress(settings, self.options.stages[0])
        if progress.before is None:
            progress.before = self._held_out()
        started, finished = time.perf_counter(), True
        for stage in self.options.stages:
            if stage < progress.stage:  # done before the interruption
                continue
            finished = self._stage(stage, progress, resumed, started, progress_bar)
            resumed = False
            if not finished:
                break
        after = self._held_out()
        measure = "regression" if self.options.stages[-1] == "a" else "kl"
        better = after[measure] <= progress.before[measure]
        if better:
            self._write()
        if finished:
            shutil.rmtree(self.folder)
        return {
            "finished": finished,
            "written": better,
            "steps": progress.step,
            "stage": progress.stage,
            "held_out": {
                "before": progress.before,
                "after": after,
                "tokens": self.held_out.numel(),
            },
            "losses": progress.losses,
            "seconds": round(progress.seconds, 1),
            "text_tokens": self.rows.numel(),
            "peak_memory_bytes": peak_memory_bytes(self.student.device),
            "settings": settings,
            **provenance(),
        }

    def _stage(
        self, stage: str, progress: Progress, resumed: bool, started: float, bar: bool
    ) -> bool:
        """Run a stage to its end; False: the time was over."""
        options = self.options
        trained = self._trained(stage)
        rate = options.rates[stage]
        optimizer = torch.optim.AdamW(trained.values(), lr=rate, betas=(0.9, 0.95), weight_decay=0)
        if resumed:
            heal_state.load_weights(self.folder, trained)
            heal_state.load_moments(self.folder, trained, optimizer)
        steps = max(1, options.stage_tokens(stage) // (self.batch_rows * self.rows.shape[1]))
        saved = last = time.perf_counter()
        self.student.train()
        try:
            with tqdm(total=steps, initial=progress.step, desc=f"stage {stage}", unit="step",
                      disable=not bar) as ticks:  # fmt: skip
                while progress.step < steps:
                    for group in optimizer.param_groups:
                        group["lr"] = rate * schedule(progress.step, steps)
                    loss = self._step(stage, progress.step, trained, optimizer)
                    progress.step += 1
                    now = time.perf_counter()
                    progress.seconds, last = progress.seconds + now - last, now
                    if progress.step % max(1, steps // 50) == 0 or progress.step == steps:
                        progress.losses.append((stage, progress.step, round(loss, 6)))
                    ticks.set_postfix_str(f"loss {loss:.4f}")
                    ticks.update()
                    over = options.minutes is not None and now - started > 60 * options.minutes
                    if over and progress.step < steps:
                        heal_state.save(self.folder, progress, trained, optimizer)
                        return False
                    if now - saved > CHECKPOINT_SECONDS:
                        heal_state.save(self.folder, progress, trained, optimizer)
                        saved = now
        except KeyboardInterrupt:
            heal_state.save(self.folder, progress, trained, optimizer)
            raise
        finally:
            self.student.eval()
        if stage != options.stages[-1]:
            # the next stage goes on from these weights, also in another process
            progress.stage, progress.step = options.stages[-1], 0
            trained = self._trained(progress.stage)
            optimizer = torch.optim.AdamW(trained.values())
        heal_state.save(self.folder, progress, trained, optimizer)
        return True

    def _step(
        self,
        stage: str,
        step: int,
        trained: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> float:
        batch = self._batch(step + (1 << 20) * (stage == "b"))
        loss = 0.0
        for part in batch.split(self.micro_rows):
            share = len(part) / len(batch)
            with self._autocast():
                loss += share * self._loss(stage, part, share)
        if not math.isfinite(loss):
            raise FlashHeadError(f"stage {stage}, step {step}: the loss is {loss}; lower its rate")
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    def _loss(self, stage: str, batch: Tensor, backward: float | None) -> float:
        if stage == "a":
            return regression(self.teacher, self.latents, batch, backward)
        return distillation(self.teacher, self.student, batch, self.post, backward)

    def _batch(self, step: int) -> Tensor:
        """Rows of a step: every epoch in an order of its own, the same in every process."""
        per_epoch = max(1, len(self.rows) // self.batch_rows)
        epoch, place = divmod(step, per_epoch)
        generator = torch.Generator().manual_seed(self.options.seed + epoch)
        order = torch.randperm(len(self.rows), generator=generator)
        chosen = order[place * self.batch_rows : (place + 1) * self.batch_rows]
        return self.rows[chosen].to(self.student.device)

    def _held_out(self) -> dict[str, float]:
        """Both losses on text that is not trained on."""
        found = {"regression": 0.0, "kl": 0.0}
        with torch.no_grad(), self._autocast():
            for part in self.held_out.to(self.student.device).split(self.micro_rows):
                share = len(part) / len(self.held_out)
                for stage, measure in (("a", "regression"), ("b", "kl")):
                    found[measure] += share * self._loss(stage, part, None)
        return found

    def _trained(self, stage: str) -> dict[str, nn.Parameter]:
        """Parameters of a stage; all others stop asking for gradients."""
        frozen = {
            id(p)
            for module in (
                self.student.get_input_embeddings(),
                self.student.get_output_embeddings(),
            )
            for p in module.parameters()
        }
        own = tuple(f"{name}." for name in self.latents)
        trained = {}
        for name, parameter in self.student.named_parameters():
            wanted = id(parameter) not in frozen and (stage == "b" or name.startswith(own))
            parameter.requires_grad_(wanted)
            if wanted:
                trained[name] = parameter
        return trained

    @contextlib.contextmanager
    def _autocast(self) -> Iterator[None]:
        on = self.student.device.type == "cuda"
        with torch.autocast(self.student.device.type, torch.bfloat16, enabled=on):
            yield

    def _write(self) -> None:
        """Replace the folder's weights, in the dtypes they had."""
        path = self.out / "model.safetensors"
        tensors, own = load_file(path), dict(self.student.named_parameters())
        for name, tensor in tensors.items():
            if name in own:
                tensors[name] = own[name].detach().to("cpu", tensor.dtype).contiguous()
        partial = path.with_name(f".{path.name}.partial")
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.replace(path)


def schedule(step: int, steps: int) -> float:
    """Share of the rate: up over the first twentieth, then a cosine down to a tenth."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def require_teacher(student: "PreTrainedModel", teacher: "PreTrainedModel") -> None:
    """Raise unless the student was made from the teacher."""
    from flashhead.integrations.latent_model import latent_modules

    if not latent_modules(student):
        raise FlashHeadError("heal: the folder has no latent attention: flashhead convert makes it")
    if latent_modules(teacher):
        raise FlashHeadError("--teacher: has latent attention itself, wanted the original model")
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        own, other = (getattr(m.config.get_text_config(), name) for m in (student, teacher))
        if own != other:
            raise FlashHeadError(f"--teacher: {name} is {other}, the folder's is {own}")
    heads = [model.get_output_embeddings().weight.float() for model in (student, teacher)]
    if not torch.equal(heads[0].bfloat16(), heads[1].bfloat16().to(heads[0].device)):
        raise FlashHeadError("--teacher: its head differs from the folder's: another model")


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory so far: of the card, or of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def heal(
    out: Path,
    teacher: str,
    options: HealOptions,
    *,
    files: tuple[Path, ...] = (),
    device: str = "cpu",
    progress: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Load, sample text if none is given, train, rewrite the folder.

    Args:
        out: folder that `flashhead convert --attention latent` wrote.
        teacher: the model it was made from.
        options: how long, how fast.
        files: text; none: sampled from the teacher and kept in `out/.heal-text-SEED.safetensors`.
        device: "cpu" or "cuda".
        progress: progress bars on stderr.
        say: told one line a phase.

    Returns:
        JSON-able, also kept as `out/heal.json`.

    Raises:
        FlashHeadError: a folder, teacher or text that does not fit.
    """
    from flashhead.convert.heal_text import healing_rows
    from flashhead.integrations.transformers import load_dense, load_tokenizer

    started = time.perf_counter()
    if not (out / "model.safetensors").is_file():
        raise FlashHeadError(f"{out}: wanted a folder with one model.safetensors")
    if device == "cuda" and not torch.cuda.is_available():
        raise FlashHeadError("--device cuda: torch sees no GPU")
    on_gpu = device == "cuda"
    student = load_dense(str(out), dtype=torch.float32).to(device)
    if getattr(student.config, "quantization_config", None) is not None:
        raise FlashHeadError(f"{out}: its layers are quantized: heal before quantizing")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    taught = load_dense(teacher, dtype=dtype).to(device)
    require_teacher(student, taught)
    rows = healing_rows(
        taught,
        load_tokenizer(teacher),
        files,
        out / f".heal-text-{options.seed}.safetensors",
        tokens=min(options.tokens, options.text_tokens),
        row_tokens=options.row_tokens,
        seed=options.seed,
        seconds=None if options.minutes is None else 60 * options.minutes * options.text_share,
        progress=progress,
    )
    spent = (time.perf_counter() - started) / 60
    say(f"{rows.numel():,} tokens of text after {spent:.1f} min")
    if options.minutes is not None:
        options = options.with_minutes(max(0.05, options.minutes - spent))
    report = Healing(out, student, taught, rows, options).run(progress)
    report["text"] = [path.name for path in files] or "sampled"
    (out / "heal.json").write_text(json.dumps(report, indent=1) + "\n")
    return report
