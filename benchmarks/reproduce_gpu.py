"""Steps of `make reproduce` for a GPU."""

import dataclasses
from collections.abc import Iterator

from reproduce_step import MODELS, TEXT, Step, conversion, drawing, step

SHAPES = ("gemma-3-270m", "gemma-3-1b", "llama-3.2-1b", "llama-3.2-3b", "qwen3-0.6b", "qwen3-1.7b")
HEAL = "--stage b --rate-b 1e-4 --minutes 4.5 --text-tokens 4000000"


def cards() -> Iterator[Step]:
    """A GPU: names say h100, the card they were first measured on; documents say which it was."""
    gpu = ("gpu",)
    heads = [(name, f"--shape {name}") for name in SHAPES]
    heads += [(f"real-{model}", f"--model {model}") for model in MODELS[:3]]
    for name, head in heads:
        command = f"flashhead bench head --device cuda {head} --batch 1,8,32 --repeats 200"
        yield step(f"bench-head-cuda-{name}", command + " --out {out}", needs=gpu, minutes=3)
    timed = tuple(f"bench-head-cuda-{name}" for name, _ in heads)
    yield drawing("bench-head-cuda", "bench head", timed)
    command = "flashhead bench attention --device cuda --shape mha-7b --context 4096,16384,32768"
    command += " --batch 1,8,32 --dtype bf16,int4 --repeats 20 --out {out}"
    yield step("long-context-h100", command, needs=gpu, minutes=4)
    yield drawing("long-context-h100", "bench attention", ("long-context-h100",))
    for name, budget in (
        ("60gb", "--cache-gb 60 --context 16384"),
        ("24gb", "--total-gb 24 --context 32768 --weights int4"),
    ):
        command = f"latent_step.py {budget} --repeats 10 --out {{out}}"
        yield step(f"latent-step-{name}-h100", command, needs=gpu, minutes=3)
    command = "gpu_latent_sweep.py --jobs 10 --out {out}"
    yield step("latent-sweep-h100-1", command, needs=gpu, minutes=5)
    yield from healed()
    yield from twins()
    for name, shapes in (
        ("bf16", "llama-3.2-1b,qwen3-0.6b"),
        ("w4a16-and-gemma", "llama-3.2-1b-w4a16,gemma-3-270m"),
    ):
        command = f"vllm_gpu_step.py --shapes {shapes} --kinds dense,flashhead --reps 2"
        command += " --tokens 128 --json {out}"
        yield step(f"vllm-step-h100-{name}", command, needs=("gpu", "vllm"), minutes=7)


def healed() -> Iterator[Step]:
    """Latents through the cache, before and after healing, in folders of their own."""
    smol, coder = "smollm2-135m", "qwen2.5-coder-0.5b"
    for name, model, cases, heal in (
        ("latent-closed-form-mixed-h100", smol, "2:bf16,2:mixed,4:mixed,8:mixed", False),
        ("latent-closed-form-h100", smol, "2:bf16,4:mixed", False),
        ("latent-closed-form-h100", coder, "2:bf16,4:mixed", False),
        ("latent-closed-form-8x-h100", coder, "8:mixed", False),
        ("latent-2x-healed-h100", smol, "2:bf16", True),
        ("latent-8x-mixed-healed-h100", smol, "8:mixed", True),
    ):
        work = f"work-{name}-{model}"
        command = f"latent_table.py {model} --data {TEXT} --cases {cases} --device cuda"
        command += f" --work {work} --out {{out}}"
        own = step(f"{name}-{model}", command, needs=("gpu",), minutes=4, makes=(work,))
        if heal:
            more = ("--skip-closed-form", "--heal-tokens", "8000000", f"--heal-arguments={HEAL}")
            own = dataclasses.replace(own, command=(*own.command, *more), minutes=8)
        yield own
    folder = "latent-8x-mixed"
    arguments = "--attention latent --head dense --kv-ratio 8 --kv-dtype mixed"
    yield conversion(folder, smol, 5, arguments, "gpu")
    command = f"flashhead eval {folder} --against {smol} --data {TEXT} --limit 16352"
    command += " --device cuda --out {out}"
    name = f"latent-8x-mixed-closed-form-h100-{smol}"
    yield step(name, command, needs=("gpu",), minutes=2, after=(f"convert-{folder}",))


def twins() -> Iterator[Step]:
    """A model and its latent twin from scratch, and the model converted."""
    gpu = ("gpu",)
    command = "train_twins.py train twins --tokens 48000000 --corpus-bytes 160000000"
    yield step(
        "train-twins-h100",
        command + " --device cuda --out-json {out}",
        needs=gpu,
        minutes=5,
        makes=("twins",),
    )
    made = ["train-twins-h100"]
    for kind in ("bf16", "mixed"):
        folder = f"mha-8x-{kind}"
        arguments = f"--attention latent --head dense --kv-ratio 8 --kv-dtype {kind} --device cuda"
        arguments += " --calibration twins/calibration.jsonl"
        own = conversion(folder, "twins/mha", 1, arguments, *gpu)
        yield dataclasses.replace(own, after=("train-twins-h100",))
        made.append(own.name)
    command = "train_twins.py judge twins twins/mha twins/latent mha-8x-bf16"
    command += " mha-8x-mixed --device cuda --out-json {out}"
    yield step("train-twins-judge-h100", command, needs=gpu, minutes=2, after=tuple(made))
