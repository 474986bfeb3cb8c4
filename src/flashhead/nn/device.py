"""The head's searches on a GPU: nothing waits for the device, answers stay on it.

What `next_token` returns there (`DeviceNextToken`) is one tensor; its fields are views or computed
when they are looked at. Counters of the head are kept on the device and read when `head.stats` is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashhead.index.clusters import ClustersIndex
from flashhead.index.codes import CodesIndex
from flashhead.nn.graphs import GraphCache, raw_stream, replays
from flashhead.nn.output import HeadOutput, NextToken
from flashhead.ops.cascade import triton as ops
from flashhead.ops.cascade.triton_launch import MOST_STATES

TOTALS = 5
MOST_CONSTANTS = 1024
"""Small tensors that are kept, of one value each."""


class DeviceNextToken(NextToken):
    """`NextToken` whose fields come from the packed answers of a search.

    Args:
        answers: `int64[8, n]` of `ops.cascade.triton.next_token`.
    """

    def __init__(self, answers: Tensor) -> None:
        object.__setattr__(self, "answers", answers)

    @property
    def tokens(self) -> Tensor:
        """`int64[n]`, a view."""
        return self.answers[0]

    @property
    def certified(self) -> Tensor:
        """`bool[n]`."""
        return self.answers[1] != 0

    @property
    def fallback(self) -> Tensor:
        """`bool[n]`: more than half of the rows were scored exactly."""
        return self.answers[2] != 0

    @property
    def candidates(self) -> Tensor:
        """`int64[n]`, a view."""
        return self.answers[3]

    @property
    def bytes_read(self) -> Tensor:
        """`int64[n]`, a view."""
        return self.answers[4]

    @property
    def scores(self) -> Tensor:
        """`float32[n]`, exact scores of the tokens: logit, bias and noise."""
        return self.answers[5].view(torch.int32)[::2].view(torch.float32)  # little-endian

    answers: Tensor


class DeviceSearch:
    """Searches of one head on its device.

    Args:
        index: codes or clusters, on the device of `weight`.
        weight: bfloat16, float16 or float32 `[V, d]`, contiguous.
        bias: `[V]` or None.
    """

    def __init__(
        self, index: CodesIndex | ClustersIndex, weight: Tensor, bias: Tensor | None
    ) -> None:
        self.weight, self.device = weight.detach(), weight.device
        self.bias = None if bias is None else bias.detach().float().view(1, -1)
        self.graphs = GraphCache()
        self.totals = torch.zeros(TOTALS, dtype=torch.int64, device=self.device)
        self._counters_of: dict[int, Tensor] = {}
        self._constants: dict[tuple[Any, ...], Tensor] = {}
        ops.check(self.weight)
        self.index = index
        if isinstance(index, CodesIndex):
            self.codes = ops.device_index(index, self.device)
            probability = index.options.failure_probability
            stages = index.planes + 1
            self._zs = {p: ops.kernel_z(p, stages) for p in (1e-6, 0.0, probability)}
        else:
            from flashhead.ops.probe.api import estimated_tokens

            self.estimated = estimated_tokens(index)

    def next_token(
        self,
        hidden: Tensor,
        failure_probability: float,
        temperature: float = 0.0,
        seed: int = 0,
        steps: Tensor | None = None,
    ) -> DeviceNextToken:
        """Certified winners, with Gumbel noise if the temperature is above 0.

        Args:
            hidden: floating `[n, d]`.
            failure_probability: of the certificate.
            temperature: 0 or more.
            seed: 64 bits.
            steps: `int64[n]`; None: 0, 1, ....
        """
        z = self._z(failure_probability)
        if temperature == 0:
            (answers,) = self._run(("token", z), self._tokens(z), [hidden], 0)
            return DeviceNextToken(answers)
        n = len(hidden)
        steps = self._counting(n) if steps is None else steps.to(self.device)
        noise = [self._temperature(n, temperature), self._seed(n, seed)]
        (answers,) = self._run(("drawn", z), self._tokens(z), [hidden, steps, *noise], 2)
        return DeviceNextToken(answers)

    def logits(
        self, hidden: Tensor, failure_probability: float, kl_budget: float
    ) -> tuple[Tensor, DeviceNextToken]:
        """Complete logits `float32[n, V]` and the certified winners."""
        z = self._z(failure_probability)
        codes = self.codes

        def search(hidden: Tensor, counters: Tensor, totals: Tensor) -> tuple[Tensor, ...]:
            return ops.logits(
                hidden.contiguous(),
                self.weight,
                self.bias,
                codes.tensors,
                codes.sizes,
                counters,
                totals,
                z,
                codes.reach,
                kl_budget,
            )

        logits, answers = self._run(("logits", z, kl_budget), search, [hidden], 0)
        return logits, DeviceNextToken(answers)

    def clusters(self, hidden: Tensor, winner_only: bool) -> tuple[Tensor, Tensor | None]:
        """Tokens `int64[n]` and complete logits `float32[n, V]` of a clusters index."""
        from flashhead.ops.probe.api import search

        index = self.index
        assert isinstance(index, ClustersIndex)
        bias = None if self.bias is None else self.bias[0]

        def run(hidden: Tensor) -> tuple[Tensor, ...]:
            tokens, logits = search(
                hidden, self.weight, bias, index, self.estimated, winner_only=winner_only
            )
            return (tokens,) if logits is None else (tokens, logits)

        found = self.graphs(("clusters", winner_only, len(hidden)), run, [hidden])
        return found[0], None if winner_only else found[1]

    def take_totals(self) -> list[int]:
        """Hidden states, certified, fallback, candidates, bytes since the last call; waits."""
        numbers = [int(number) for number in self.totals.tolist()]
        self.totals.zero_()
        return numbers

    def _z(self, failure_probability: float) -> float:
        if failure_probability not in self._zs:
            stages = self.codes.layout.planes + 1
            self._zs[failure_probability] = ops.kernel_z(failure_probability, stages)
        return self._zs[failure_probability]

    def _tokens(self, z: float) -> Any:
        codes = self.codes

        def search(hidden: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            *noise, counters, totals = rest
            if noise:
                steps, temperature, seeds = noise
                noise = [temperature, seeds, steps]
            answers = ops.next_token(
                hidden.contiguous(),
                self.weight,
                self.bias,
                codes.tensors,
                codes.sizes,
                noise,
                counters,
                totals,
                z,
                codes.reach,
            )
            return (answers,)

        return search

    def _run(
        self, kind: tuple[Any, ...], function: Any, inputs: list[Tensor], constant: int
    ) -> tuple[Tensor, ...]:
        """In parts of at most `MOST_STATES` hidden states, each by a replay or directly."""
        if len(inputs[0]) <= MOST_STATES:
            return self._part(kind, function, inputs, constant)
        parts = [x.split(MOST_STATES) for x in inputs]
        found = [
            self._part(kind, function, list(part), constant) for part in zip(*parts, strict=True)
        ]
        *first, answers = zip(*found, strict=True)
        return (*(torch.cat(part) for part in first), torch.cat(answers, 1))

    def _part(
        self, kind: tuple[Any, ...], function: Any, inputs: list[Tensor], constant: int
    ) -> tuple[Tensor, ...]:
        replayed = replays(inputs[0])
        own = self._counters(raw_stream(inputs[0])) if replayed else self._new_counters()

        def run(*given: Tensor) -> tuple[Tensor, ...]:
            result: tuple[Tensor, ...] = function(*given, own, self.totals)
            return result

        def warm_up(*given: Tensor) -> None:  # not counted
            function(*given, own, torch.zeros_like(self.totals))

        return self.graphs((*kind, len(inputs[0])), run, inputs, constant, warm_up)

    def _new_counters(self) -> Tensor:
        return torch.zeros(ops.COUNTERS, dtype=torch.int32, device=self.device)

    def _counters(self, stream: int) -> Tensor:
        """Counters of a stream: kernels leave them at zero."""
        if stream not in self._counters_of:
            self._counters_of[stream] = self._new_counters()
        return self._counters_of[stream]

    def _kept(self, key: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
        """A tensor that is made once and never changed: a graph copies it once."""
        if key not in self._constants:
            if len(self._constants) >= MOST_CONSTANTS:
                self._constants.clear()
            self._constants[key] = make()
        return self._constants[key]

    def _counting(self, n: int) -> Tensor:
        return self._kept(("steps", n), lambda: torch.arange(n, device=self.device))

    def _temperature(self, n: int, temperature: float) -> Tensor:
        key = ("temperature", n, temperature)
        return self._kept(
            key, lambda: torch.full((n,), temperature, dtype=torch.float32, device=self.device)
        )

    def _seed(self, n: int, seed: int) -> Tensor:
        from flashhead.ops.noise.triton import signed

        return self._kept(
            ("seed", n, seed),
            lambda: torch.full((n,), signed(seed), dtype=torch.int64, device=self.device),
        )

    def cluster_counts(self, n: int, dense_bytes: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows scored exactly if all clusters were full, bytes read, and false: of n states."""
        index = self.index
        assert isinstance(index, ClustersIndex)
        probes = min(index.options.probes, index.centroids.shape[0])
        rows = min(self.weight.shape[0], probes * index.members.shape[1] + len(index.always))
        row_bytes = dense_bytes // self.weight.shape[0]
        read = index.scan_bytes + probes * index.probe_bytes + rows * row_bytes
        device = self.device
        return (
            self._kept(("rows", n), lambda: torch.full((n,), rows, device=device)),
            self._kept(("read", n, read), lambda: torch.full((n,), read, device=device)),
            self._kept(("never", n), lambda: torch.zeros(n, dtype=torch.bool, device=device)),
        )


def logits_output(search: DeviceSearch, hidden: Tensor, index: CodesIndex) -> HeadOutput:
    """`HeadOutput` of a codes index; its rows scored exactly are not listed."""
    budget = index.options.kl_budget
    assert budget is not None
    logits, found = search.logits(hidden, index.options.failure_probability, budget)
    return HeadOutput(
        logits, found.tokens, found.candidates, found.certified, found.fallback, found.bytes_read
    )


def clusters_token(search: DeviceSearch, hidden: Tensor, dense_bytes: int) -> NextToken:
    """Greedy tokens of a clusters index, without complete logits; nothing is certified."""
    tokens, _ = search.clusters(hidden, winner_only=True)
    counts, read, never = search.cluster_counts(len(hidden), dense_bytes)
    return NextToken(tokens, never, never, counts, read)


def clusters_output(search: DeviceSearch, hidden: Tensor, dense_bytes: int) -> HeadOutput:
    """`HeadOutput` of a clusters index; candidates and bytes are those of full clusters."""
    tokens, logits = search.clusters(hidden, winner_only=False)
    assert logits is not None
    counts, read, never = search.cluster_counts(len(hidden), dense_bytes)
    return HeadOutput(logits, tokens, counts, never, never, read)
