"""The methods of one batch size, each verified before it is handed out to be timed."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashhead.bench import device_products, device_verify
from flashhead.bench.device_copies import Rotation, Weights
from flashhead.bench.device_timing import Method, copies_needed
from flashhead.bench.device_verify import Truth
from flashhead.bench.synthetic import Problem
from flashhead.index.clusters import ClustersIndex
from flashhead.nn.device import clusters_token
from flashhead.nn.head import FlashHead
from flashhead.options import Sampling

BASELINE = "bf16 F.linear + argmax"
LINEAR = "bf16 F.linear"
GREEDY, SAMPLE = "FlashHead greedy, certified", "FlashHead sampling, exact"
COMPLETE = "FlashHead complete logits"
SAMPLING = Sampling(temperature=1.0, seed=7)


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all batch sizes share.

    Args:
        problem: the head and its hidden states.
        weights: copies of its weight.
        codes: the searched head, or None.
        clusters: the published method by its probes.
        quantised: codes by kind.
        truth: of `problem.hidden`.
        noise: of `SAMPLING`, step i for hidden state i: `float32[n, V]`, or None.
        int8_kl: nats an int8 head loses on these hidden states.
        l2_bytes: of the device.
    """

    problem: Problem
    weights: Weights
    codes: Rotation | None
    clusters: dict[int, Rotation]
    quantised: dict[str, device_products.Quantised]
    truth: Truth
    noise: Tensor | None
    int8_kl: float
    l2_bytes: int

    def part(self, number: int, batch: int) -> slice:
        """Hidden states of call `number`."""
        start = number % (len(self.problem.hidden) // batch) * batch
        return slice(start, start + batch)

    def parts(self, batch: int) -> list[slice]:
        """Hidden states of the calls that see all of them once."""
        return [self.part(number, batch) for number in range(len(self.problem.hidden) // batch)]


@dataclasses.dataclass(frozen=True)
class Line:
    """A verified method.

    Args:
        method: what is timed.
        figures: JSON-able, what was counted while it was verified.
        check: raises RuntimeError if these are no tokens of these hidden states; None: no tokens.
    """

    method: Method
    figures: dict[str, Any]
    check: Callable[[Tensor, slice], object] | None = None


def dense_lines(bench: Bench, batch: int) -> tuple[list[Line], list[dict[str, Any]]]:
    """bf16 and quantised products, and which could not run and why."""
    weight = bench.problem.weight
    weights = [(copy,) for copy in bench.weights.get(copies_needed(weight.nbytes, bench.l2_bytes))]
    lines = [
        _dense_line(bench, batch, BASELINE, F.linear, weights),
        _dense_line(bench, batch, LINEAR, F.linear, weights, argmax=False),
    ]
    left_out = []
    for kind, quantised in bench.quantised.items():
        hidden = bench.problem.hidden[:batch]
        chosen, reasons = device_products.choose_way(quantised, hidden, weight)
        if reasons:
            left_out.append({"batch": batch, "method": kind, "reasons": reasons})
        if chosen is None:
            continue
        tensors = chosen.codes.tensors
        count = copies_needed(chosen.codes.bytes_read, bench.l2_bytes)
        copies = [tensors, *(tuple(t.clone() for t in tensors) for _ in range(count - 1))]
        name = f"{chosen.codes.name} + argmax"
        lines.append(_dense_line(bench, batch, name, chosen.run, copies, variant=chosen.way))
    return lines, left_out


def _dense_line(
    bench: Bench,
    batch: int,
    name: str,
    run: device_products.Expression,
    copies: Sequence[tuple[Tensor, ...]],
    *,
    argmax: bool = True,
    variant: str | None = None,
) -> Line:
    """A product of all rows; it certifies nothing, so what is counted is how often it is right."""
    hidden = bench.problem.hidden

    def call(number: int) -> Tensor:
        logits = run(hidden[bench.part(number, batch)], *copies[number % len(copies)])
        return logits.argmax(-1) if argmax else logits

    def check(tokens: Tensor, part: slice) -> dict[str, float]:
        never = torch.zeros_like(tokens, dtype=torch.bool)
        return device_verify.check_tokens(name, tokens, never, bench.truth.of(part))

    agreements, losses = [], []
    for part in bench.parts(batch):
        logits = run(hidden[part], *copies[0])
        agreements.append(check(logits.argmax(-1), part)["agreement"])
        losses.append(device_verify.kl_divergence(bench.truth.of(part).logits, logits))
    figures = {
        "agreement": sum(agreements) / len(agreements),
        "kl": torch.cat(losses).mean().item(),
        "dense": True,
    }
    size = sum(tensor.nbytes for tensor in copies[0])
    method = Method(name, call, len(copies), size, gives_tokens=argmax, variant=variant)
    return Line(method, figures, check if argmax else None)


def flash_lines(bench: Bench, batch: int, rotation: Rotation) -> list[Line]:
    """FlashHead's three uses: greedy, sampling, complete logits."""
    return [
        _token_line(bench, batch, rotation, GREEDY, None),
        _token_line(bench, batch, rotation, SAMPLE, SAMPLING),
        _complete_line(bench, batch, rotation),
    ]


def published_line(bench: Bench, batch: int, probes: int, rotation: Rotation) -> Line:
    """The published clusters, greedy: they certify nothing."""
    name = f"clusters (published), P = {probes}"
    return _token_line(bench, batch, rotation, name, None, certifies=False)


def _token_line(
    bench: Bench,
    batch: int,
    rotation: Rotation,
    name: str,
    sampling: Sampling | None,
    *,
    certifies: bool = True,
) -> Line:
    hidden, heads = bench.problem.hidden, rotation.heads
    steps = torch.arange(len(hidden), device=hidden.device)

    def choose(head: FlashHead, part: slice) -> Any:
        if not certifies:
            search = head.device_search
            if search is None:  # without a GPU there is no winner without complete logits
                return head.search(hidden[part])
            return clusters_token(search, hidden[part], head.dense_bytes)
        if sampling is None:
            return head.next_token(hidden[part])
        return head.next_token(hidden[part], sampling, steps=steps[part])

    parts = bench.parts(batch)
    found = device_verify.collected(choose(heads[0], part) for part in parts)
    certified = found["certified"] & certifies

    def check(tokens: Tensor, part: slice) -> dict[str, float]:
        truth = bench.truth.of(part)
        if sampling is None:
            return device_verify.check_tokens(name, tokens, certified[part], truth)
        assert bench.noise is not None
        return device_verify.check_tokens(
            name, tokens, certified[part], truth, bench.noise[part], sampling.temperature
        )

    figures: dict[str, Any] = check(found["tokens"], slice(0, parts[-1].stop))
    rows = len(bench.problem.weight)
    dense = bool((found["fallback"] | (found["candidates"] >= rows)).all())
    figures |= {
        "candidates_mean": found["candidates"].double().mean().item(),
        "fallback_fraction": found["fallback"].double().mean().item(),
        "dense": dense,
    }
    method = Method(
        name,
        lambda number: choose(heads[number % len(heads)], bench.part(number, batch)).tokens,
        len(heads),
        _call_bytes(bench, rotation, batch, found["bytes_read"].double().mean().item(), dense),
        gives_tokens=True,
    )
    return Line(method, figures, check)


def _complete_line(bench: Bench, batch: int, rotation: Rotation) -> Line:
    hidden, heads = bench.problem.hidden, rotation.heads
    head = heads[0]
    dense = batch > head.crossover_rows
    most = max(bench.int8_kl, rotation.notes["kl_budget"])
    rows, read, losses = head.stats.rows, head.stats.bytes_read, []
    for part in bench.parts(batch):
        logits, truth = head(hidden[part]), bench.truth.of(part)
        if not dense:  # bf16 products tie their two best logits
            device_verify.check_winners(COMPLETE, logits, truth)
        losses.append(device_verify.kl_divergence(truth.logits, logits))
    kl = torch.cat(losses).mean().item()
    if not dense:
        device_verify.require_kl(COMPLETE, kl, most)
    counted = int(head.stats.rows - rows)
    each = float(head.stats.bytes_read - read) / counted if counted else None
    method = Method(
        COMPLETE,
        lambda number: heads[number % len(heads)](hidden[bench.part(number, batch)]),
        len(heads),
        _call_bytes(bench, rotation, batch, each, dense),
    )
    return Line(method, {"kl": kl, "kl_most": most, "dense": dense})


def _call_bytes(
    bench: Bench, rotation: Rotation, batch: int, each: float | None, dense: bool
) -> float | None:
    """Bytes that a call reads: the scan once, and for each hidden state what it reads besides.

    Args:
        bench: for the head's bytes.
        rotation: whose index is read.
        batch: hidden states.
        each: bytes of a hidden state alone, counted, or None.
        dense: whether the dense product ran.
    """
    weight, index = bench.problem.weight, rotation.index
    if dense:
        return float(weight.nbytes)
    if isinstance(index, ClustersIndex):  # the winner needs no estimates, so no `cluster_of`
        score = (index.centroids, index.centroid_scale, index.centroid_offset, index.common)
        member_bytes = weight.shape[1] * weight.element_size() * index.members.shape[1]
        probes = min(index.options.probes, index.clusters)
        scored = float(sum(tensor.nbytes for tensor in score))
        return scored + batch * probes * (index.probe_bytes + member_bytes)
    if each is None:
        return None
    fixed = min(each, index.scan_bytes)
    return fixed + batch * (each - fixed)
