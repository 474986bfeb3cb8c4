"""A whole decode step of a 7B-class model, full cache against latents, each at the largest batch
that fits a budget of memory.

    python benchmarks/latent_step.py --cache-gb 60 --context 16384 --out latent-step.json
    python benchmarks/latent_step.py --total-gb 24 --context 32768 --weights int4 --out 24gb.json

Random weights: 32 layers, d = 4,096, 32 heads x 128, MLP 11,008, vocabulary 32,000. The full model
caches keys and values of all heads; the latent one is DeepSeek-V2's attention (arXiv 2405.04434):
a latent of 1,024 and a rotary key of 64 for all heads, key and value projections absorbed. All rows
are `context` tokens long. One step, with norms, rotations, the write to the cache, MLP, head and
argmax, is one CUDA graph; its attention is first compared with float32 in the first layer.
`--total-gb` counts weights and cache, `--cache-gb` the cache alone (1 GB = 1e9 bytes).
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashhead.bench import device_timing
from flashhead.bench.timing import quantiles
from flashhead.environment import provenance
from flashhead.ops.latent_decode.api import latent_decode
from flashhead.ops.latent_decode.rows import Rows, quantize

GROUP = 64
WEIGHT_GROUP = 128
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model."""

    layers: int = 32
    d: int = 4096
    heads: int = 32
    head_dim: int = 128
    mlp: int = 11008
    vocab: int = 32000
    rank: int = 1024
    rope: int = 64

    def cache_bytes(self, kind: str) -> int:
        """A token's, of all layers."""
        if kind == "full":
            return self.layers * 2 * 2 * self.heads * self.head_dim
        scales = 0 if kind == "bf16" else 2 * self.rank // GROUP
        codes = self.rank * {"bf16": 16, "fp8": 8, "int8": 8, "int4": 4}[kind] // 8
        return self.layers * (codes + scales + 2 * self.rope)


class Linear:
    """A random linear layer in bf16 or, by torch's own product, int4 in groups of 128."""

    def __init__(self, rows: int, columns: int, weights: str, device: str) -> None:
        weight = torch.randn(rows, columns, device=device, dtype=torch.bfloat16) * columns**-0.5
        self.weight, self.scales = weight, None
        if weights == "int4":
            grouped = weight.float().unflatten(1, (-1, WEIGHT_GROUP))
            scale = grouped.abs().amax(-1, keepdim=True) / 7
            codes = ((grouped / scale).round() + 8).clamp(0, 15).to(torch.uint8).flatten(1)
            packed = codes[:, ::2] << 4 | codes[:, 1::2]
            self.weight = torch._convert_weight_to_int4pack(packed, 8)
            pairs = torch.cat((scale, torch.zeros_like(scale)), -1)
            self.scales = pairs.transpose(0, 1).contiguous().bfloat16()
            x = torch.randn(2, columns, device=device, dtype=torch.bfloat16)
            right = (
                x.float()
                @ ((codes.float() - 8).unflatten(1, (-1, WEIGHT_GROUP)) * scale).flatten(1).T
            )
            if not (self(x) - right).norm() < 0.02 * right.norm():
                raise RuntimeError("torch's int4 product gives something else")

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        if self.scales is None:
            return functional.linear(x, self.weight)
        return torch._weight_int4pack_mm(x, self.weight, WEIGHT_GROUP, self.scales)


class Model:
    """Weights, cache and one decode step."""

    def __init__(self, config: Config, kind: str, weights: str, device: str) -> None:
        self.config, self.kind, self.device = config, kind, device
        c, full = config, kind == "full"
        query = c.heads * (c.head_dim + (0 if full else c.rope))
        key = 2 * c.heads * c.head_dim if full else c.rank + c.rope
        sizes = {
            "in": (query + key, c.d),
            "out": (c.d, c.heads * c.head_dim),
            "gate_up": (2 * c.mlp, c.d),
            "down": (c.d, c.mlp),
        }
        self.layers: list[dict[str, Any]] = []
        for _ in range(c.layers):
            layer: dict[str, Any] = {
                name: Linear(*size, weights, device) for name, size in sizes.items()
            }
            layer["norms"] = torch.ones(2, c.d, device=device, dtype=torch.bfloat16)
            if not full:
                shape = (c.heads, c.head_dim, c.rank)
                up = torch.randn(2, *shape, device=device, dtype=torch.bfloat16)
                layer["key_up"], layer["value_up"] = (up * c.rank**-0.5).unbind()
            self.layers.append(layer)
        self.embedding = torch.randn(c.vocab, c.d, device=device, dtype=torch.bfloat16)
        self.head = Linear(c.vocab, c.d, weights, device)
        self.backend: SDPBackend | None = None

    @property
    def weight_bytes(self) -> int:
        """Of all weights, the embedding too."""
        found = self.embedding.nbytes + self.head.nbytes
        for layer in self.layers:
            found += sum(part.nbytes for part in layer.values())
        return found

    def fill(self, batch: int, context: int) -> None:
        """Take a cache of random tokens; the last one is written by the step."""
        c, device = self.config, self.device
        self.tokens = torch.randint(c.vocab, (batch,), device=device)
        self.place = torch.full((batch,), context - 1, device=device)
        self.lengths = torch.full((batch,), context, device=device, dtype=torch.int32)
        self.batch_index = torch.arange(batch, device=device)
        turned = c.head_dim if self.kind == "full" else c.rope
        angle = (context - 1) * 10000.0 ** -(torch.arange(0, turned, 2, device=device) / turned)
        self.cos, self.sin = angle.cos().bfloat16(), angle.sin().bfloat16()
        self.cache: list[Any] = []
        for _ in range(c.layers):
            if self.kind == "full":
                shape = (2, batch, context, c.heads, c.head_dim)
                cache: Any = torch.empty(shape, device=device, dtype=torch.bfloat16)
                for part in cache.flatten(0, 1):
                    part.normal_()
            else:
                cache = self._rows(batch, context)
            self.cache.append(cache)

    def _rows(self, batch: int, context: int) -> tuple[Rows, Rows]:
        c, device = self.config, self.device
        rotary = torch.randn(batch, context, c.rope, device=device, dtype=torch.bfloat16)
        rows = []
        for _ in range(batch):
            row = torch.randn(1, context, c.rank, device=device, dtype=torch.bfloat16)
            rows.append(Rows.of(row, self.kind, GROUP))
        scales = [row.scale for row in rows if row.scale is not None]
        codes = torch.cat([row.codes for row in rows])
        latent = Rows(codes, c.rank, self.kind, torch.cat(scales) if scales else None)
        return latent, Rows(rotary, c.rope)

    def step(self) -> Tensor:
        """The next token of each row."""
        x = self.embedding[self.tokens]
        for layer, cache in zip(self.layers, self.cache, strict=True):
            normed = functional.rms_norm(x, (self.config.d,), layer["norms"][0])
            x = x + layer["out"](self.attention(layer, cache, normed))
            normed = functional.rms_norm(x, (self.config.d,), layer["norms"][1])
            gate, up = layer["gate_up"](normed).chunk(2, -1)
            x = x + layer["down"](functional.silu(gate) * up)
        return self.head(functional.rms_norm(x, (self.config.d,))).argmax(-1)

    def attention(self, layer: dict[str, Any], cache: Any, x: Tensor) -> Tensor:
        """`[batch, heads * head_dim]`, after the new token has been written."""
        if self.kind == "full":
            query = self._append_full(layer, cache, x)
            keys, values = cache.transpose(2, 3)
            with sdpa_kernel(list(BACKENDS) if self.backend is None else self.backend):
                out = functional.scaled_dot_product_attention(query.unsqueeze(2), keys, values)
            return out.flatten(1)
        query = self._append_latent(layer, cache, x)
        latent, rotary = cache
        out, _ = latent_decode(query, latent, self.lengths, scale=self._scale(), rotary=rotary)
        return torch.einsum("bhr,hdr->bhd", out, layer["value_up"]).flatten(1)

    def _append_full(self, layer: dict[str, Any], cache: Tensor, x: Tensor) -> Tensor:
        c = self.config
        query, key, value = layer["in"](x).unflatten(-1, (3, c.heads, c.head_dim)).unbind(1)
        cache[0][self.batch_index, self.place] = self._turn(key)
        cache[1][self.batch_index, self.place] = value
        return self._turn(query)

    def _append_latent(self, layer: dict[str, Any], cache: tuple[Rows, Rows], x: Tensor) -> Tensor:
        c, (latent, rotary) = self.config, cache
        sizes = (c.heads * c.head_dim, c.heads * c.rope, c.rank, c.rope)
        fixed, turning, new, key = layer["in"](x).split(sizes, -1)
        new = functional.rms_norm(new, (c.rank,))
        if latent.scale is None:
            latent.codes[self.batch_index, self.place] = new
        else:
            codes, scale = quantize(new, self.kind, GROUP)
            latent.codes[self.batch_index, self.place] = codes
            latent.scale[self.batch_index, self.place] = scale
        rotary.codes[self.batch_index, self.place] = self._turn(key)
        fixed = fixed.unflatten(-1, (c.heads, -1))
        absorbed = torch.einsum("bhd,hdr->bhr", fixed, layer["key_up"])
        return torch.cat((absorbed, self._turn(turning.unflatten(-1, (c.heads, -1)))), -1)

    def _turn(self, x: Tensor) -> Tensor:
        re, im = x.chunk(2, -1)
        return torch.cat((re * self.cos - im * self.sin, im * self.cos + re * self.sin), -1)

    def _scale(self) -> float:
        return (self.config.head_dim + self.config.rope) ** -0.5

    def error(self) -> float:
        """Relative error of the first layer's attention in the first row, against float32 over the
        keys and values themselves.
        """
        c, layer, cache = self.config, self.layers[0], self.cache[0]
        x = functional.rms_norm(self.embedding[self.tokens], (c.d,), layer["norms"][0])
        got = self.attention(layer, cache, x)[0].float()
        if self.kind == "full":
            query = self._append_full(layer, cache, x)[0].float()
            keys, values = (part[0].float().transpose(0, 1) for part in cache)
            scale = c.head_dim**-0.5
        else:
            query = self._append_latent(layer, cache, x)[0].float()
            latent, keys = (part.take(torch.tensor([0])).read(torch.float32) for part in cache)
            values = torch.einsum("tr,hdr->htd", latent[0], layer["value_up"].float())
            keys = torch.cat((latent, keys), -1)
            scale = self._scale()
        weights = (query.unsqueeze(1) @ keys.mT * scale).softmax(-1)
        right = (weights @ values).flatten()
        return float((got - right).norm() / right.norm())


def choose_backend(model: Model) -> None:
    """Of torch's kernels for a full cache the fastest."""
    x = torch.randn(len(model.tokens), model.config.d, device=model.device, dtype=torch.bfloat16)
    took = {}
    for backend in BACKENDS:
        model.backend = backend
        try:
            took[backend] = device_timing.quick_us(
                lambda _: model.attention(model.layers[0], model.cache[0], x)
            )
        except RuntimeError as error:
            print(f"  {backend}: {str(error).splitlines()[0]}")
    model.backend = min(took, key=lambda backend: took[backend])


def time_step(step: Callable[[], Tensor], repeats: int) -> tuple[float, float, float]:
    """Milliseconds of a replay: median, p10, p90."""
    captured = device_timing.capture(lambda _: step(), 1)
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        captured.graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return quantiles(times)


def run(config: Config, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """One model at its largest batch."""
    model = Model(config, kind, args.weights, "cuda")
    row_bytes = config.cache_bytes(kind) * args.context
    budget = 1e9 * (args.cache_gb or args.total_gb)
    batch = int((budget - (0 if args.cache_gb else model.weight_bytes)) // row_bytes)
    found = {"kind": kind, "batch": batch, "row_bytes": row_bytes}
    found |= {"weight_bytes": model.weight_bytes, "cache_bytes": batch * row_bytes}
    if batch < 1:
        return found | {"left_out": f"one row takes {row_bytes / 1e9:.1f} GB"}
    batch = min(batch, args.most) if args.most else batch
    model.fill(batch, args.context)
    if kind == "full":
        choose_backend(model)
        found["kernel"] = str(model.backend)
    error = model.error()
    if not error < args.error:
        raise RuntimeError(f"{kind}: attention's relative error is {error:.1e}")
    median, p10, p90 = time_step(model.step, args.repeats)
    return found | {
        "batch": batch,
        "error": error,
        "step_ms": median,
        "p10_ms": p10,
        "p90_ms": p90,
        "tok_per_sec": 1e3 * batch / median,
        "bytes_read": model.weight_bytes - model.embedding.nbytes + batch * row_bytes,
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=16384)
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--cache-gb", type=float)
    budget.add_argument("--total-gb", type=float)
    parser.add_argument("--weights", choices=("bf16", "int4"), default="bf16")
    parser.add_argument("--kinds", default="full,bf16,int4")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--most", type=int, help="rows at most")
    parser.add_argument("--error", type=float, default=0.02, help="of attention, relative")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device")
    config = Config(layers=args.layers)
    document: dict[str, Any] = {"config": dataclasses.asdict(config), "rows": []}
    document |= {"context": args.context, "weights": args.weights}
    for kind in args.kinds.split(","):
        torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(0)
        row = run(config, kind, args)
        document["rows"].append(row)
        torch.cuda.empty_cache()
        args.out.write_text(json.dumps(document | provenance(), indent=1))
        if "left_out" in row:
            print(f"{kind:5} left out: {row['left_out']}")
            continue
        print(
            f"{kind:5} batch {row['batch']:3}  step {row['step_ms']:7.2f} ms "
            f"({row['p10_ms']:.2f}-{row['p90_ms']:.2f})  {row['tok_per_sec']:8.1f} tokens/s  "
            f"reads {row['bytes_read'] / 1e9:.1f} GB, {row['bytes_read'] / row['batch'] / 1e9:.2f} "
            f"a token; weights {row['weight_bytes'] / 1e9:.1f} GB, cache "
            f"{row['cache_bytes'] / 1e9:.1f}, error {row['error']:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
