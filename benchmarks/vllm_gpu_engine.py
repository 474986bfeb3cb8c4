"""One engine of `vllm_gpu_step.py`, in a process of its own: starts side by side with the others,
then measures alone.

python benchmarks/vllm_gpu_engine.py JOB.json
"""

import contextlib
import dataclasses
import fcntl
import gc
import importlib.metadata
import json
import os
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_trace import HEAD, SAMPLER, step_times
from torch import Tensor

PLUGIN = "flashhead."
GATE_SECONDS = 420.0
SETTINGS = {
    "skip_tokenizer_init": True,
    "generation_config": "vllm",
    "dtype": "bfloat16",
    "max_model_len": 1024,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 8192,
    "enable_prefix_caching": False,
    "seed": 0,
}
ON_A_GPU = {
    "gpu_memory_utilization": 0.1,  # only a check of what is free: the cache's size is given
    "kv_cache_memory_bytes": 2 << 30,
    "attention_backend": "FLASH_ATTN",
}
MOST_ROWS, CROSSOVER_PAIRS = 64, 15
"""Largest crossover, and timed pairs behind each median where it is measured."""
ULPS = 2.0
"""Steps of bfloat16 by which a dense head may miss the float32 winner."""


def hide_plugin() -> None:
    """Let vLLM find everything but FlashHead, as where it is not installed."""
    find = importlib.metadata.entry_points

    def entry_points(**chosen: Any) -> Any:
        found = find(**chosen)
        if "group" not in chosen:
            return found
        kept = [entry for entry in found if not entry.value.startswith(PLUGIN)]
        return importlib.metadata.EntryPoints(kept)

    importlib.metadata.entry_points = entry_points  # type: ignore[assignment]


class Probe:
    """Ranges around the head and the sampler of the model runner in this process."""

    def __init__(self, llm: Any) -> None:
        core = llm.llm_engine.engine_core.engine_core
        worker = core.model_executor.driver_worker
        worker = getattr(worker, "worker", worker)
        self.runner = worker.model_runner
        self.ranges = False
        self.states: list[Tensor] | None = None
        model = self.runner.model
        compute = model.compute_logits

        def compute_logits(hidden: Tensor, *rest: Any, **named: Any) -> Any:
            if self.states is not None:
                self.states.append(hidden.detach().clone())
            with self._range(HEAD):
                return compute(hidden, *rest, **named)

        model.compute_logits = compute_logits
        sampler = self.runner.sampler
        if isinstance(sampler, torch.nn.Module):  # model runner V1
            sampler.forward = self._wrapped(sampler.forward)
        else:  # V2: Python looks __call__ up in the class
            kind = type(sampler)
            kind.__call__ = self._wrapped(kind.__call__)

    def _wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            with self._range(SAMPLER):
                return function(*given, **named)

        return call

    def _range(self, name: str) -> contextlib.AbstractContextManager[Any]:
        if not self.ranges:
            return contextlib.nullcontext()
        return torch.profiler.record_function(name)

    @property
    def head_weight(self) -> Tensor:
        """`[V, d]`, of the vocabulary without padding."""
        model = self.runner.get_model()
        head = getattr(model, "lm_head", None)
        if head is None:
            head = model.model.embed_tokens
        weight: Tensor = head.weight
        return weight.detach()[: head.org_vocab_size]

    @property
    def flash_head(self) -> Any:
        """The `flashhead.nn.head.FlashHead` that serves."""
        from flashhead.integrations.vllm.method import FlashHeadMethod

        modules = self.runner.get_model().modules()
        methods = [getattr(module, "quant_method", None) for module in modules]
        return next(m.head for m in methods if isinstance(m, FlashHeadMethod) and m.head)

    def profile(self, work: Callable[[], object]) -> dict[str, Any]:
        """`gpu_trace.step_times` of a decode."""
        kinds = torch.profiler.ProfilerActivity
        self.ranges = True
        try:
            with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profiler:
                work()
                torch.cuda.synchronize()
        finally:
            self.ranges = False
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        del profiler
        gc.collect()
        return step_times(events)

    def record(self, work: Callable[[], object]) -> list[Tensor]:
        """Hidden states of each step's head, `[rows, d]` each."""
        self.states = []
        try:
            work()
            return self.states
        finally:
            self.states = None


def exact_answers(weight: Tensor, states: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """The float32 head's view of tokens that an engine chose.

    Args:
        weight: floating `[V, d]`.
        states: floating `[n, d]`.
        tokens: `int64[n]`.

    Returns:
        `winners` `int64[n]`, `tops` `float32[n]`, the winners' logits, and `gaps` `float32[n]`, by
        which the chosen tokens' logits are lower.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    rows, winners, tops, gaps = weight.float(), [], [], []
    for part, chosen in zip(states.split(128), tokens.split(128), strict=True):
        logits = part.float() @ rows.T
        top, winner = logits.max(1)
        winners.append(winner)
        tops.append(top)
        gaps.append(top - logits.gather(1, chosen[:, None])[:, 0])
    torch.set_float32_matmul_precision(precision)
    return {"winners": torch.cat(winners), "tops": torch.cat(tops), "gaps": torch.cat(gaps)}


def bf16_step(logit: Tensor) -> Tensor:
    """Distance of bfloat16 numbers at a logit."""
    return torch.exp2(torch.floor(torch.log2(logit.abs().clamp_min(1e-6))) - 7)


class Measurement:
    """Batches of one engine.

    Args:
        llm: the engine.
        job: what `vllm_gpu_step.py` wrote.
    """

    def __init__(self, llm: Any, job: dict[str, Any]) -> None:
        self.llm, self.job, self.probe = llm, job, Probe(llm)
        self.on_gpu = torch.cuda.is_available()
        self.vocab_size = len(self.probe.head_weight)

    def generate(self, batch: int, tokens: int, seed: str) -> tuple[float, list[list[int]]]:
        """Seconds and texts; equal seeds give every engine equal prompts."""
        from vllm import SamplingParams

        numbers = random.Random(f"{batch} {seed}")
        prompts = [
            {
                "prompt_token_ids": [
                    numbers.randrange(10, self.vocab_size - 10)
                    for _ in range(self.job["prompt_tokens"])
                ]
            }
            for _ in range(batch)
        ]
        greedy = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, greedy, use_tqdm=False)
        seconds = time.perf_counter() - start
        texts = [list(output.outputs[0].token_ids) for output in outputs]
        assert all(len(text) == tokens for text in texts)
        return seconds, texts

    def measure_crossover(self) -> dict[str, Any]:
        """Measure up to how many rows the search pays, use and keep it, as `flashhead tune` does.

        At load the plugin measures the same, but here other engines were starting then.
        """
        from flashhead.nn.crossover import crossover_of, key_of, time_rows
        from flashhead.nn.tuning import Entry, cache_is_on, store_entry

        head = self.probe.flash_head
        timings = time_rows(head, CROSSOVER_PAIRS)
        found = crossover_of(timings)
        head.crossover_rows, head.token_crossover_rows = found.logits, found.token
        if cache_is_on():
            store_entry(Entry(key_of(head), found, CROSSOVER_PAIRS))
        timed = [dataclasses.asdict(timing) for timing in timings]
        return {**dataclasses.asdict(found), "pairs": CROSSOVER_PAIRS, "timings": timed}

    def counts(self) -> dict[str, int]:
        """Rows searched and dense so far; none: FlashHead is off."""
        if self.job["engine"] != "flashhead":
            return {}
        workers = self.llm.collective_rpc("flashhead_statistics")
        heads = [head for worker in workers for head in worker if "searched_rows" in head]
        return {name: sum(h[name] for h in heads) for name in ("searched_rows", "dense_rows")}

    def batch(self, batch: int) -> dict[str, Any]:
        """All of one batch size, as JSON values."""
        tokens, reps = self.job["tokens"], self.job["reps"]
        self.generate(batch, tokens, "warm")
        before, full, one = self.counts(), [], []
        for number in range(reps):
            full.append(self.generate(batch, tokens, f"full {number}")[0])
            one.append(self.generate(batch, 1, f"one {number}")[0])
        after = self.counts()
        first = statistics.median(one)
        each = sorted(1e3 * (seconds - first) / (tokens - 1) for seconds in full)
        found: dict[str, Any] = {
            "ms_per_token": {"median": statistics.median(each), "min": each[0], "max": each[-1]},
            "first_token_ms": 1e3 * first,
        }
        if after:
            found["rows"] = {name: after[name] - before[name] for name in after}
            found["rows"]["expected"] = reps * batch * (tokens + 1)
        if self.on_gpu:
            profiled = self.job["profiled_tokens"]
            found["profile"] = self.probe.profile(lambda: self.generate(batch, profiled, "profile"))
        return found | self.recorded(batch)

    def recorded(self, batch: int) -> dict[str, Any]:
        """Texts, and what the float32 head says of their tokens on the same hidden states."""
        tokens, kept = self.job["tokens"], {}
        states = self.probe.record(
            lambda: kept.update(texts=self.generate(batch, tokens, "recorded")[1])
        )
        texts: list[list[int]] = kept["texts"]
        found: dict[str, Any] = {
            "texts": texts,
            "distinct_tokens": len({token for text in texts for token in text}),
            "most_repeated": max(text.count(token) for text in texts for token in set(text)),
        }
        if len(states) < tokens or any(len(rows) != batch for rows in states[:tokens]):
            sizes = sorted({len(rows) for rows in states})
            return found | {"exact": None, "exact_note": f"{len(states)} heads of {sizes} rows"}
        every = torch.cat(states[:tokens])  # step by step
        chosen = torch.tensor(texts, device=every.device).T.reshape(-1)
        answers = exact_answers(self.probe.head_weight, every, chosen)
        limit = ULPS * bf16_step(answers["tops"])
        searches = self.job["engine"] == "flashhead"
        if searches and batch <= self.probe.flash_head.token_crossover_rows:
            limit = 1e-4 * (1 + answers["tops"].abs())  # float32, summed in another order
        wrong = int((answers["gaps"] > limit).sum())
        shaped = {name: v.view(tokens, batch).T.tolist() for name, v in answers.items()}
        summary = {
            "tokens": len(chosen),
            "not_the_float32_winner": int((answers["winners"] != chosen).sum()),
            "beyond_rounding": wrong,
            "largest_gap": float(answers["gaps"].max()),
        }
        return found | {"exact": summary, "answers": shaped}

    def memory(self) -> dict[str, int]:
        """Bytes on the GPU that torch has handed out."""
        if not self.on_gpu:
            return {}
        return {
            "allocated_bytes": torch.cuda.memory_allocated(),
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.memory_reserved(),
        }


def engine_arguments(job: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `vllm.LLM`."""
    given = {"model": job["model"], **SETTINGS, **(ON_A_GPU if torch.cuda.is_available() else {})}
    if job["engine"] == "flashhead":
        from flashhead.integrations.vllm.plugin import METHOD, WORKER

        options = dict(job["options"])
        options["crossover"] = job["crossover"] or MOST_ROWS  # measured: when the card is quiet
        given |= {"quantization": METHOD, "worker_extension_cls": WORKER}
        given["hf_overrides"] = {"flashhead_options": options}
    return given | job.get("arguments", {})


@contextlib.contextmanager
def alone(job: dict[str, Any]) -> Iterator[bool]:
    """Wait until all engines have started, then for the card; whether all had."""
    gate, deadline = Path(job["gate"]), time.monotonic() + GATE_SECONDS

    def all_started() -> bool:
        return len(list(gate.glob("*.started"))) >= job["engines"]

    while not all_started() and time.monotonic() < deadline:
        time.sleep(0.2)
    with Path(job["lock"]).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield all_started()


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Start, wait, measure; the engine's part of the document."""
    if job["engine"] == "default":
        hide_plugin()
    import vllm

    start = time.perf_counter()
    llm = vllm.LLM(**engine_arguments(job))
    started = time.perf_counter() - start
    (Path(job["gate"]) / f"{job['label']}.started").touch()
    measurement = Measurement(llm, job)
    weight = measurement.probe.head_weight
    found: dict[str, Any] = {
        "vllm": vllm.__version__,
        "runner": type(measurement.probe.runner).__module__,
        "start_s": round(started, 1),
        "head": f"{list(weight.shape)} {weight.dtype}",
        "memory_started": measurement.memory(),
        "batches": {},
    }
    with alone(job) as others_started:
        found["others_were_starting"] = not others_started
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        if job["engine"] == "flashhead" and job["crossover"] is None:
            found["crossover"] = measurement.measure_crossover()
        for batch in job["batches"]:
            found["batches"][str(batch)] = measurement.batch(batch)
            print(f"batch {batch}: {time.perf_counter() - begin:.1f} s", flush=True)
        found["measured_s"] = round(time.perf_counter() - begin, 1)
        found["memory"] = measurement.memory()
        if job["engine"] == "flashhead":
            workers = llm.collective_rpc("flashhead_statistics")
            found["statistics"] = [head for worker in workers for head in worker]
    return found


def main() -> None:
    job, code = json.loads(Path(sys.argv[1]).read_text()), 1
    try:
        found = run(job)
        out = Path(job["out"])
        partial = out.with_suffix(".partial")
        partial.write_text(json.dumps(found))
        partial.rename(out)
        code = 0
    except BaseException:  # noqa: BLE001 - told, and the process ends below
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # an engine in process may wait for its threads otherwise


if __name__ == "__main__":
    main()
