"""`python -m flashhead.integrations.vllm.run_features JOB`: requests through one engine.

The job is a JSON file: `name` (of the engine, for progress), `model`, `engine` (arguments of
`vllm.LLM`), `features` (`evaluate/features.py` as dictionaries), `answer` (file to write) and `log`
(file for what vLLM prints, or null: stderr). The answer is a JSON file as well: for each feature
its rounds of answers, what FlashHead searched meanwhile, and seconds.

Whether FlashHead serves is the environment's choice (`FLASHHEAD_ENABLED`), not the job's.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from flashhead.integrations.vllm.plugin import WORKER


def main() -> None:
    """Run the job named on the command line."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    screen = _redirect(job["log"])
    started = time.perf_counter()
    _say(screen, job, f"loading {job['model']} ...")
    import vllm

    llm = vllm.LLM(job["model"], worker_extension_cls=WORKER, **job["engine"])
    loaded = time.perf_counter()
    features = {}
    for number, feature in enumerate(job["features"], 1):
        _say(screen, job, f"{feature['name']} ({number} of {len(job['features'])})")
        features[feature["name"]] = _run(llm, feature)
    answer = {
        "vllm": vllm.__version__,
        "features": features,
        "heads": _heads(llm),
        "load_seconds": loaded - started,
        "seconds": time.perf_counter() - started,
    }
    partial = Path(f"{job['answer']}.partial")
    partial.write_text(json.dumps(answer), encoding="utf-8")
    partial.replace(job["answer"])


def _redirect(log: str | None) -> TextIO:
    """Send what this process and its workers print to the log; returns the screen."""
    screen = os.fdopen(os.dup(2), "w", buffering=1)
    if log is None:
        os.dup2(2, 1)
        return screen
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)
    return screen


def _say(screen: TextIO, job: dict[str, Any], text: str) -> None:
    screen.write(f"flashhead: {job['name']}: {text}\n")


def _run(llm: Any, feature: dict[str, Any]) -> dict[str, Any]:
    """Answers to a feature's requests, or why vLLM refused them."""
    tokenizer = llm.get_tokenizer()
    prompts = [request["prompt"] for request in feature["requests"]]
    llm.reset_prefix_cache()
    before, started = _rows(llm), time.perf_counter()
    rounds, refused = [], None
    try:
        for _ in range(feature["rounds"]):
            params = [_params(request["params"], tokenizer) for request in feature["requests"]]
            rounds.append([_answer(o) for o in llm.generate(prompts, params, use_tqdm=False)])
    except ValueError as error:  # a parameter that this engine does not take
        refused = " ".join(str(error).split())
    after = _rows(llm)
    return {
        "rounds": rounds,
        "refused": refused,
        "searched_rows": after[0] - before[0],
        "dense_rows": after[1] - before[1],
        "seconds": time.perf_counter() - started,
    }


def _params(values: dict[str, Any], tokenizer: Any) -> Any:
    """VLLM's sampling parameters, with ids for the texts of tokens."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    def token(text: str) -> int:
        return int(tokenizer.encode(text, add_special_tokens=False)[-1])

    values = dict(values)
    if "structured_outputs" in values:
        values["structured_outputs"] = StructuredOutputsParams(**values["structured_outputs"])
    for name, wanted in (
        ("stop_tokens", "stop_token_ids"),
        ("allowed_tokens", "allowed_token_ids"),
    ):
        if name in values:
            values[wanted] = sorted({token(text) for text in values.pop(name)})
    if "biased_tokens" in values:
        biases = values.pop("biased_tokens").items()
        values["logit_bias"] = {token(text): bias for text, bias in biases}
    return SamplingParams(**values)


def _answer(output: Any) -> dict[str, Any]:
    """A request's answer as JSON values."""
    return {
        "prompt_tokens": len(output.prompt_token_ids),
        "cached_tokens": output.num_cached_tokens,
        "prompt_logprobs": _logprobs(output.prompt_logprobs),
        "outputs": [
            {
                "tokens": list(completion.token_ids),
                "text": completion.text,
                "finish": completion.finish_reason,
                "logprobs": _logprobs(completion.logprobs),
            }
            for completion in output.outputs
        ],
    }


def _logprobs(positions: Any) -> list[list[tuple[int, float]]] | None:
    """Pairs of token and log-probability, position by position; the first of a prompt has none."""
    if positions is None:
        return None
    return [
        [(int(token), float(entry.logprob)) for token, entry in (position or {}).items()]
        for position in positions
    ]


def _heads(llm: Any) -> list[dict[str, Any]]:
    """Counters of the target's heads on the first worker that has any; none: FlashHead is off."""
    workers: list[list[dict[str, Any]]] = llm.collective_rpc("flashhead_statistics")
    found = ([head for head in heads if not head.get("draft")] for heads in workers)
    return next((heads for heads in found if heads), [])


def _rows(llm: Any) -> tuple[int, int]:
    """Rows searched and rows dense, so far."""
    heads = _heads(llm)
    searched = sum(head.get("searched_rows", 0) for head in heads)
    return searched, sum(head.get("dense_rows", 0) for head in heads)


if __name__ == "__main__":
    main()
