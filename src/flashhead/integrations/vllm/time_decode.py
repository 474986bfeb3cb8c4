"""`python -m flashhead.integrations.vllm.time_decode FD`: an engine that decodes when told to.

The parent (`bench/served.py`) holds two of these, one with the dense head, and lets them run in
turn. Messages are JSON over a pipe that is inherited: first the job (`model`, `engine`, `prompts`,
`tokens`), then one number of requests a timing.
"""

import json
import os
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

from flashhead.integrations.vllm.plugin import WORKER


def main() -> None:
    """Serve timings until the parent hangs up."""
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)  # the parent hears when this process ends
    with Connection(descriptor) as parent:
        job = json.loads(parent.recv_bytes())
        import vllm

        llm = vllm.LLM(job["model"], worker_extension_cls=WORKER, **job["engine"])
        parent.send_bytes(json.dumps({"vllm": vllm.__version__}).encode())
        while True:
            try:
                batch = int(parent.recv_bytes())
            except EOFError:
                return
            parent.send_bytes(json.dumps(_timed(vllm, llm, job, batch)).encode())


def _timed(vllm: Any, llm: Any, job: dict[str, Any], batch: int) -> dict[str, Any]:
    """Seconds of `batch` greedy texts of fixed length, their tokens, and what was searched."""
    prompts = [job["prompts"][number % len(job["prompts"])] for number in range(batch)]
    params = vllm.SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True)
    llm.reset_prefix_cache()
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    heads = [head for worker in llm.collective_rpc("flashhead_statistics") for head in worker]
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    return {"seconds": seconds, "tokens": tokens, "heads": heads}


if __name__ == "__main__":
    main()
