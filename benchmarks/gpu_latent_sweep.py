"""How should the latent decode kernels be cut up? Many `Blocks`, verified, then timed, on one card.

    python benchmarks/gpu_latent_sweep.py --out latent-sweep.json

Each variant is compared with float64 first (its error may be 3 times that of eager bfloat16) and
then timed in CUDA graphs, interleaved, on rotated copies of the cache. A variant that does not
compile or is wrong is reported and left out. Worker processes compile the kernels ahead, on few
tokens. The floor is the cache's bytes at the copy bandwidth measured in the same run.
"""

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import torch

from flashhead.bench.device_timing import capture, copy_bytes_per_sec, l2_bytes, time_graphs
from flashhead.bench.latent_problem import make_latent_problem
from flashhead.environment import provenance
from flashhead.ops.latent_decode.blocks import Blocks

FACTOR = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape; `kind` is how latents are kept."""

    kind: str
    batch: int
    context: int
    heads: int = 32
    rank: int = 1024
    rope: int = 64

    def __str__(self) -> str:
        return f"{self.kind} {self.heads}x({self.rank}+{self.rope}) B={self.batch} S={self.context}"


def plain(**axes: tuple[Any, ...]) -> list[Blocks]:
    """All combinations."""
    return [
        Blocks(**dict(zip(axes, values, strict=True)))
        for values in itertools.product(*axes.values())
    ]


SPLITS = [Blocks(splits=n) for n in (8, 16, 32, 33)]
SINGLE = [Blocks(), *(Blocks(splits=n) for n in (33, 64, 128)), Blocks(heads=16)]
WIDE = [Blocks(), *SPLITS, Blocks(heads=16)]
WIDE += plain(hopper=(False,), tokens=(32,), warps=(8, 16), stages=(2, 3))
WIDE += plain(hopper=(False,), heads=(16,), tokens=(32, 64), warps=(4, 8), stages=(2, 3))
CODED = [Blocks(), *SPLITS, Blocks(heads=16)]
CODED += plain(hopper=(False,), heads=(16, 32), tokens=(32, 64), warps=(8, 16), stages=(2,))
NARROW = [Blocks(), Blocks(splits=16), Blocks(heads=16)]
NARROW += plain(hopper=(False,), tokens=(32, 64), warps=(4, 8), stages=(2, 3))
MANY = [Blocks(), *plain(hopper=(True, False), heads=(16, 32, 64))]
CASES: list[tuple[Case, list[Blocks]]] = [
    (Case("bf16", 8, 32768), WIDE),
    (Case("int4", 8, 32768), CODED),
    (Case("fp8", 8, 32768), CODED),
    (Case("int8", 8, 32768), [Blocks(), Blocks(hopper=False)]),
    (Case("bf16", 8, 16384), [Blocks(), Blocks(splits=32)]),
    (Case("bf16", 8, 32768, rope=0), [Blocks(), Blocks(hopper=False)]),
    (Case("bf16", 8, 32768, rank=512), NARROW),
    (Case("int4", 8, 32768, rank=512), NARROW),
    (Case("bf16", 8, 32768, heads=128, rank=512), MANY),
    (Case("bf16", 1, 32768), SINGLE),
    (Case("int4", 1, 32768), SINGLE),
    (Case("bf16", 32, 16384), [Blocks(), Blocks(splits=1), Blocks(splits=4), Blocks(splits=8)]),
]


def compile_one(task: tuple[Case, Blocks]) -> str | None:
    """Compile on few tokens; what went wrong, or None."""
    case, blocks = task
    problem = make_latent_problem(1, 256, case.heads, case.rank, case.rope, case.kind, 1)
    try:
        problem.attend(0, blocks=dataclasses.replace(blocks, splits=2))
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001  compilers raise what they like; it is reported
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}"
    return None


def named(blocks: Blocks) -> str:
    """Only what was chosen."""
    given = {k: v for k, v in dataclasses.asdict(blocks).items() if v is not None}
    return " ".join(f"{k}={v}" for k, v in given.items()) or "default"


def run_case(
    case: Case, variants: list[Blocks], failed: dict[Any, str], repeats: int
) -> list[dict[str, Any]]:
    """Verify and time all variants of a case."""
    problem = make_latent_problem(
        case.batch, case.context, case.heads, case.rank, case.rope, case.kind, l2_bytes()
    )
    rows: list[dict[str, Any]] = []
    graphs: dict[str, Any] = {}
    for blocks in variants:
        row: dict[str, Any] = {"case": str(case), "blocks": named(blocks)}
        rows.append(row)
        if (case, blocks) in failed:
            row["failed"] = failed[case, blocks]
            continue
        try:
            out = problem.attend(0, blocks=blocks)
            row["error"], row["eager_error"] = problem.errors(out)
            if not row["error"] <= FACTOR * row["eager_error"]:
                row["failed"] = "wrong"
                continue
            call = lambda number, blocks=blocks: problem.attend(number, blocks=blocks)  # noqa: E731
            graphs[named(blocks)] = capture(call, len(problem.latents))
        except Exception as error:  # noqa: BLE001  as above
            row["failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}"
    if graphs:
        times = time_graphs(graphs, next(iter(graphs)), repeats)
        for row in rows:
            row |= times.get(row["blocks"], {})
            row["bytes"] = problem.bytes_read
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--jobs", type=int, default=14, help="processes that compile")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    args = parser.parse_args()
    started = time.perf_counter()
    cases = [(case, variants) for case, variants in CASES if args.only in str(case)]
    tasks = [(case, blocks) for case, variants in cases for blocks in variants]
    distinct = {
        (dataclasses.replace(c, batch=1, context=1), dataclasses.replace(b, splits=None)): (c, b)
        for c, b in tasks
    }
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.jobs) as pool:
        said = pool.map(compile_one, list(distinct.values()), chunksize=1)
    outcome = dict(zip(distinct, said, strict=True))
    failed = {}
    for case, blocks in tasks:
        key = (
            dataclasses.replace(case, batch=1, context=1),
            dataclasses.replace(blocks, splits=None),
        )
        if outcome[key] is not None:
            failed[case, blocks] = outcome[key]
    print(f"compiled {len(distinct)} kernels in {time.perf_counter() - started:.0f} s")
    document: dict[str, Any] = {"copy_bytes_per_sec": copy_bytes_per_sec(), "rows": []}
    for case, variants in cases:
        found = run_case(case, variants, failed, args.repeats)
        document["rows"] += found
        torch.cuda.empty_cache()
        floor = 1e6 * found[0].get("bytes", 0) / document["copy_bytes_per_sec"]
        print(f"\n{case}: floor {floor:.0f} us ({time.perf_counter() - started:.0f} s)")
        for row in sorted(found, key=lambda row: row.get("median_us", 1e9)):
            if "failed" in row:
                print(f"  {row['blocks']:45} {row['failed']}")
                continue
            share = 100 * floor / row["median_us"]
            figures = f"{row['median_us']:8.1f} us {share:5.1f} %  error {row['error']:.1e}"
            print(f"  {row['blocks']:45} {figures}")
        args.out.write_text(json.dumps(document | provenance(), indent=1))
    wrong = [row for row in document["rows"] if row.get("failed") == "wrong"]
    sys.exit(f"{len(wrong)} variants are wrong" if wrong else 0)


if __name__ == "__main__":
    main()
