"""Attention of one decode step: latents against full caches, verified, then timed side by side.

Every line is compared with float64 on the very data that is timed; its error may be three times
that of eager bfloat16. Caches come in copies so that none is found in the L2 cache. On a GPU calls
are captured in CUDA graphs, and graphs are replayed in turn.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flashhead.bench import device_timing, timing
from flashhead.bench.attention_full import forms, make_full_problem
from flashhead.bench.attention_shapes import AttentionShape
from flashhead.bench.latent_problem import make_latent_problem
from flashhead.environment import provenance

FACTOR = 3
"""An error may be this many times that of eager bfloat16."""
SPARE_BYTES = 4 * 2**30
"""Of a device's memory: left to kernels and to the verification."""
CPU_L2_BYTES = 32 * 2**20
"""Caches that are larger are not found in a processor's caches."""


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the table.

    Args:
        name: of it.
        call: enqueues call number i.
        bytes_read: of the cache, a step.
        errors: of what a call gave: its own and that of eager bfloat16.
        copies: of the cache.
        form: which kernel runs.
        rejected: other kernels for the same, and what they took or why they do not run.
    """

    name: str
    call: Callable[[int], Tensor]
    bytes_read: int
    errors: Callable[[Tensor], tuple[float, float]]
    copies: int
    form: str
    rejected: dict[str, str]


def bench_attention(
    shape: AttentionShape,
    *,
    contexts: Sequence[int],
    batches: Sequence[int],
    formats: Sequence[str],
    device: str,
    repeats: int,
    save: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Measure every batch size at every context.

    Args:
        shape: of the attention.
        contexts: tokens of each row.
        batches: rows.
        formats: how latents are kept.
        device: "cuda" or "cpu".
        repeats: rounds, all lines once in each.
        save: called with the document after each cell, so that a long run leaves what it has.

    Raises:
        RuntimeError: a kernel's result is wrong.
    """
    copy = device_timing.copy_bytes_per_sec() if device == "cuda" else timing.copy_bytes_per_sec()
    document: dict[str, Any] = {
        "shape": dataclasses.asdict(shape),
        "device": device,
        "copy_bytes_per_sec": copy,
        "repeats": repeats,
        "fp8_full_cache": "torch has no kernel that reads an fp8 cache of keys and values",
        "rows": [],
        "left_out": [],
    } | provenance()
    for batch in batches:
        for context in contexts:
            rows, left_out = _cell(shape, batch, context, formats, device, repeats, copy)
            document["rows"] += rows
            document["left_out"] += left_out
            if save is not None:
                save(document)
    return document


def _cell(
    shape: AttentionShape,
    batch: int,
    context: int,
    formats: Sequence[str],
    device: str,
    repeats: int,
    copy: float,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    where = {"batch": batch, "context": context}
    lines, rows = [], []
    left_out: list[dict[str, Any]] = []
    for name, kv_heads, kind in _wanted(shape, formats):
        token = shape.full_bytes(kv_heads) if kv_heads else 0
        needed = batch * context * token
        if device == "cuda" and needed + SPARE_BYTES > torch.cuda.mem_get_info()[0]:
            reason = f"its cache takes {needed / 2**30:.1f} GiB"
            left_out.append({**where, "line": name, "reason": reason})
            continue
        if kv_heads:
            lines.append(_full_line(name, shape, kv_heads, batch, context, device))
        else:
            lines.append(_latent_line(name, shape, kind, batch, context, device))
    times = _time(lines, device, repeats)
    for line in lines:
        own, eager = line.errors(line.call(0))
        if not own <= FACTOR * eager:
            raise RuntimeError(
                f"{line.name} at batch {batch}, context {context}: its error is {own:.1e}, "
                f"{eager:.1e} in eager bfloat16"
            )
        floor_us = 1e6 * line.bytes_read / copy
        rows.append(
            {**where, "line": line.name, "form": line.form, "bytes_read": line.bytes_read}
            | {"token_bytes": line.bytes_read / (batch * context), "rejected": line.rejected}
            | {"error": own, "eager_error": eager, "floor_us": floor_us}
            | times[line.name]
            | {"share_of_copy": floor_us / times[line.name]["median_us"]}
        )
    if device == "cuda":
        lines.clear()
        torch.cuda.empty_cache()
    return rows, left_out


def _wanted(shape: AttentionShape, formats: Sequence[str]) -> list[tuple[str, int, str]]:
    """Lines: name, KV heads of a full cache or 0, format of a latent."""
    full = [(f"full cache, {shape.heads} heads", shape.heads, "")]
    if shape.kv_heads != shape.heads:
        full.append((f"full cache, {shape.kv_heads} heads", shape.kv_heads, ""))
    width = f"{shape.rank}+{shape.rope}"
    return full + [(f"latent {width}, {kind}", 0, kind) for kind in formats]


def _copies(needed: int, device: str) -> int:
    """A cache ten times the L2 cache evicts itself."""
    l2_bytes = device_timing.l2_bytes() if device == "cuda" else CPU_L2_BYTES
    return 1 if needed >= 10 * l2_bytes else device_timing.copies_needed(needed, l2_bytes)


def _full_line(
    name: str, shape: AttentionShape, kv_heads: int, batch: int, context: int, device: str
) -> Line:
    needed = batch * context * shape.full_bytes(kv_heads)
    copies = _copies(needed, device)
    problem = make_full_problem(
        batch, context, shape.heads, kv_heads, shape.head_dim, copies, device
    )
    best, took, rejected = "", float("inf"), {}
    found = forms(problem, device)
    for form, call in found.items():
        try:
            out = call(0)
            own, eager = problem.errors(out)
            if not own <= FACTOR * eager:
                rejected[form] = f"wrong: error {own:.1e}"
                continue
            median_us = _quick_us(call, device)
        except Exception as error:  # noqa: BLE001  kernels refuse a shape as they like
            rejected[form] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
            continue
        rejected[form] = f"{median_us:.1f} us"
        if median_us < took:
            best, took = form, median_us
    if not best:
        raise RuntimeError(f"{name}: no kernel runs: {rejected}")
    del rejected[best]
    return Line(name, found[best], problem.bytes_read, problem.errors, copies, best, rejected)


def _latent_line(
    name: str, shape: AttentionShape, kind: str, batch: int, context: int, device: str
) -> Line:
    l2_bytes = device_timing.l2_bytes() if device == "cuda" else CPU_L2_BYTES
    problem = make_latent_problem(
        batch, context, shape.heads, shape.rank, shape.rope, kind, l2_bytes, device
    )
    return Line(
        name,
        problem.attend,
        problem.bytes_read,
        problem.errors,
        len(problem.latents),
        "latent_decode",
        {},
    )


def _quick_us(call: Callable[[int], Tensor], device: str) -> float:
    if device == "cuda":
        return device_timing.quick_us(call)
    return 1e3 * timing.interleave({"": call}, "", rounds=5, warmup=2)[""]["median_ms"]


def _time(lines: list[Line], device: str, repeats: int) -> dict[str, dict[str, Any]]:
    """Microseconds and ratios to the first line, by name."""
    if device == "cuda":
        graphs = {
            line.name: device_timing.capture(line.call, max(4, line.copies)) for line in lines
        }
        return device_timing.time_graphs(graphs, lines[0].name, repeats)
    calls: dict[str, Callable[[int], object]] = {line.name: line.call for line in lines}
    found = timing.interleave(calls, lines[0].name, rounds=repeats)
    return {name: _in_us(row) for name, row in found.items()}


def _in_us(row: dict[str, Any]) -> dict[str, Any]:
    return {
        key.replace("_ms", "_us"): value * (1e3 if key.endswith("_ms") else 1)
        for key, value in row.items()
    }


def format_attention_table(document: dict[str, Any]) -> str:
    """Times and ratios, for people."""
    shape, hardware = document["shape"], document["hardware"]
    lines = [
        f"{shape['heads']} heads x {shape['head_dim']}, latent {shape['rank']} + {shape['rope']}; "
        f"{hardware['gpu'] if document['device'] == 'cuda' else hardware['cpu']}, "
        f"copy {document['copy_bytes_per_sec'] / 1e9:,.0f} GB/s",
        f"all lines verified; medians of {document['repeats']} interleaved rounds",
        f"{'batch':>5} {'context':>8}  {'cache':<26}{'kernel':<16}{'us':>10}{'p10-p90':>19}"
        f"{'speed-up':>10}{'MB read':>10}{'of copy':>9}",
    ]
    for row in document["rows"]:
        spread = f"{row['p10_us']:.1f}-{row['p90_us']:.1f}"
        lines.append(
            f"{row['batch']:>5} {row['context']:>8}  {row['line']:<26}{row['form']:<16}"
            f"{row['median_us']:>10.1f}{spread:>19}{row['ratio']:>9.2f}x"
            f"{row['bytes_read'] / 1e6:>10.1f}{row['share_of_copy']:>9.0%}"
        )
    lines += [
        f"left out at batch {own['batch']}, context {own['context']}: {own['line']}: "
        f"{own['reason']}"
        for own in document["left_out"]
    ]
    lines.append(f"fp8 cache of keys and values: {document['fp8_full_cache']}")
    return "\n".join(lines)
