"""When do the kernels of one search run? Start and length of each, from the profiler, in a graph.

python benchmarks/gpu_timeline.py --shape gemma-3-270m --batches 1,8
"""

import argparse

import torch
from gpu_blocks import CALLS, call_of

from flashhead.bench.synthetic import make_problem, shape_of
from flashhead.index.build_codes import build_codes
from flashhead.ops.cascade import triton as ops
from flashhead.ops.cascade import triton_launch
from flashhead.options import CodesOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="gemma-3-270m")
    parser.add_argument("--batches", default="1,8")
    args = parser.parse_args()
    batches = [int(b) for b in args.batches.split(",")]
    problem = make_problem(
        args.shape,
        shape_of(args.shape),
        states=CALLS * max(batches),
        calibration=2048,
        device="cuda",
    )
    index = ops.device_index(
        build_codes(problem.weight, CodesOptions(), problem.calibration), problem.weight.device
    )
    for batch in batches:
        for complete in (False, True):
            calls = [call_of(problem, index, i, batch, triton_launch.BLOCKS) for i in range(3)]

            def launch(call: triton_launch.Call, complete: bool = complete) -> None:
                call.prepare(complete)
                call.scan(not complete)
                call.complete(1e-3) if complete else call.select()

            launch(calls[0])
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for call in calls:
                    launch(call)
            graph.replay()
            torch.cuda.synchronize()
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CUDA]
            ) as profile:
                graph.replay()
                torch.cuda.synchronize()
            events = sorted(profile.events(), key=lambda event: event.time_range.start)
            first = events[0].time_range.start
            print(f"{args.shape}, batch {batch}, {'logits' if complete else 'greedy'}")
            for event in events:
                start = event.time_range.start - first
                length = event.time_range.end - event.time_range.start
                print(f"  {start:8.1f} + {length:6.1f} us  {event.name[:40]}")


if __name__ == "__main__":
    main()
