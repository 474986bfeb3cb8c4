"""Does a selection keep the needle? Numbers are asked for that stand once in a long document.

    python benchmarks/latent_needle.py MODEL --task lookup --context 2048 --share 1/32,1/16,1/8

MODEL has latent attention. What the questions of a document share is read at once; the rest of each
question and its answer are decoded one token at a time, so each of these steps reads its own
selection. For every budget: answers whose tokens all are the argmax, and the mean log-probability
of the right tokens. `last only` reads the first and the last tokens.
"""

import argparse
import dataclasses
import itertools
import json
import time
from pathlib import Path

import torch
from latent_recall import bytes_read, fractions, integers, keep, method, set_select

from flashhead.evaluate.suite.probes import probe
from flashhead.integrations.latent_cache import LatentCache
from flashhead.integrations.transformers import load_dense, load_tokenizer
from flashhead.ops.latent_select.options import SelectOptions

EVERYTHING = 1 << 30


def tokenised(tokenizer, group):
    """Tokens that the questions of a document share, and the rest of each with its answer."""
    prompts = [tokenizer(doc["prompt"])["input_ids"] for doc in group]
    whole = [
        prompt + tokenizer(" " + doc["target"].strip(), add_special_tokens=False)["input_ids"]
        for prompt, doc in zip(prompts, group, strict=True)
    ]
    columns = list(zip(*prompts, strict=False))
    shared = next(i for i, tokens in enumerate([*columns[:-1], range(2)]) if len(set(tokens)) > 1)
    parts = [
        (tokens[shared:], len(tokens) - len(prompt))
        for tokens, prompt in zip(whole, prompts, strict=True)
    ]
    return torch.tensor([prompts[0][:shared]]), parts


@torch.no_grad()
def answered(model, cache, rest, length):
    """Whether an answer is right, and its mean log-probability; the cache is taken back."""
    logs, right = 0.0, True
    for place, (token, target) in enumerate(itertools.pairwise(rest)):
        step = torch.tensor([[token]])
        logits = model(step, past_key_values=cache, use_cache=True).logits[0, 0].float()
        if place >= len(rest) - 1 - length:
            logs += float(logits.log_softmax(-1)[target])
            right &= int(logits.argmax()) == target
    cache.crop(1 - len(rest))
    return right, logs / length


@torch.no_grad()
def measured(model, tokenizer, docs, cases, bits):
    """One row a case."""
    found = {case: [] for case in (None, *cases)}
    for _, group in itertools.groupby(docs, key=lambda doc: doc["group"]):
        shared, parts = tokenised(tokenizer, list(group))
        everything = SelectOptions(tokens=EVERYTHING, bits=bits)
        cache = LatentCache(model, select=everything)
        model(shared, past_key_values=cache, logits_to_keep=1)
        for number, (rest, length) in enumerate(parts):
            for case, own in found.items():
                set_select(cache, case or everything)
                own.append(answered(model, cache, rest, length))
            print(f"question {number + 1}: full attention {found[None][-1]}", flush=True)
    rows = []
    for case, own in found.items():
        about = {"method": method(case)} | (dataclasses.asdict(case) if case else {})
        about |= {"right": sum(right for right, _ in own), "of": len(own)}
        rows.append(about | {"log_probability": sum(logs for _, logs in own) / len(own)})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--task", choices=("lookup", "needle"), default="lookup")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--share", type=fractions, default=[1 / 32, 1 / 16, 1 / 8])
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--block", type=integers, default=[1, 16])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    start = time.perf_counter()
    model, tokenizer = load_dense(args.model, dtype=torch.float32), load_tokenizer(args.model)
    docs = probe(
        args.task,
        (args.context,),
        args.questions,
        0,
        lambda text: len(tokenizer(text)["input_ids"]),
    )
    sizes = [round(share * args.context) for share in args.share]
    cases = [SelectOptions(size, block, args.bits) for size in sizes for block in args.block]
    cases += [SelectOptions(size, bits=args.bits, last=size - 2) for size in sizes]
    document = {
        "benchmark": "latent_needle", "model": Path(args.model).name, "task": args.task,
        "context": args.context, "dtype": "float32",
    }  # fmt: skip
    document["rows"] = measured(model, tokenizer, docs, cases, args.bits)
    for row in document["rows"]:
        if "tokens" in row:
            row |= bytes_read(model, args.context, row)
        print(json.dumps(row), flush=True)
    keep(document, start, args.out)


if __name__ == "__main__":
    main()
