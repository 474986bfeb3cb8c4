"""The head alone on a CUDA device: verify, then time it against dense and published heads.

Before a batch size is timed, every method is compared with float64 logits on all hidden states, the
graphs that are timed included (`device_verify`, `device_products`). How it is timed is in
`device_timing`. The byte floor is what a method would take if it did nothing but read its bytes, at
the bandwidth of a large copy measured in the same run; hidden states of a batch share one scan.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from flashhead.bench import device_copies, device_products, device_timing, device_verify
from flashhead.bench.device_copies import Rotation, Weights
from flashhead.bench.device_lines import (
    BASELINE,
    SAMPLING,
    Bench,
    Line,
    dense_lines,
    flash_lines,
    published_line,
)
from flashhead.bench.synthetic import Problem
from flashhead.environment import provenance
from flashhead.errors import FlashHeadError
from flashhead.options import CodesOptions

LEAST_STATES = 256
"""Hidden states to verify with."""
LEAST_TURNS = 4
"""Batches of other hidden states that the calls of a graph take in turn."""
QUANTISED = ("int8", "fp8", "int4")
_STARTED = time.monotonic()


def states_needed(batches: Sequence[int]) -> int:
    """Hidden states that a benchmark of these batch sizes wants."""
    return max(LEAST_STATES + max(batches), LEAST_TURNS * max(batches))


@torch.no_grad()
def bench_device(
    problem: Problem,
    *,
    batches: Sequence[int] = (1, 4, 16),
    repeats: int = 200,
    skip: Sequence[str] = (),
    options: CodesOptions | None = None,
    save: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Verify and time all methods on a head.

    Args:
        problem: on the device; `states_needed(batches)` hidden states or more.
        batches: hidden states a call.
        repeats: replays a method and batch size.
        skip: of `bench.shapes.DEVICE_METHODS`.
        options: of the codes index.
        save: called with the document after every batch size, so that an interruption loses the
            rest only.

    Returns:
        JSON document with a row for every batch size and method.

    Raises:
        FlashHeadError: too few hidden states, or a value out of range.
        RuntimeError: a method returns a wrong result.
    """
    started = time.perf_counter()
    _require(problem, batches, repeats)
    problem = dataclasses.replace(problem, hidden=problem.hidden[: states_needed(batches)])
    bench = _prepare(problem, skip, options or CodesOptions())
    bandwidth = device_timing.copy_bytes_per_sec()
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    for batch in batches:
        _say(f"batch {batch}: verifying")
        torch.compiler.reset()  # it compiles anew for every batch size, a limited number of times
        lines, missing = _verified(bench, batch)
        left_out += missing
        rows += _timed(bench, lines, batch, repeats, bandwidth)
        document = {
            **_described(bench),
            "repeats": repeats,
            "copy_gb_per_sec": bandwidth / 1e9,
            "rows": rows,
            "left_out": left_out,
            **provenance(),
            "seconds": time.perf_counter() - started,
        }
        if save is not None:
            save(document)
    return document


def _described(bench: Bench) -> dict[str, Any]:
    """What was measured, JSON-able."""
    problem = bench.problem
    return {
        "benchmark": "head on a device",
        "name": problem.name,
        "rows_are": "synthetic" if problem.synthetic else "real",
        "vocab_size": problem.weight.shape[0],
        "hidden_size": problem.weight.shape[1],
        "verified_states": len(problem.hidden),
        "float32_slack": bench.truth.slack,
        "int8_kl": bench.int8_kl,
        "codes": _notes(bench.codes),
        "clusters": _notes(next(iter(bench.clusters.values()), None)),
        "l2_bytes": bench.l2_bytes,
    }


def _require(problem: Problem, batches: Sequence[int], repeats: int) -> None:
    if repeats < 1 or not batches or min(batches) < 1:
        raise FlashHeadError(f"repeats={repeats}, batches={tuple(batches)}: wanted 1 or more each")
    wanted = states_needed(batches)
    if len(problem.hidden) < wanted:
        raise FlashHeadError(
            f"{problem.name}: {len(problem.hidden)} hidden states, wanted {wanted} or more "
            f"for a batch of {max(batches)}"
        )


def _prepare(problem: Problem, skip: Sequence[str], options: CodesOptions) -> Bench:
    l2_bytes, weights = device_timing.l2_bytes(), Weights(problem.weight)
    codes = noise = None
    clusters: dict[int, Rotation] = {}
    _say(f"{problem.name}: float64 logits of {len(problem.hidden)} hidden states")
    truth = device_verify.truth_of(problem.hidden, problem.weight)
    if "flashhead" not in skip:
        _say("building the codes index")
        codes = device_copies.codes_rotation(problem, weights, options, l2_bytes)
        _say(f"built in {codes.seconds:.1f} s; noise of the reference")
        steps = torch.arange(len(problem.hidden), device=problem.weight.device)
        noise = device_verify.reference_noise(SAMPLING.seed, steps, len(problem.weight))
    if "clusters" not in skip:
        _say("building the published clusters")
        clusters = device_copies.clusters_rotations(problem, weights, l2_bytes)
    kinds = [kind for kind in QUANTISED if kind not in skip]
    quantised = {kind: device_products.quantise(kind, problem.weight) for kind in kinds}
    int8_kl = device_verify.int8_kl(problem.hidden, problem.weight, truth)
    return Bench(problem, weights, codes, clusters, quantised, truth, noise, int8_kl, l2_bytes)


def _verified(bench: Bench, batch: int) -> tuple[list[Line], list[dict[str, Any]]]:
    """The lines of one batch size, and what is left out and why."""
    lines, left_out = dense_lines(bench, batch)
    for probes, rotation in bench.clusters.items():
        lines.append(published_line(bench, batch, probes, rotation))
    if bench.codes is not None:
        lines += flash_lines(bench, batch, bench.codes)
    return lines, left_out


def _timed(
    bench: Bench, lines: list[Line], batch: int, repeats: int, bandwidth: float
) -> list[dict[str, Any]]:
    """Capture, check what the graphs write, time; a row for each line."""
    graphs = {}
    for line in lines:
        method = line.method
        captured = device_timing.capture(method.call, method.calls, method.gives_tokens)
        # capturing may take another path through a head than a lone call
        for number, tokens in enumerate(captured.tokens):
            if line.check is not None:
                line.check(tokens, bench.part(number, batch))
        graphs[method.name] = captured
    _say(f"batch {batch}: timing {len(graphs)} methods")
    times = device_timing.time_graphs(graphs, BASELINE, repeats)
    rows = []
    for line in lines:
        method = line.method
        row: dict[str, Any] = {"batch": batch, "method": method.name, "variant": method.variant}
        row |= times[method.name] | device_timing.time_from_python(method.call)
        row |= {"calls": method.calls, "copies": method.copies, "bytes_read": method.bytes_read}
        if method.bytes_read is not None:
            floor = method.bytes_read / bandwidth * 1e6
            row |= {"floor_us": floor, "floor_fraction": floor / row["median_us"]}
        rows.append(row | line.figures)
    return rows


def _notes(rotation: Rotation | None) -> dict[str, Any] | None:
    return None if rotation is None else rotation.notes | {"build_seconds": rotation.seconds}


def _say(line: str) -> None:
    print(f"  {time.monotonic() - _STARTED:6.1f} s  {line}", file=sys.stderr, flush=True)
