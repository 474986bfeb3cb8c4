"""Closed-form latent attention at several settings from the same statistics: prefill perplexity.

    python benchmarks/latent_ratios.py MODEL --calibration FILE --data FILE --out FILE

Without --calibration the model samples its own text. The base is measured twice, by way of the
cache and in one forward pass without, to check the measurement.
"""

import argparse
import copy
import json
from pathlib import Path

import torch

from flashhead.convert.latent import make_latent, statistics_of
from flashhead.environment import provenance
from flashhead.evaluate.perplexity import measure
from flashhead.evaluate.text import read_documents, token_windows
from flashhead.integrations.latent_cache import LatentCache, RoundedCache
from flashhead.integrations.latent_model import serve_latents
from flashhead.integrations.latent_roles import find_attention
from flashhead.integrations.latent_text import file_windows, sample_documents
from flashhead.integrations.transformers import load_dense, load_tokenizer
from flashhead.models import resolve
from flashhead.nn.token_store import StoreOptions
from flashhead.options_latent import LatentOptions

CASES = (
    *((ratio, "rebuilt", "budget") for ratio in (1.5, 2.0, 2.5, 3.0, 4.0)),
    (2.0, "rebuilt", "uniform"),
    *((ratio, "decoupled", "budget") for ratio in (1.25, 1.5, 2.0)),
)


def direct(model, windows):
    """Perplexity of one forward pass a window, without a cache."""
    total = count = 0
    for window in windows:
        with torch.no_grad():
            out = model(window[None], use_cache=False).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(out, window[1:], reduction="sum"))
        count += len(window) - 1
    return float(torch.tensor(total / count).exp())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, nargs="*", default=[])
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=8176)
    parser.add_argument("--first", type=int, default=len(CASES), help="only so many settings")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    source = resolve(args.model)
    model, tokenizer = load_dense(source, dtype=torch.float32), load_tokenizer(source)
    model.set_attn_implementation("sdpa")
    text = token_windows(read_documents(args.data), tokenizer, args.limit)
    if args.calibration:
        windows = file_windows(tuple(args.calibration), tokenizer, args.calibration_tokens, 0)
    else:
        windows = sample_documents(load_dense(source), args.calibration_tokens, 0)
    statistics = statistics_of(model, find_attention(model), windows)
    settings = {"decode_share": 0.0, "rows": 8}
    base = measure(model, text, lambda: RoundedCache(model.config, StoreOptions()), **settings)
    document = {
        "model": Path(args.model).name,
        "calibration": [path.name for path in args.calibration] or "sampled",
        "calibration_tokens": sum(len(window) for window in windows),
        "base_perplexity": base["perplexity"],
        "base_perplexity_without_cache": direct(model, text),
        "tokens": base["tokens"],
        "rows": [],
    }
    print(json.dumps(document), flush=True)
    for ratio, rotary, ranks in CASES[: args.first]:
        options = LatentOptions(kv_ratio=ratio, rotary=rotary, ranks=ranks)
        latent = copy.deepcopy(model)
        report = make_latent(latent, options, windows, statistics=statistics, progress=False)
        serve_latents(latent, StoreOptions())
        found = measure(latent, text, lambda latent=latent: LatentCache(latent), **settings)
        row = {"kv_ratio": report["kv_ratio"], "rotary": rotary, "ranks": ranks}
        row |= {"ratio": found["perplexity"] / base["perplexity"], "widths": report["widths"]}
        row["expected_kl"] = sum(report["expected_kl"])
        document["rows"].append(row)
        print(json.dumps({k: v for k, v in row.items() if k != "widths"}), flush=True)
    document |= provenance()
    document["argv"] = [Path(argument).name for argument in document["argv"]]
    if args.out:
        args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
