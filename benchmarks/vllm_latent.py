"""One latent folder, the same greedy text through transformers and through vLLM?

    python benchmarks/vllm_latent.py FOLDER --text wiki.txt --context 8192 --json out.json

Run with the interpreter of vLLM's environment. Prompts are the first `context - tokens` tokens of
the text from several places; vLLM keeps latents in its paged blocks, prefills in pieces and decodes
all prompts in one batch, transformers one by one with a `LatentCache`. Both are in `--dtype`.

In bf16 two best logits often tie, and then two right programs may say different tokens. So vLLM's
text is also given to transformers as it is: `gaps` are what vLLM's tokens are below the best logit,
in steps of bf16 at that logit. The exit code is 1 if texts differ where transformers' logits do not
tie (more than `--steps` steps). `--against MODEL` adds bytes a token of the original's cache.
"""

import argparse
import copy
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from flashhead.environment import provenance

CACHE_GIB = "2"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--context", type=int, default=8192, help="prompt and answer, in tokens")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--steps", type=float, default=1, help="of bf16 that count as a tie")
    parser.add_argument("--against", help="the model that was converted")
    parser.add_argument("--quantization", help="flashhead: with the folder's index")
    parser.add_argument("--compile", action="store_true", help="vLLM compiles (default: eager)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    prompts = prompts_of(args)
    served = in_vllm(args, args.folder, prompts)
    document: dict[str, Any] = {
        "benchmark": "vllm_latent",
        "model": Path(args.folder).name,
        **{k: getattr(args, k) for k in ("context", "tokens", "prompts", "dtype", "device")},
        "compiled": args.compile,
        "vllm": served["vllm"],
        "heads": served["heads"],
        "cache_bytes_per_token": sum(served["cache_bytes"].values()),
        "vllm_seconds": served["seconds"],
    }
    if args.against:
        there = in_vllm(args, args.against, [])["cache_bytes"]
        document["original_cache_bytes_per_token"] = sum(there.values())
    document |= compare(args, prompts, served["tokens"])
    print(json.dumps({k: v for k, v in document.items() if k != "rows"}, indent=1))
    for row in document["rows"]:
        print({k: v for k, v in row.items() if not k.endswith("_text")})
    if args.json:
        own = provenance()
        own["argv"] = [Path(a).name if "/" in a else a for a in own["argv"]]
        args.json.write_text(json.dumps(document | own, indent=1) + "\n")
    return 0 if document["worst_gap_steps"] <= args.steps else 1


def prompts_of(args: argparse.Namespace) -> list[list[int]]:
    """Tokens of the text, from places that are equally far apart."""
    from flashhead.integrations.transformers import load_tokenizer

    tokens = load_tokenizer(args.folder)(args.text.read_text(), verbose=False)["input_ids"]
    length = args.context - args.tokens
    apart = (len(tokens) - length) // args.prompts
    if apart < 1:
        raise SystemExit(f"{args.text}: {len(tokens)} tokens, wanted more than {length}")
    return [tokens[i * apart : i * apart + length] for i in range(args.prompts)]


def in_vllm(args: argparse.Namespace, model: str, prompts: list[list[int]]) -> dict[str, Any]:
    """What vLLM generates, in a process of its own, which gives all memory back."""
    job = {"model": model, "prompts": prompts, "tokens": args.tokens, "engine": engine_of(args)}
    with tempfile.TemporaryDirectory() as work:
        given, out = Path(work) / "job.json", Path(work) / "answer.json"
        given.write_text(json.dumps(job))
        environment = {"VLLM_CPU_KVCACHE_SPACE": CACHE_GIB, **os.environ}
        script = [sys.executable, __file__, "--child", str(given), str(out)]
        subprocess.run(script, env=environment, check=True)
        return json.loads(out.read_text())


def engine_of(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of vLLM's `LLM`."""
    found: dict[str, Any] = {
        "dtype": args.dtype,
        "max_model_len": args.context,
        "max_num_seqs": max(1, args.prompts),
        "enforce_eager": not args.compile,
    }
    if args.quantization:
        found["quantization"] = args.quantization
    return found


def child(given: str, out: str) -> None:
    """The process of `in_vllm`."""
    import vllm

    job = json.loads(Path(given).read_text())
    worker = "flashhead.integrations.vllm.worker.FlashHeadWorker"
    llm = vllm.LLM(job["model"], worker_extension_cls=worker, **job["engine"])
    started = time.perf_counter()
    tokens = []
    if job["prompts"]:
        params = vllm.SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True)
        inputs = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
        outputs = llm.generate(inputs, params, use_tqdm=False)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
    answer = {
        "tokens": tokens,
        "seconds": round(time.perf_counter() - started, 1),
        "cache_bytes": llm.collective_rpc("flashhead_cache_bytes")[0],
        "heads": llm.collective_rpc("flashhead_statistics")[0],
        "vllm": vllm.__version__,
    }
    Path(out).write_text(json.dumps(answer))


@torch.inference_mode()
def compare(
    args: argparse.Namespace, prompts: list[list[int]], served: list[list[int]]
) -> dict[str, Any]:
    """Texts of transformers beside vLLM's, and how far below the best vLLM's tokens are."""
    from flashhead.integrations.transformers import load_dense, load_tokenizer

    tokenizer = load_tokenizer(args.folder)
    model = load_dense(args.folder, dtype=getattr(torch, args.dtype)).to(args.device).eval()
    rows = []
    for prompt, theirs in zip(prompts, served, strict=True):
        started = time.perf_counter()
        own, logits = greedy_and_given(model, prompt, theirs)
        agree = next((i for i, (a, b) in enumerate(zip(own, theirs, strict=True)) if a != b), None)
        gaps = [gap_steps(line, token) for line, token in zip(logits, theirs, strict=True)]
        rows.append(
            {
                "prompt_tokens": len(prompt),
                "same_text": agree is None,
                "part_at": agree,
                "best_token": sum(gap == 0 for gap in gaps),
                "gaps": [round(gap, 3) for gap in gaps if gap],
                "seconds": round(time.perf_counter() - started, 1),
                "vllm_text": tokenizer.decode(theirs),
                "transformers_text": tokenizer.decode(own),
            }
        )
    return {
        "same_texts": sum(row["same_text"] for row in rows),
        "worst_gap_steps": max((gap for row in rows for gap in row["gaps"]), default=0.0),
        "rows": rows,
    }


def greedy_and_given(
    model: Any, prompt: list[int], given: list[int]
) -> tuple[list[int], list[torch.Tensor]]:
    """transformers' own greedy tokens, and its logits at each place of the given text.

    They are the same run as long as the texts are the same. Where they part, the cache is copied.
    """
    from flashhead.integrations.latent_cache import LatentCache

    cache = LatentCache(model)

    def after(tokens: list[int], held: Any) -> torch.Tensor:
        ids = torch.tensor([tokens], device=model.device)
        return model(ids, past_key_values=held, logits_to_keep=1).logits[0, -1].float()

    own: list[int] = []
    line = after(prompt, cache)
    logits, other = [line], cache
    for place, token in enumerate(given):
        own.append(int(line.argmax()))
        if other is cache and own[-1] != token:
            other = copy.deepcopy(cache)
        if place + 1 == len(given):
            break
        line = after(own[-1:], cache)
        logits.append(line if other is cache else after([token], other))
    return own, logits


def gap_steps(logits: torch.Tensor, token: int) -> float:
    """What a token is below the best logit, in steps of bf16 at the best."""
    best = float(logits.max())
    step = 2.0 ** (math.floor(math.log2(max(abs(best), 1e-30))) - 7)
    return (best - float(logits[token])) / step


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        sys.exit(main())
