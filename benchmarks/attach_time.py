"""Seconds of `flashhead.attach(model)` on a model in memory, from nothing to a head that searches.

python benchmarks/attach_time.py --out attach-time.json MODEL_OR_WIDTH...
chrt -r 1 python benchmarks/attach_time.py ...  # where other work waits for the cores

A number stands for a made-up Qwen2 of that width with 151,936 tokens (28 layers that share their
weights; rows of the head with falling spectrum). The crossover is measured anew each time, nothing
is read from `tune.json`; a first attach in another process compiles the kernels before.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

TARGET_SECONDS = 10
LAYERS = 28
WARM = "import flashhead; flashhead.load('smollm2-135m', progress=False, calibration_tokens=64)"


def made_up(width):
    """A Qwen2 of the proportions of the 1.5B one."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=width,
        intermediate_size=width * 35 // 6,
        num_hidden_layers=1,
        num_attention_heads=width // 128,
        num_key_value_heads=2,
        vocab_size=151_936,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen2ForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    model.model.layers = torch.nn.ModuleList(list(model.model.layers) * LAYERS)
    config.num_hidden_layers, config.layer_types = LAYERS, config.layer_types * LAYERS
    falling = torch.arange(1, width + 1).float().pow(-0.4)
    model.lm_head.weight.data.mul_(falling.bfloat16())
    return model


def measure(name, repeats):
    from flashhead.integrations.calibration import quick_hidden_states
    from flashhead.integrations.transformers import attach, load_dense
    from flashhead.models import resolve

    model = made_up(int(name)) if name.isdigit() else load_dense(resolve(name))
    seconds, cpu = [], []
    for _ in range(repeats):
        start, used = time.perf_counter(), time.process_time()
        attachment = attach(model, progress=False)
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
        attachment.detach()
    start = time.perf_counter()
    quick_hidden_states(model, 0)
    sampling = time.perf_counter() - start
    rows, width = attachment.head.weight.shape
    return {
        "model": Path(name).name,
        "vocab_size": rows,
        "hidden_size": width,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "median_cpu_seconds": statistics.median(cpu),
        "sampling_seconds": sampling,
        "crossover_rows": attachment.head.crossover_rows,
        "meets_target": statistics.median(seconds) < TARGET_SECONDS,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    os.environ["FLASHHEAD_TUNE_CACHE"] = "0"
    subprocess.run([sys.executable, "-c", WARM], check=True)
    from flashhead.environment import provenance

    found = provenance()  # the load before, not of these runs
    scheduler = {os.SCHED_OTHER: "SCHED_OTHER", os.SCHED_RR: "SCHED_RR"}
    found["scheduling"] = scheduler.get(os.sched_getscheduler(0), "another")
    rows = [measure(name, args.repeats) for name in args.models]
    found["argv"] = [Path(word).name for word in found["argv"]]
    text = json.dumps({"target_seconds": TARGET_SECONDS, "rows": rows, **found}, indent=1)
    if args.out:
        args.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
