"""What should scan a head's codes on a CPU? Products and scans side by side, interleaved, verified.

    python benchmarks/cpu_scan_candidates.py --shape gemma-3-270m --json

Random Gaussian rows and hidden states of the shape asked for: a table of bandwidth, no accuracy,
and no method's time depends on the values. Every method is compared with numpy before it is timed.
Ratios to `F.linear` in bf16 are taken round by round, so that they survive a busy machine.

faiss is optional (`pip install faiss-cpu==1.15.1`); its searches end in a top-256, the others in
one score a row. At batch 1 faiss runs on one thread: it is parallel over queries.
"""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.extending import intrinsic

from flashhead.bench.products import pack_int4, pack_int8
from flashhead.bench.timing import copy_bytes_per_sec, interleave
from flashhead.environment import provenance
from flashhead.index.build_codes import build_codes
from flashhead.ops.scan.api import scan
from flashhead.ops.scan.query import make_plan, make_query
from flashhead.options import CodesOptions

SHAPES = {
    "gemma-3-270m": (262_144, 640),
    "smollm2-135m": (49_152, 576),
    "qwen2.5-coder-0.5b": (151_936, 896),
    "llama-3.2-1b": (128_256, 2_048),
}
BASELINE = "bf16 F.linear"
QUERIES = 8
CHECKED_ROWS = 4096
LANES = 8
"""Rows whose 64-bit words lie side by side in a bit plane: one AVX-512 register."""
TOP = 256

Method = tuple[Callable[[int], Any], int]


@intrinsic
def popcount(_context: Any, _word: Any) -> Any:
    """Set bits of a uint64; LLVM turns a loop of it into VPOPCNTQ where the CPU has it."""

    def codegen(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return numba.types.uint64(numba.types.uint64), codegen


@numba.njit(parallel=True, fastmath=True)
def popcount_scan(planes: np.ndarray, query: np.ndarray, scores: np.ndarray) -> None:
    """Integer scores of all rows.

    planes: uint64[V/LANES, row bits, words, LANES]; query: uint64[query bits, words];
    scores: int32[V/LANES, LANES] = sum_ij 2^(i+j) popcount(planes_i & query_j).
    """
    blocks, row_bits, words, lanes = planes.shape
    query_bits = query.shape[0]
    for block in numba.prange(blocks):
        total = np.zeros(lanes, dtype=np.uint64)
        for i in range(row_bits):
            for word in range(words):
                for j in range(query_bits):
                    mask = query[j, word]
                    for lane in range(lanes):
                        bits = popcount(planes[block, i, word, lane] & mask)
                        total[lane] += bits << np.uint64(i + j)
        for lane in range(lanes):
            scores[block, lane] = np.int32(total[lane])


def bit_planes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Bit planes uint64[n, bits, d/64] of codes uint8[n, d]."""
    n, d = codes.shape
    planes = np.stack(
        [np.packbits((codes >> i) & 1, axis=1, bitorder="little") for i in range(bits)], 1
    )
    return planes.reshape(n, bits, d // 8).view(np.uint64)


def popcount_method(
    rng: np.random.Generator, V: int, d: int, row_bits: int, query_bits: int
) -> Method:
    """Scan of `row_bits` planes against an unsigned query of `query_bits`, verified."""
    codes = rng.integers(0, 2**row_bits, (V, d), dtype=np.uint8)
    planes = bit_planes(codes, row_bits).reshape(V // LANES, LANES, row_bits, d // 64)
    planes = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
    values = rng.integers(0, 2**query_bits, (QUERIES, d), dtype=np.uint8)
    queries = bit_planes(values, query_bits)
    scores = np.full((V // LANES, LANES), -1, dtype=np.int32)
    for query, value in zip(queries, values, strict=True):
        popcount_scan(planes, query, scores)
        wanted = codes[:CHECKED_ROWS].astype(np.int64) @ value.astype(np.int64)
        require(np.array_equal(scores.reshape(-1)[:CHECKED_ROWS], wanted), "popcount scan")
    return lambda number: popcount_scan(planes, queries[number % QUERIES], scores), planes.nbytes


def faiss_methods(rows: np.ndarray, queries: np.ndarray) -> dict[str, Method]:
    """faiss' two flat RaBitQ indexes, 1 bit a dimension; empty without faiss, which is said."""
    try:
        import faiss
    except ImportError:
        print("left out: faiss (pip install faiss-cpu==1.15.1)", file=sys.stderr)
        return {}
    faiss.omp_set_num_threads(torch.get_num_threads())
    methods: dict[str, Method] = {}
    for kind in (faiss.IndexRaBitQ, faiss.IndexRaBitQFastScan):
        small = kind(rows.shape[1], faiss.METRIC_INNER_PRODUCT)
        small.train(rows[:CHECKED_ROWS])
        small.add(rows[:CHECKED_ROWS])
        for query in queries:
            scores, ids = small.search(query[None], CHECKED_ROWS)
            exact = (rows[:CHECKED_ROWS] @ query)[ids[0]]
            # one bit a Gaussian dimension correlates by sqrt(2/pi) = 0.798 with the exact product
            require(np.corrcoef(scores[0], exact)[0, 1] > 0.75, kind.__name__)
        index = kind(rows.shape[1], faiss.METRIC_INNER_PRODUCT)
        index.train(rows)
        index.add(rows)
        name = f"faiss {kind.__name__}, 1 bit x {index.qb}-bit query, top-{TOP}"
        methods[name] = (_search(index, queries), index.code_size * len(rows))
    return methods


def _search(index: Any, queries: np.ndarray) -> Callable[[int], Any]:
    return lambda number: index.search(queries[number % QUERIES][None], TOP)


def product_methods(weight: torch.Tensor, hidden: torch.Tensor) -> dict[str, Method]:
    """torch's bf16, int8 and int4 products; `flashhead.bench.products` verifies the last two."""

    def call(product: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[int], Any]:
        return lambda number: product(hidden[number % QUERIES][None])

    int8, int8_bytes = pack_int8(weight)
    linear = call(lambda states: torch.nn.functional.linear(states, weight))
    methods: dict[str, Method] = {
        BASELINE: (linear, weight.numel() * 2),
        "torch int8 weight-only": (call(int8), int8_bytes),
    }
    int4 = pack_int4(weight)
    if int4 is not None:
        methods[f"torch int4 weight-only, group {int4[2]}"] = (call(int4[0]), int4[1])
    return methods


def codes_methods(weight: torch.Tensor, hidden: torch.Tensor) -> dict[str, Method]:
    """FlashHead's own scan, with prepared queries and from the hidden state on."""
    options = CodesOptions(calibration_tokens=0)
    small = build_codes(weight[:CHECKED_ROWS], options)
    plan = make_plan(small)
    query = make_query(hidden, small, plan, impl="cpu")
    scores = scan(query, small, plan, None, impl="cpu").numpy()
    wanted = scan(query, small, plan, None, impl="reference").numpy()
    require(np.allclose(scores, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max()), "scan")
    exact = hidden.float().numpy() @ weight[:CHECKED_ROWS].float().numpy().T
    for row, truth in zip(scores, exact, strict=True):
        require(np.corrcoef(row, truth)[0, 1] > 0.75, "scan")
    index = build_codes(weight, options)
    plan = make_plan(index)
    queries = [make_query(states[None], index, plan, impl="cpu") for states in hidden]

    def prepared(number: int) -> torch.Tensor:
        return scan(queries[number % QUERIES], index, plan, None, impl="cpu")

    def whole(number: int) -> torch.Tensor:
        query = make_query(hidden[number % QUERIES][None], index, plan, impl="cpu")
        return scan(query, index, plan, None, impl="cpu")

    name = f"flashhead scan, {options.bits} bits x 8-bit query"
    transform = index.transform.numel() * index.transform.element_size()
    # scan_bytes counts what a search reads before its survivors, the transform of h included
    methods = {f"{name} of a prepared query": (prepared, index.scan_bytes - transform)}
    return methods | {name: (whole, index.scan_bytes)}


def require(holds: bool | np.bool_, name: str) -> None:
    """Stop when a method disagrees with numpy."""
    if not holds:
        raise RuntimeError(f"{name}: its scores are not those of numpy")


def measure(V: int, d: int, *, rounds: int, seed: int) -> dict[str, Any]:
    """Verify and time every method on one shape."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((V, d), dtype=np.float32)
    queries = rng.standard_normal((QUERIES, d), dtype=np.float32)
    weight, hidden = torch.from_numpy(rows).bfloat16(), torch.from_numpy(queries).bfloat16()
    with torch.inference_mode():
        methods = product_methods(weight, hidden)
        methods |= faiss_methods(rows, queries)
        del rows
        for row_bits, query_bits in ((1, 4), (2, 6)):
            name = f"Numba AND+popcount, {row_bits} bit x {query_bits}-bit query"
            methods[name] = popcount_method(rng, V, d, row_bits, query_bits)
        methods |= codes_methods(weight, hidden)
        calls = {name: call for name, (call, _) in methods.items()}
        bandwidth = copy_bytes_per_sec()
        timings = interleave(calls, BASELINE, rounds=rounds)
    table = [
        {
            "method": name,
            **timings[name],
            "bytes_read": size,
            "gb_per_sec": size / timings[name]["median_ms"] / 1e6,
        }
        for name, (_, size) in methods.items()
    ]
    return {"vocab_size": V, "hidden_size": d, "copy_gb_per_sec": bandwidth / 1e9, "rows": table}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="gemma-3-270m")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="one JSON document as the last line")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    numba.set_num_threads(args.threads)
    V, d = SHAPES[args.shape]
    document = {"shape": args.shape, **measure(V, d, rounds=args.rounds, seed=args.seed)}
    document |= {"rounds": args.rounds, **provenance()}
    out = sys.stderr if args.json else sys.stdout
    print(f"{args.shape}: {V:,} x {d}, copy {document['copy_gb_per_sec']:.1f} GB/s", file=out)
    print("| method | x F.linear | p10-p90 | ms | best ms | MB | GB/s |", file=out)
    print("| --- | --- | --- | --- | --- | --- | --- |", file=out)
    for row in document["rows"]:
        spread = f"{row['ratio_p10']:.2f}-{row['ratio_p90']:.2f}"
        cells = (
            row["method"],
            f"{row['ratio']:.2f}",
            spread,
            f"{row['median_ms']:.2f}",
            f"{row['best_ms']:.2f}",
        )
        cells += (f"{row['bytes_read'] / 1e6:.1f}", f"{row['gb_per_sec']:.1f}")
        print(f"| {' | '.join(cells)} |", file=out)
    if args.json:
        print(json.dumps(document))


if __name__ == "__main__":
    main()
