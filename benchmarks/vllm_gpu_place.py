"""What the scripts of several engines share: a workplace, prompts, texts compared, documents."""

import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from vllm_gpu_served import ON_A_CPU, ON_A_GPU, SETTINGS, Engine, EngineError
from vllm_gpu_step import HERE, SOURCE, say, write_plugin
from vllm_gpu_summary import ULPS, bf16_step

WORKER = "flashhead.integrations.vllm.worker.FlashHeadWorker"
PROMPT_TOKENS = 32
TOLD_LOGITS = 20
"""Largest logits that the dense engine tells where texts part: vLLM's own limit."""


class Workplace:
    """A folder with models, logs and the plugin's metadata, and what child processes need.

    Args:
        folder: empty.
        device: "cuda" or "cpu".
    """

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        plugin = write_plugin(folder / "plugin")
        given = os.environ.get("PYTHONPATH", "")
        self.stock_path = os.pathsep.join(path for path in (str(SOURCE), given) if path)
        self.path = self.stock_path if plugin is None else f"{plugin}{os.pathsep}{self.stock_path}"
        self.is_installed = plugin is None

    def make(
        self,
        jobs: dict[str, dict[str, Any]],
        program: str = "vllm_gpu_models.py",
        there: str | None = None,
    ) -> dict[str, Any]:
        """Run a program for each job, side by side: what it told of each.

        Args:
            jobs: by the names of what is made.
            program: beside this one.
            there: `--work` of `vllm_gpu_step.py`, whose models are taken instead of new ones.
        """
        children: dict[str, Any] = {}
        made: dict[str, Any] = {}
        for name, job in jobs.items():
            kept = Path(there or self.folder) / f"{name}.make.json"
            if kept.exists():
                made[name] = json.loads(kept.read_text())
                continue
            out, path = str(self.folder / f"{name}.json"), self.folder / f"{name}.job.json"
            given = {"folder": str(self.folder / f"model-{name}"), "shape": name, "out": out}
            path.write_text(json.dumps(given | job))
            process = subprocess.Popen(
                [sys.executable, str(HERE / program), str(path)],
                env={**os.environ, "PYTHONPATH": self.path, **self._visible()},
                stdout=subprocess.DEVNULL,
            )
            children[name] = out, process
        for name, (out, child) in children.items():
            if child.wait():
                raise EngineError(f"{name}: making the model ended with {child.returncode}")
            made[name] = json.loads(Path(out).read_text())
            say(f"{name}: made")
        return made

    def engine(
        self, label: str, engine: dict[str, Any], *, stock: bool = False, **environment: str
    ) -> Engine:
        """Start an engine; `stock`: where flashhead is not installed."""
        on_cpu = self.device == "cpu"
        settings = SETTINGS | (ON_A_CPU if on_cpu else ON_A_GPU)
        path = self.stock_path if stock else self.path
        more = {"PYTHONPATH": path, **self._visible(), **environment}
        return Engine(label, settings | engine, self.folder, more, pauses=on_cpu)

    def _visible(self) -> dict[str, str]:
        return {"CUDA_VISIBLE_DEVICES": ""} if self.device == "cpu" else {}


def prompts_of(vocab_size: int, batch: int, seed: str) -> list[list[int]]:
    """Prompts of random tokens; equal seeds give every engine equal ones."""
    numbers = random.Random(f"{batch} {seed}")
    return [
        [numbers.randrange(10, vocab_size - 10) for _ in range(PROMPT_TOKENS)] for _ in range(batch)
    ]


def compare_texts(
    judge: Engine, prompts: list[list[int]], wanted: list[list[int]], found: list[list[int]]
) -> dict[str, Any]:
    """Where texts first part, and how far apart the two tokens are there.

    Args:
        judge: a dense engine with `logprobs_mode="raw_logits"`.
        prompts: of the texts.
        wanted: its texts, or another engine's.
        found: the texts compared with them.

    Returns:
        `parted`, `gaps` (of logits, in steps of bfloat16; None: not among the judge's largest) and
        `beyond`, how many are wider than `ULPS`.
    """
    parted = []
    for prompt, left, right in zip(prompts, wanted, found, strict=True):
        pairs = enumerate(zip(left, right, strict=True))
        step = next((number for number, (a, b) in pairs if a != b), None)
        if step is not None:
            parted.append((prompt + left[:step], left[step], right[step]))
    gaps: list[float | None] = []
    if parted:
        starts = [start for start, _, _ in parted]
        told = judge.generate(starts, 1, logits=TOLD_LOGITS)["logits"]
        for (_, a, b), (largest,) in zip(parted, told, strict=True):
            logits = dict(map(tuple, largest))
            known = a in logits and b in logits
            gap = abs(logits[a] - logits[b]) / bf16_step(logits[a]) if known else None
            gaps.append(None if gap is None else round(gap, 2))
    beyond = sum(gap is None or gap > ULPS for gap in gaps)
    return {"texts": len(found), "parted": len(gaps), "gaps_bf16_steps": gaps, "beyond": beyond}


def counts(engine: Engine) -> list[dict[str, int]]:
    """Rows searched and dense so far of the target's head, rank by rank."""
    heads = [[head for head in worker if not head.get("draft")] for worker in engine.statistics()]
    names = ("searched_rows", "dense_rows")
    return [{name: sum(h.get(name, 0) for h in rank) for name in names} for rank in heads]


def spread(values: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    deciles = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values
    return {"median": statistics.median(values), "p10": deciles[0], "p90": deciles[-1]}


def save(document: dict[str, Any], path: str | None) -> None:
    """Write the document whole."""
    if path is None:
        return
    out = Path(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.rename(out)


def provenance() -> dict[str, Any]:
    """Of flashhead, files by their names; torch is imported only now."""
    sys.path.insert(0, str(SOURCE))
    from flashhead.environment import provenance as found

    told = found()
    told["argv"] = [Path(given).name if given.startswith("/") else given for given in told["argv"]]
    return told
