"""Latent attention at ratio 1 must change nothing: largest logit difference in float32, real
models.

python benchmarks/latent_exact.py --data wikitext2-valid.txt --out latent-exact.json MODEL...
"""

import argparse
import json
from pathlib import Path

import torch

from flashhead.convert.latent import make_latent
from flashhead.environment import provenance
from flashhead.evaluate.text import read_documents, token_windows
from flashhead.integrations.latent_cache import LatentCache
from flashhead.integrations.latent_model import serve_latents
from flashhead.integrations.transformers import load_dense, load_tokenizer
from flashhead.models import resolve
from flashhead.nn.token_store import StoreOptions
from flashhead.options_latent import LatentOptions

TARGET = 1e-3


@torch.no_grad()
def logits(model, ids, cached):
    """All logits, in one pass or by way of a cache: a prefill, then token by token."""
    if not cached:
        return model(ids, use_cache=False).logits
    cache, half = LatentCache(model), ids.shape[1] - 16
    parts = [model(ids[:, :half], past_key_values=cache).logits]
    parts += [
        model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(half, ids.shape[1])
    ]
    return torch.cat(parts, 1)


def measure(name, data, rotary):
    source = resolve(name)
    model, tokenizer = load_dense(source, dtype=torch.float32), load_tokenizer(source)
    windows = token_windows(read_documents(data), tokenizer, 512, window_tokens=128)
    ids = torch.stack([window for window in windows if len(window) == 128][:1])
    want = logits(model, ids, cached=False)
    options = LatentOptions(kv_ratio=1.0, rotary=rotary)
    make_latent(model, options, windows)
    serve_latents(model, StoreOptions())
    row = {"model": Path(name).name, "rotary": rotary, "largest_logit": float(want.abs().max())}
    for key, cached in (("prefill", False), ("decode", True)):
        row[f"max_abs_difference_{key}"] = float((logits(model, ids, cached) - want).abs().max())
    return row


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rotary", default="rebuilt")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for name in args.models:
        rows.append(measure(name, args.data, args.rotary))
        print(json.dumps(rows[-1]), flush=True)
    document = {"rows": rows, "target": TARGET, **provenance()}
    document["argv"] = [Path(argument).name for argument in document["argv"]]
    if args.out:
        args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))
    worst = max(value for row in rows for key, value in row.items() if key.startswith("max"))
    raise SystemExit(worst > TARGET)


if __name__ == "__main__":
    main()
