"""How should the GPU kernels be cut up? Times of each kernel for many `Blocks`, on one card.

    python benchmarks/gpu_blocks.py --shape gemma-3-270m --batches 1,8,32 --json out.json

Synthetic rows (`flashhead.bench.synthetic`). For each batch size the scan runs with all variants of
its blocks, then query kernel, selection and complete logits with theirs; the winners are checked
against the float32 argmax first. CUDA graphs of several calls on rotated copies of the index and
other hidden states, events around a replay, median. Several processes compile
the kernels first.
"""

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from flashhead.bench.synthetic import make_problem, shape_of
from flashhead.environment import provenance
from flashhead.index.build_codes import build_codes
from flashhead.ops.cascade import triton as ops
from flashhead.ops.cascade import triton_launch
from flashhead.ops.scan.layout import Layout, pack_table
from flashhead.options import CodesOptions

CALLS, COPIES = 8, 4


def variants(batch: int) -> dict[str, list[triton_launch.Blocks]]:
    """Blocks to try, by the part they change."""
    change = lambda **values: dataclasses.replace(triton_launch.BLOCKS, **values)  # noqa: E731
    shares = [
        change(select_programs=p, rows=r, mass_programs=m)
        for p, r, m in ((1, 16, 2), (2, 16, 4), (4, 16, 8), (2, 8, 4))
    ]
    if batch == 1:
        scans = [
            change(bit_warps=w, bit_registers=r, bit_programs=p)
            for w, r, p in ((4, 48, 5), (4, 48, 3), (8, 48, 2), (4, 96, 3), (2, 48, 8))
        ]
        scans.append(change(bit_products=False))
        return {"scan": scans, "share": shares}
    scans = [change(), change(batch_stages=(2, 2, 2)), change(batch_programs=(2, 2, 2))]
    return {"scan": scans, "share": shares}


def call_of(
    problem: Any, index: ops.DeviceIndex, number: int, batch: int, blocks: Any
) -> triton_launch.Call:
    """A search of its own hidden states."""
    start = number * batch
    hidden = problem.hidden[start : start + batch].contiguous()
    counters = torch.zeros(triton_launch.COUNTERS, dtype=torch.int32, device=hidden.device)
    totals = torch.zeros(5, dtype=torch.int64, device=hidden.device)
    return triton_launch.Call(
        hidden, problem.weight, None, index.tensors, index.sizes, [], counters, totals, 4.97,
        index.reach, blocks,
    )  # fmt: skip


def graph_us(launches: list[Any], repeats: int = 30) -> float:
    """Microseconds of one of the launches."""
    for launch in launches[:1]:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(launches))
    return statistics.median(times)


def compile_one(task: tuple[str, int, dict[str, Any]]) -> str:
    """Fill the kernel cache: one launch on a small head of the same dimensions."""
    part, batch, values = task
    try:
        sizes, d = values.pop("sizes"), values.pop("d")
        index = fake_index(4096, d, sizes)
        hidden = torch.randn(batch, d, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(4096, d, device="cuda", dtype=torch.bfloat16)
        problem = argparse.Namespace(hidden=hidden, weight=weight)
        call = call_of(problem, index, 0, batch, triton_launch.Blocks(**values))
        call.prepare(complete=part == "share")
        call.scan(True)
        if part == "share":
            call.select()
            call.scan(False)
            call.complete(1e-3)
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 (a variant may need more than the card has)
        return f"{values}: {str(error).splitlines()[0][:100]}"
    return ""


def fake_index(rows: int, d: int, sizes: list[int]) -> ops.DeviceIndex:
    """An index of the same layout with codes that mean nothing."""
    layout = Layout(*sizes)
    groups = sum(x > 0 for x in layout.dims)
    new = lambda *shape: torch.randn(shape, device="cuda")  # noqa: E731
    words = torch.randint(0, 2**31, (rows // 16, layout.words, 16), device="cuda")
    refine = torch.zeros(layout.planes, rows, layout.refine_words + 1, device="cuda")
    return ops.DeviceIndex(
        layout, words.to(torch.int32), new(groups, rows).abs().bfloat16(), new(rows),
        refine.to(torch.int32), new(sum(layout.dims), d).bfloat16(), new(2, d),
        new(3, 8).abs(), pack_table(layout, torch.device("cuda")), 1.0,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="gemma-3-270m")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--jobs", type=int, default=12)
    parser.add_argument("--json")
    args = parser.parse_args()
    batches = [int(b) for b in args.batches.split(",")]
    rows, d = shape_of(args.shape)
    started = time.time()
    problem = make_problem(
        args.shape, (rows, d), states=CALLS * max(batches), calibration=2048, device="cuda"
    )
    built = build_codes(problem.weight, CodesOptions(), problem.calibration)
    first = ops.device_index(built, problem.weight.device)
    indexes = [first, *(clone(first) for _ in range(COPIES - 1))]
    print(f"{args.shape}: {first.sizes}, bits {built.options.bits}, {time.time() - started:.0f} s")
    tasks = [
        (part, batch, {"sizes": first.sizes, "d": d, **dataclasses.asdict(blocks)})
        for batch in batches
        for part, options in variants(batch).items()
        for blocks in options
    ]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        failed = [line for line in pool.imap_unordered(compile_one, tasks) if line]
    print(f"compiled {len(tasks)} variants, {len(failed)} failed, {time.time() - started:.0f} s")
    print("\n".join(failed[:3]))
    truth = problem.hidden.float() @ problem.weight.float().T
    results = []
    for batch in batches:
        for part, options in variants(batch).items():
            for blocks in options:
                try:
                    results.append(measure(problem, indexes, batch, part, blocks, truth))
                except Exception as error:  # noqa: BLE001
                    print(batch, part, str(error).splitlines()[0][:80], file=sys.stderr)
        for part in ("scan", "share"):
            own = [r for r in results if r["batch"] == batch and r["part"] == part]
            for r in sorted(own, key=lambda r: r["key"])[:8]:
                us = {k: round(v, 1) for k, v in r["us"].items()}
                print(batch, part, r["changed"], us, [round(x) for x in r["read"]])
        print(f"{time.time() - started:.0f} s", flush=True)
        if args.json:  # after every batch size: an interruption loses the rest only
            document = {"shape": args.shape, "results": results, **provenance()}
            Path(args.json).write_text(json.dumps(document))


def clone(index: ops.DeviceIndex) -> ops.DeviceIndex:
    names = ("base", "scale", "direction", "refine", "transform")
    return dataclasses.replace(index, **{n: getattr(index, n).clone() for n in names})


def measure(
    problem: Any, indexes: list[Any], batch: int, part: str, blocks: Any, truth: torch.Tensor
) -> dict[str, Any]:
    """Check the winners of one variant, then time its kernels."""
    calls = [call_of(problem, indexes[i % COPIES], i, batch, blocks) for i in range(CALLS)]
    for i, call in enumerate(calls):
        call.prepare()
        call.scan(True)
        call.select()
        own = truth[i * batch : (i + 1) * batch]
        lost = own.amax(1) - own.gather(1, call.answers[0][:, None])[:, 0]
        if float(lost.max()) > 1e-3 or not bool(call.answers[1].all()):
            raise RuntimeError(f"wrong winner, {float(lost.max())} below the best")
    us = {
        "query": graph_us([call.prepare for call in calls]),
        "query+scan": graph_us([lambda c=c: (c.prepare(), c.scan(True)) for c in calls]),
        "greedy": graph_us([lambda c=c: (c.prepare(), c.scan(True), c.select()) for c in calls]),
    }
    if part == "share":
        us["logits"] = graph_us(
            [lambda c=c: (c.prepare(complete=True), c.scan(False), c.complete(1e-3)) for c in calls]
        )
    base = dataclasses.asdict(triton_launch.BLOCKS)
    own = {k: v for k, v in dataclasses.asdict(blocks).items() if v != base[k]}
    read = torch.cat([c.answers[[6, 3]] for c in calls], 1).float().mean(1).tolist()
    return {
        "batch": batch, "part": part, "changed": own, "us": us, "read": read, "key": us["greedy"],
    }  # fmt: skip


if __name__ == "__main__":
    main()
