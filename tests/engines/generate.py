"""Child process of the engine tests: a JSON job on the command line, a JSON answer in a file.

An engine holds its memory until its process ends, and cannot be forked from pytest's.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    """Build an engine, generate, and write tokens, log-probabilities and what was searched."""
    job, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        max_model_len=512,
        enforce_eager=True,
        worker_extension_cls="flashhead.integrations.vllm.worker.FlashHeadWorker",
        **{"max_num_seqs": 8, **job["engine"]},
    )
    params = [SamplingParams(**values) for values in job["params"]]
    numbers = {path: number for number, path in enumerate(filter(None, job["lora"]), 1)}
    adapters = [path and LoRARequest(path, numbers[path], path) for path in job["lora"]]
    outputs = llm.generate(job["prompts"], params, use_tqdm=False, lora_request=adapters)
    answers = [
        {
            "tokens": list(output.outputs[0].token_ids),
            "text": output.outputs[0].text,
            "logprobs": [
                {token: value.logprob for token, value in step.items()}
                for step in output.outputs[0].logprobs or []
            ],
        }
        for output in outputs
    ]
    statistics = [head for worker in llm.collective_rpc("flashhead_statistics") for head in worker]
    out.write_text(json.dumps({"answers": answers, "heads": statistics}))


if __name__ == "__main__":
    main()
