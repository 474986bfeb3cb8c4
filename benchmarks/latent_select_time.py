"""What a selection costs and saves: attention of one layer, all tokens against selected ones.

    python benchmarks/latent_select_time.py --shape decoupled --context 4096,65536 --share 1/16

Lines: full attention over all latents (`ops.latent_decode`), a scan and exact attention over the
selected tokens, and of that the scan alone, the choice alone and the rest (gather and attention).
First a selection of everything is compared with full attention. On a GPU all run in CUDA graphs on
caches that take turns; on a CPU in interleaved rounds.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from latent_recall import fractions, integers, keep

from flashhead.bench.device_timing import capture, copies_needed, time_graphs
from flashhead.bench.timing import interleave
from flashhead.ops.latent_decode.api import latent_decode
from flashhead.ops.latent_decode.rebuilt import latent_decode_rebuilt
from flashhead.ops.latent_decode.reference import KeyUp
from flashhead.ops.latent_decode.rows import Rows
from flashhead.ops.latent_select.api import estimate
from flashhead.ops.latent_select.codes import KeyCodes
from flashhead.ops.latent_select.options import SelectOptions
from flashhead.ops.latent_select.reference import choose

SHAPES = {
    # heads, kv_heads, head_dim, rank, rope
    "decoupled": (32, 1, 0, 1024, 64),
    "deepseek": (16, 1, 0, 512, 64),
    "rebuilt": (9, 3, 64, 192, 0),
}
SCALE = 0.1


class Layer:
    """One layer's cache of made-up tokens, and its ways to attend."""

    def __init__(self, shape, batch, context, bits, device, seed):
        self.heads, self.groups, self.head_dim, self.rank, self.rope = SHAPES[shape]
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*size):
            x = torch.randn(*size, generator=generator, device=device)
            return x.to(torch.bfloat16)

        self.latent = normal(batch, context, self.rank)
        self.rotary = normal(batch, context, self.rope) if self.rope else None
        self.lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
        self.up = None
        if self.head_dim:
            width, pairs = self.groups * self.head_dim, self.head_dim // 2
            weight = normal(width, self.rank) / self.rank**0.5
            angle = torch.arange(context, device=device)[:, None] / 100 ** torch.linspace(
                0, 1, pairs, device=device
            )
            self.up = KeyUp(weight, self.groups, angle.cos(), angle.sin())
            keys = self.up.keys(self.latent, 0).transpose(1, 2)
            self.query = normal(batch, self.heads, self.head_dim)
        else:
            keys = torch.cat((self.latent, self.rotary), -1).unsqueeze(2)
            self.query = normal(batch, self.heads, self.rank + self.rope) / 4
        self.codes = KeyCodes.of(keys, bits)
        self.rows = torch.arange(batch, device=device)[:, None]

    def attend(self, latent, rotary, lengths, up):
        if up is not None:
            return latent_decode_rebuilt(
                self.query, Rows(latent, self.rank), up, lengths, scale=SCALE
            )[0]
        turning = Rows(rotary, self.rope)
        return latent_decode(
            self.query, Rows(latent, self.rank), lengths, scale=SCALE, rotary=turning
        )[0]

    def full(self):
        return self.attend(self.latent, self.rotary, self.lengths, self.up)

    def scan(self):
        return estimate(self.query, self.codes, scale=SCALE)

    def choose(self, scores, options):
        return choose(scores, self.lengths, None, None, options)[0]

    def exact(self, index):
        """Made-up contexts are whole blocks: every index is a token."""
        places = index.long()
        rotary = None if self.rotary is None else self.rotary[self.rows, places]
        up = self.up
        if up is not None:  # one row
            up = KeyUp(up.weight, up.kv_heads, up.cos[places[0]], up.sin[places[0]])
        lengths = torch.full_like(self.lengths, index.shape[1])
        return self.attend(self.latent[self.rows, places], rotary, lengths, up)

    def selected(self, options):
        return self.exact(self.choose(self.scan(), options))

    @property
    def bytes(self):
        """Of latents."""
        return self.latent.nbytes + (0 if self.rotary is None else self.rotary.nbytes)


def verify(layer, context):
    """A selection of everything is full attention."""
    whole = layer.selected(SelectOptions(context, last=16))
    error = (whole.float() - layer.full().float()).norm() / whole.float().norm()
    if not error < 0.02:
        raise SystemExit(f"a selection of everything differs by {error:.3f}: not timed")


def measured(args, shape, batch, context):
    """Rows of one size."""
    device = torch.device(args.device)
    layer = Layer(shape, batch, context, args.bits, device, 0)
    verify(layer, context)
    copies = 1
    if device.type == "cuda":
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        copies = copies_needed(layer.codes.codes.nbytes, l2)
    layers = [
        layer,
        *(Layer(shape, batch, context, args.bits, device, i) for i in range(1, copies)),
    ]
    calls = {
        "full": lambda i: layers[i % copies].full(),
        "scan": lambda i: layers[i % copies].scan(),
    }
    for share in args.share:
        options = SelectOptions(round(share * context), args.block, args.bits)
        scores = layer.scan()
        index = layer.choose(scores, options)
        name = f"1/{round(1 / share)}"
        calls[f"select {name}"] = lambda i, o=options: layers[i % copies].selected(o)
        calls[f"choice {name}"] = lambda _, s=scores, o=options: layer.choose(s, o)
        calls[f"exact {name}"] = lambda i, x=index: layers[i % copies].exact(x)
    if device.type == "cuda":
        graphs = {name: capture(call, max(4, copies)) for name, call in calls.items()}
        found = time_graphs(graphs, "full", args.rounds)
    else:
        found = interleave(calls, "full", rounds=args.rounds)
    about = {
        "shape": shape,
        "batch": batch,
        "context": context,
        "latent_bytes": layer.bytes,
        "code_bytes": layer.codes.token_bytes * context * batch,
    }
    return [about | {"line": name, **row} for name, row in found.items()]


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="decoupled", help=f"of {', '.join(SHAPES)}, with commas")
    parser.add_argument("--context", type=integers, default=[4096, 16384, 65536])
    parser.add_argument("--batch", type=integers, default=[1])
    parser.add_argument("--share", type=fractions, default=[1 / 16])
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--block", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    start, document = time.perf_counter(), {"benchmark": "latent_select_time", "rows": []}
    document |= {"bits": args.bits, "block": args.block}
    for shape in args.shape.split(","):
        for batch in args.batch:
            for context in args.context:
                if SHAPES[shape][2] and batch > 1:
                    raise SystemExit("rebuilt keys are timed with --batch 1: rows go one by one")
                for row in measured(args, shape, batch, context):
                    document["rows"].append(row)
                    print(
                        json.dumps(
                            {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
                        ),
                        flush=True,
                    )
    keep(document, start, args.out)


if __name__ == "__main__":
    main()
