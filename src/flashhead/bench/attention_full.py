"""Decode attention over full caches of keys and values: the baselines, each in its best form.

On a GPU torch's kernels are tried one by one (FlashAttention with split keys, cuDNN, the memory-
efficient kernel) and FlexAttention, whose compiled form for one query splits keys too; on a CPU
`scaled_dot_product_attention` and plain products. The fastest that is right is the baseline. torch
has no kernel that reads an fp8 cache of keys and values.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashhead.bench.latent_problem import errors_of

GPU_BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclasses.dataclass(frozen=True)
class FullProblem:
    """Keys and values of all heads, in several copies.

    Args:
        query: `bf16[batch, heads, 1, head_dim]`.
        keys: copies of `bf16[batch, kv_heads, context, head_dim]`.
        values: likewise.
    """

    query: Tensor
    keys: list[Tensor]
    values: list[Tensor]

    @property
    def bytes_read(self) -> int:
        """Bytes of the cache that one step reads."""
        return self.keys[0].nbytes + self.values[0].nbytes

    @property
    def grouped(self) -> bool:
        """Whether several query heads share a key."""
        return self.query.shape[1] != self.keys[0].shape[1]

    def errors(self, out: Tensor) -> tuple[float, float]:
        """As `errors_of`."""
        return errors_of(out, self._reference)

    def _reference(self, row: int, dtype: torch.dtype) -> Tensor:
        """`[heads, 1, head_dim]`, one KV head after the other: float64 takes room."""
        found = []
        share = self.query.shape[1] // self.keys[0].shape[1]
        for head in range(self.keys[0].shape[1]):
            query = self.query[row, head * share : (head + 1) * share, 0].to(dtype)
            keys, values = (x[0][row, head].to(dtype) for x in (self.keys, self.values))
            weights = (query @ keys.T / math.sqrt(query.shape[-1])).softmax(-1)
            found.append(weights @ values)
        return torch.cat(found)[:, None]


def make_full_problem(
    batch: int, context: int, heads: int, kv_heads: int, head_dim: int, copies: int, device: str
) -> FullProblem:
    """Random numbers of unit variance."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    query = normal(batch, heads, 1, head_dim)
    keys = [normal(batch, kv_heads, context, head_dim)]
    values = [normal(batch, kv_heads, context, head_dim)]
    for _ in range(copies - 1):
        keys.append(keys[0].clone())
        values.append(values[0].clone())
    return FullProblem(query, keys, values)


def forms(problem: FullProblem, device: str) -> dict[str, Callable[[int], Tensor]]:
    """Ways to the same attention; call number i reads the copy of its turn."""
    grouped = problem.grouped

    def sdpa(number: int) -> Tensor:
        turn = number % len(problem.keys)
        return functional.scaled_dot_product_attention(
            problem.query, problem.keys[turn], problem.values[turn], enable_gqa=grouped
        )

    if device == "cpu":
        return {"SDPA": sdpa, "products": lambda number: _products(problem, number)}
    found: dict[str, Callable[[int], Tensor]] = {}
    for name, backend in GPU_BACKENDS.items():
        found[name] = functools.partial(_restricted, sdpa, backend)
    found["FlexAttention"] = _flex(problem)
    return found


def _restricted(call: Callable[[int], Tensor], backend: Any, number: int) -> Tensor:
    with sdpa_kernel(backend):
        return call(number)


def _flex(problem: FullProblem) -> Callable[[int], Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()  # beyond some shapes it would run eagerly without a word
    compiled = torch.compile(flex_attention, dynamic=False)

    def call(number: int) -> Tensor:
        turn = number % len(problem.keys)
        out = compiled(
            problem.query, problem.keys[turn], problem.values[turn], enable_gqa=problem.grouped
        )
        assert isinstance(out, Tensor)
        return out

    return call


def _products(problem: FullProblem, number: int) -> Tensor:
    turn = number % len(problem.keys)
    keys, values = problem.keys[turn], problem.values[turn]
    query = problem.query.unflatten(1, (keys.shape[1], -1)).squeeze(3)
    scores = (query @ keys.mT).float() / math.sqrt(query.shape[-1])
    return (scores.softmax(-1).to(values.dtype) @ values).flatten(1, 2).unsqueeze(2)
