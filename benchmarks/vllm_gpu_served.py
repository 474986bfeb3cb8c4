"""An engine of vLLM in a process of its own, which does what its parent asks for, and its parent's
end: `Engine`. Several are alive at once and answer in turn; nothing reaches into a worker but
vLLM's `collective_rpc`, so an engine may have any number of ranks.

    python benchmarks/vllm_gpu_served.py DESCRIPTOR      # by `Engine`, over a pipe

Messages are JSON. The first one holds `engine`, the arguments of `vllm.LLM`; then each is a
question: `prompts` (lists of tokens), `tokens` to generate greedily and `logits` (so many of the
largest are told), `statistics` of FlashHead's heads, worker by worker, or `metrics`: vLLM's own
counters of speculation.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LOG_LINES = 60
STOPS = ((signal.SIGCONT, 0.0), (signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0))
START_SECONDS, ANSWER_SECONDS = 420.0, 300.0
SETTINGS = {
    "skip_tokenizer_init": True,
    "generation_config": "vllm",
    "dtype": "bfloat16",
    "max_model_len": 1024,
    "max_num_seqs": 32,
    "enable_prefix_caching": False,
    "seed": 0,
}
ON_A_GPU = {
    "gpu_memory_utilization": 0.1,  # only a check of what is free: the cache's size is given
    "kv_cache_memory_bytes": 2 << 30,
    "attention_backend": "FLASH_ATTN",
}
ON_A_CPU = {"enforce_eager": True, "max_num_batched_tokens": 1024}
ENVIRONMENT = {  # none of NVLink's multicast, which not every host of several cards allows
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    **dict.fromkeys(("NCCL_NVLS_ENABLE", "VLLM_ALLREDUCE_USE_SYMM_MEM"), "0"),
    **dict.fromkeys(("TORCH_SYMM_MEM_DISABLE_MULTICAST", "NVSHMEM_DISABLE_NVLS"), "1"),
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


class EngineError(RuntimeError):
    """An engine ended, or did not answer."""


class Engine:
    """An engine's process and all that it has started.

    Args:
        label: for messages and the log.
        engine: arguments of `vllm.LLM`.
        folder: where its log goes.
        environment: beside this process's.
        pauses: stop its processes (SIGSTOP) while it waits: on a CPU they would spin.
    """

    def __init__(
        self,
        label: str,
        engine: dict[str, Any],
        folder: Path,
        environment: dict[str, str],
        *,
        pauses: bool,
    ) -> None:
        self.label, self.pauses = label, pauses
        self.log = folder / f"{label}.log"
        self.began, self.start_s = time.monotonic(), 0.0
        self.pipe, theirs = Pipe()
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "vllm_gpu_served.py"), str(theirs.fileno())],
                env=ENVIRONMENT | os.environ | environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        theirs.close()
        self._send({"engine": engine})

    def started(self) -> dict[str, Any]:
        """Wait until it has loaded; `vllm`, its version, and `start_s`."""
        found = self._answer(START_SECONDS)
        self.start_s = round(time.monotonic() - self.began, 1)
        return found | {"start_s": self.start_s}

    def generate(self, prompts: list[list[int]], tokens: int, *, logits: int = 0) -> dict[str, Any]:
        """Greedy texts of exactly `tokens` tokens.

        Returns:
            `seconds`; `texts`, lists of tokens; and with `logits` the largest ones of each step,
            as `[token, value]` pairs.
        """
        return self._ask({"prompts": prompts, "tokens": tokens, "logits": logits})

    def statistics(self) -> list[list[dict[str, Any]]]:
        """Counters of the heads of each worker."""
        found: list[list[dict[str, Any]]] = self._ask({"statistics": True})["statistics"]
        return found

    def metrics(self) -> dict[str, float]:
        """VLLM's counters of speculation; the engine needs `disable_log_stats=False`."""
        found: dict[str, float] = self._ask({"metrics": True})["metrics"]
        return found

    def close(self) -> None:
        """End it, with its workers."""
        for number, patience in (
            (signal.SIGCONT, 0.0),
            (signal.SIGTERM, 10.0),
            (signal.SIGKILL, 5),
        ):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
        self.pipe.close()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        if self.pauses:
            os.killpg(self.process.pid, signal.SIGCONT)
        self._send(question)
        return self._answer(ANSWER_SECONDS)

    def _send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # told by the answer that does not come
            self.pipe.send_bytes(json.dumps(message).encode())

    def _answer(self, patience: float) -> dict[str, Any]:
        try:
            if not self.pipe.poll(patience):
                raise EngineError(f"{self.label}: no answer in {patience:.0f} s\n{self.log_tail()}")
            found: dict[str, Any] = json.loads(self.pipe.recv_bytes())
        except (EOFError, ConnectionError) as error:
            raise EngineError(f"{self.label} ended\n{self.log_tail()}") from error
        if self.pauses:
            os.killpg(self.process.pid, signal.SIGSTOP)
        return found

    def log_tail(self) -> str:
        """The last lines that it printed."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_LINES:])


@contextlib.contextmanager
def closing(engines: dict[str, Engine]) -> Iterator[dict[str, Engine]]:
    """All engines end with the context, whatever happens, also those added later."""
    try:
        yield engines
    finally:
        for engine in engines.values():
            engine.close()


def serve(parent: Connection) -> None:
    """The child: load, then answer until the parent hangs up."""
    job = json.loads(parent.recv_bytes())
    import vllm

    llm = vllm.LLM(**job["engine"])
    parent.send_bytes(json.dumps({"vllm": vllm.__version__}).encode())
    while True:
        try:
            question = json.loads(parent.recv_bytes())
        except EOFError:
            return
        if "statistics" in question:
            answer = {"statistics": llm.collective_rpc("flashhead_statistics")}
        elif "metrics" in question:
            told = (metric for metric in llm.get_metrics() if "spec_decode" in metric.name)
            values = {m.name.partition(":")[2]: m.value for m in told if hasattr(m, "value")}
            answer = {"metrics": values}
        else:
            answer = _generated(vllm, llm, question)
        parent.send_bytes(json.dumps(answer).encode())


def _generated(vllm: Any, llm: Any, question: dict[str, Any]) -> dict[str, Any]:
    logits = question["logits"]
    greedy = vllm.SamplingParams(
        temperature=0.0,
        max_tokens=question["tokens"],
        ignore_eos=True,
        detokenize=False,
        logprobs=logits or None,
    )
    prompts = [{"prompt_token_ids": tokens} for tokens in question["prompts"]]
    start = time.perf_counter()
    outputs = llm.generate(prompts, greedy, use_tqdm=False)
    seconds = time.perf_counter() - start
    best = [output.outputs[0] for output in outputs]
    found: dict[str, Any] = {"seconds": seconds, "texts": [list(one.token_ids) for one in best]}
    if logits:
        found["logits"] = [
            [[(token, entry.logprob) for token, entry in step.items()] for step in one.logprobs]
            for one in best
        ]
    return found


def main() -> None:
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)  # the parent hears when this process ends
    with Connection(descriptor) as parent:
        serve(parent)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
