"""What a selection of cached tokens keeps: attention mass, layer by layer, and the model's answers.

    python benchmarks/latent_recall.py MODEL --data wiki.txt --context 4096 \\
        --share 1/32,1/16,1/8,1/4 --bits 1,2,4 --block 1,16 --out recall.json

MODEL has latent attention with rebuilt or decoupled keys. First part: in one forward pass a window,
queries of `--queries` places in its second half meet the exact keys in float32, which gives the
true attention; a selection's recall is the mass that its tokens hold, by head and place. Beside it
the best selection that knows the truth, the first and last tokens alone, and chance. Second part:
the last `--decode` tokens of each window are decoded one by one with and without selection, all
after the same prefill: perplexity, KL divergence from full attention, equal argmax. Bytes are those
of the cache that a step reads.
"""

import argparse
import dataclasses
import json
import math
import time
from fractions import Fraction
from pathlib import Path

import torch

from flashhead.environment import provenance
from flashhead.evaluate.text import read_documents, token_windows
from flashhead.integrations.latent_cache import LatentCache
from flashhead.integrations.latent_model import latent_modules
from flashhead.integrations.transformers import load_dense, load_tokenizer
from flashhead.nn.latent_select import estimate_inputs, scan_keys
from flashhead.ops.latent_select import reference
from flashhead.ops.latent_select.api import latent_select
from flashhead.ops.latent_select.codes import KeyCodes, code_bytes
from flashhead.ops.latent_select.options import SelectOptions


def captured(model, window, places):
    """Turned queries of `places`, latents and rotary keys of all tokens, by module."""
    found = {}

    def keep(module, args, kwargs):
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        cos, sin = module.table.at(0, hidden.shape[1], hidden)
        latent, rotary = module.turned(module.compress(hidden), cos, sin)
        query = module.query(hidden, cos, sin)[0][:, places].transpose(0, 1)
        found[module] = (query.contiguous(), latent, rotary)

    modules = latent_modules(model).values()
    hooks = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules]
    try:
        model(window[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def true_attention(module, query, latent, rotary, lengths):
    """Exact softmax of each place: float32 `[places, heads, tokens]`."""
    keys = module._keys(latent, rotary, 0)[0]
    scores = query.unflatten(1, (module.shape.kv_heads, -1)) @ keys.mT * module.shape.scale
    scores = scores.flatten(1, 2).float()
    inside = torch.arange(scores.shape[-1]) < lengths[:, None]
    return scores.masked_fill(~inside[:, None], -torch.inf).softmax(-1)


def mass_at(true, index):
    """Mass of chosen tokens: `[places, heads]`."""
    picked = true.gather(2, index.clamp_min(0).long()[:, None].expand(-1, true.shape[1], -1))
    return picked.masked_fill(index[:, None] < 0, 0).sum(-1)


def recall_of_layer(module, caught, lengths, cases):
    """Mass that each case's selection holds, and what the estimates claim it holds."""
    query, latent, rotary = caught
    true, found = true_attention(module, query, latent, rotary, lengths), {}
    log_true = true.clamp_min(1e-30).log()
    keys = scan_keys(module, latent, rotary, 0).expand(len(query), -1, -1, -1)
    scanned, bias = estimate_inputs(module, query, None, latent.shape[1])
    coded = {bits: KeyCodes.of(keys[:1], bits) for bits in {case.bits for case in cases}}
    given = {"scale": module.shape.scale, "bias": bias}
    for case in cases:
        held = coded[case.bits]
        held = dataclasses.replace(
            held,
            codes=held.codes.expand(len(query), -1, -1, -1),
            scale=held.scale.expand(len(query), -1, -1),
        )
        index, claimed = latent_select(scanned, held, lengths, options=case, **given)
        found[case] = (mass_at(true, index), claimed)
    for tokens, block in {(case.tokens, case.block) for case in cases}:
        rules = {"oracle": log_true, "chance": torch.rand(true.shape) * 1e-3}
        for name, scores in rules.items():
            case = SelectOptions(tokens, block)
            index, _ = reference.choose(scores, lengths, None, None, case)
            found[name, tokens, block] = (mass_at(true, index), None)
        places = torch.arange(true.shape[-1])
        near = (places < lengths[:, None]) & (places >= lengths[:, None] - tokens + 1)
        near[:, 0] = True
        found["last only", tokens, block] = ((true * near[:, None]).sum(-1), None)
    return found


def summary(parts):
    """Mean and tenth percentile of recall over windows, places and heads, by layer and in all."""
    mass = torch.stack([torch.cat([own[0] for own in layer]) for layer in parts])
    flat = mass.flatten(1)
    made = {
        "mean": float(mass.mean()),
        "p10": float(mass.flatten().quantile(0.1)) if mass.numel() < 2**24 else None,
        "layer_mean": [round(float(x), 4) for x in flat.mean(1)],
        "layer_p10": [round(float(x), 4) for x in flat.quantile(0.1, 1)],
    }
    if parts[0][0][1] is not None:
        claimed = torch.stack([torch.cat([own[1] for own in layer]) for layer in parts])
        made["claimed_mean"] = float(claimed.mean())
        made["claimed_mean_abs_error"] = float((claimed - mass.mean(-1)).abs().mean())
    return made


@torch.no_grad()
def recalls(model, windows, cases, queries):
    """The first part: one row a case."""
    gathered: dict = {}
    modules = list(latent_modules(model).values())
    for number, window in enumerate(windows):
        places = torch.linspace(len(window) // 2, len(window) - 1, queries).long()
        caught = captured(model, window, places)
        for layer, module in enumerate(modules):
            found = recall_of_layer(module, caught[module], (places + 1).int(), cases)
            for name, own in found.items():
                layers = gathered.setdefault(name, [[] for _ in modules])
                layers[layer].append(own)
        print(f"window {number + 1} of {len(windows)}", flush=True)
    rows = []
    for name, parts in gathered.items():
        if isinstance(name, SelectOptions):
            about = {"method": f"{name.bits} bits", **dataclasses.asdict(name)}
        else:
            about = {"method": name[0], "tokens": name[1], "block": name[2]}
        rows.append(about | summary(parts))
    return sorted(rows, key=lambda row: (row["tokens"], row["block"], -row["mean"]))


def set_select(cache, case):
    """Select otherwise from now on, with the same codes."""
    for layer in cache.layers:
        if hasattr(layer, "select"):
            layer.select = case


@torch.no_grad()
def decoded(model, cache, batch, single, case):
    """Log-probabilities of the last `single` targets, and seconds a step; the cache is taken back
    afterwards.
    """
    set_select(cache, case)
    logits, start = [], time.perf_counter()
    for at in range(batch.shape[1] - single - 1, batch.shape[1] - 1):
        out = model(batch[:, at : at + 1], past_key_values=cache, use_cache=True)
        logits.append(out.logits[:, 0].float())
    seconds = (time.perf_counter() - start) / single
    cache.crop(-single)
    return torch.stack(logits, 1).log_softmax(-1), seconds


@torch.no_grad()
def perplexities(model, windows, cases, single, rows):
    """The second part: one row a case, and the full attention's."""
    batches = torch.stack(windows).split(rows)
    names = ("nll", "kl", "same", "seconds")
    sums = {case: dict.fromkeys(names, 0.0) for case in (None, *cases)}
    truths = {}
    for bits in sorted({case.bits for case in cases}):
        everything = SelectOptions(tokens=1 << 30, bits=bits)
        for number, batch in enumerate(batches):
            cache = LatentCache(model, select=everything)
            model(batch[:, : -single - 1], past_key_values=cache, logits_to_keep=1)
            own = [case for case in cases if case.bits == bits]
            for case in own if number in truths else [None, *own]:
                logs, seconds = decoded(model, cache, batch, single, case or everything)
                truth = truths.setdefault(number, logs)
                targets = batch[:, -single:, None]
                found = (
                    -logs.gather(2, targets).sum(),
                    (truth.exp() * (truth - logs)).sum(),
                    (truth.argmax(-1) == logs.argmax(-1)).sum(),
                    seconds / len(batches),
                )
                for name, value in zip(names, found, strict=True):
                    sums[case][name] += float(value)
            print(f"decoded with {bits} bits, {number + 1} of {len(batches)}", flush=True)
    count = len(windows) * single
    made = []
    for case, total in sums.items():
        about = {"method": method(case)} | (dataclasses.asdict(case) if case else {})
        about["perplexity"] = math.exp(total["nll"] / count)
        about["ratio"] = math.exp((total["nll"] - sums[None]["nll"]) / count)
        about |= {"kl": total["kl"] / count, "same_argmax": total["same"] / count}
        made.append(about | {"step_seconds": total["seconds"]})
    return made


def method(case):
    """How a row is called."""
    if case is None:
        return "full"
    # room for one choice only
    is_last = case.first_blocks + case.last_blocks == case.blocks - 1
    return "last only" if is_last else f"{case.bits} bits"


def bytes_read(model, context, row):
    """Bytes of the cache that a step reads at this context, bf16 latents, over those of all."""
    latent = scan = 0
    for module in latent_modules(model).values():
        shape = module.shape
        latent += 2 * shape.width
        groups, dim = shape.kv_heads, shape.head_dim
        if shape.rotary == "decoupled":
            groups, dim = 1, shape.width
        if row["method"].endswith("bits"):
            scan += groups * (code_bytes(dim, row["bits"]) + 2)
    read = scan * context + latent * min(row["tokens"], context)
    return {
        "latent_bytes_per_token": latent,
        "scan_bytes_per_token": scan,
        "bytes_share": read / (latent * context),
    }


def fractions(text):
    """`1/16,1/8` as numbers."""
    return [float(Fraction(part)) for part in text.split(",")]


def integers(text):
    return [int(part) for part in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--queries", type=int, default=32, help="places a window")
    parser.add_argument("--decode", type=int, default=64, help="tokens a window; 0: no second part")
    parser.add_argument("--rows", type=int, default=4, help="windows decoded together")
    parser.add_argument("--share", type=fractions, default=[1 / 16, 1 / 8, 1 / 4])
    parser.add_argument("--bits", type=integers, default=[1, 2, 4])
    parser.add_argument("--block", type=integers, default=[1, 16])
    parser.add_argument("--decode-cases", default="", help="of the second part: bits:block,...")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    model, tokenizer = load_dense(args.model, dtype=torch.float32), load_tokenizer(args.model)
    need = args.windows * args.context
    windows = token_windows(read_documents(args.data), tokenizer, need, window_tokens=args.context)
    windows = [window for window in windows if len(window) == args.context][: args.windows]
    sizes = [round(share * args.context) for share in args.share]
    cases = [
        SelectOptions(tokens, block, bits)
        for tokens in sizes for block in args.block for bits in args.bits
    ]  # fmt: skip
    document = {
        "benchmark": "latent_recall", "model": Path(args.model).name, "data": args.data.name,
        "context": args.context, "windows": len(windows), "queries": args.queries,
        "decoded": args.decode * len(windows), "dtype": "float32",
    }  # fmt: skip
    start = time.perf_counter()
    document["recall"] = recalls(model, windows, cases, args.queries)
    show(model, args.context, document["recall"])
    keep(document, start, args.out)
    if args.decode:
        chosen = [tuple(map(int, part.split(":"))) for part in args.decode_cases.split(",") if part]
        tried = [c for c in cases if not chosen or (c.bits, c.block) in chosen]
        tried += [SelectOptions(size, bits=tried[0].bits, last=size - 2) for size in sizes]
        document["decode"] = perplexities(model, windows, tried, args.decode, args.rows)
        show(model, args.context, document["decode"])
        keep(document, start, args.out)


def keep(document, start, out):
    """Write what there is."""
    document |= {"seconds": round(time.perf_counter() - start, 1), **provenance()}
    document["argv"] = [
        Path(argument).name if argument.startswith("/") else argument
        for argument in document["argv"]
    ]
    if out:
        out.write_text(json.dumps(document, indent=1) + "\n")


def show(model, context, rows):
    """Print a table, and note the bytes in its rows."""
    for row in rows:
        if "tokens" in row:
            row |= bytes_read(model, context, row)
        values = {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in row.items() if not name.startswith("layer_")
        }  # fmt: skip
        print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
