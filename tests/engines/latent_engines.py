"""Child process of test_latent_engines.py: a JSON job in a file, a JSON answer in another.

One engine after the other in this process: models of a few thousand weights, whose memory stays.
"""

import json
import os
import sys
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def main() -> None:
    """Greedy tokens and their log-probabilities, and what a token takes in the cache."""
    given, out = Path(sys.argv[1]), Path(sys.argv[2])
    from vllm import LLM, SamplingParams

    answers = {}
    for name, job in json.loads(given.read_text()).items():
        llm = LLM(
            skip_tokenizer_init=True,
            worker_extension_cls="flashhead.integrations.vllm.worker.FlashHeadWorker",
            **job["engine"],
        )
        rounds = []
        for prompts in job["rounds"]:
            params = SamplingParams(
                temperature=0, max_tokens=job["tokens"], logprobs=0, ignore_eos=True,
                detokenize=False,
            )  # fmt: skip
            inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
            found = [output.outputs[0] for output in llm.generate(inputs, params, use_tqdm=False)]
            rounds.append(
                [
                    {
                        "tokens": list(one.token_ids),
                        "logprobs": [
                            step[token].logprob
                            for token, step in zip(one.token_ids, one.logprobs, strict=True)
                        ],
                    }
                    for one in found
                ]
            )
        answers[name] = {
            "rounds": rounds,
            "cache_bytes": llm.collective_rpc("flashhead_cache_bytes")[0],
        }
        out.write_text(json.dumps(answers))
        llm.llm_engine.engine_core.shutdown()
        del llm


if __name__ == "__main__":
    main()
