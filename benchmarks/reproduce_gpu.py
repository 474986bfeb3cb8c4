"""Steps of `make reproduce` for a GPU."""

import dataclasses
from collections.abc import Iterator

from reproduce_step import MODELS, TEXT, Step, conversion, drawing, step

SHAPES = ("gemma-3-270m", "gemma-3-1b", "llama-3.2-1b", "llama-3.2-3b", "qwen3-0.6b", "qwen3-1.7b")
HEAL = "--stage b --rate-b 1e-4 --minutes 4.5 --text-tokens 4000000"
SMOL, CODER = "smollm2-135m", "qwen2.5-coder-0.5b"
TWIN_FOLDERS = ("mha-8x-bf16", "mha-8x-mixed", "mha-8x-bf16-3e-5", "mha-8x-mixed-3e-5")
"""The last two are healed, at that rate."""
LONG = "--context 1024,4096,16384,32000"


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
    yield from evaluations()
    yield from healed()
    for model in (SMOL, CODER):
        yield from healed_and_judged(model, "2x", "--kv-ratio 2")
    yield from healed_and_judged(CODER, "8x-mixed", "--kv-ratio 8 --kv-dtype mixed")
    yield from twins()
    command = "flashhead bench decode --shape mha-7b --layers 16 --context 8192,16384 --batch 4"
    command += " --kv-dtype bf16 --device cuda --out {out}"
    yield step("decode-context-h100-mha-7b", command, needs=gpu, minutes=3)
    for name, shapes in (
        ("bf16", "llama-3.2-1b,qwen3-0.6b"),
        ("w4a16-and-gemma", "llama-3.2-1b-w4a16,gemma-3-270m"),
    ):
        command = f"vllm_gpu_step.py --shapes {shapes} --kinds dense,flashhead --reps 2"
        command += " --tokens 128 --json {out}"
        yield step(f"vllm-step-h100-{name}", command, needs=("gpu", "vllm"), minutes=7)


def evaluations() -> Iterator[Step]:
    """May FlashHead take the place of these models' heads?"""
    for model, minutes in zip(MODELS[1:], (7, 10, 13), strict=True):
        cache = f"cache-eval-{model}"
        command = f"flashhead eval {model} --against {model} --tasks all --data-dir data"
        command += f" --limit 200 --device cuda --base-dtype float32 {LONG} --cache {cache}"
        needs = ("gpu", "eval", "tasks")
        name = f"eval-{model}"
        yield step(name, command + " --out {out}", needs=needs, minutes=minutes, keeps=(cache,))


def healed_and_judged(model: str, size: str, arguments: str) -> Iterator[Step]:
    """One folder: converted, measured, healed, measured again, perplexity and tasks."""
    gpu = ("gpu",)
    folder = f"latent-{size}-gpu-{model}"
    arguments += " --attention latent --head dense --device cuda"
    yield conversion(folder, model, 1, arguments, *gpu)
    last = f"convert-{folder}"
    asked = "humaneval,mmlu,gsm8k,perplexity,needle,lookup,copy,addition"
    for state in ("closed-form", "healed"):
        if state == "healed":
            yield (own := _healing(model, size, folder, last))
            last = own.name
        command = f"flashhead eval {folder} --against {model} --device cuda --out {{out}}"
        text = f" --data {TEXT} --limit 16352"
        name = f"latent-{size}-{state}-h100-{model}"
        yield step(name, command + text, needs=gpu, minutes=2, after=(last,))
        cache = f"cache-{size}-{model}"
        tasks = f" --tasks {asked} --head dense --data-dir data --limit 200"
        tasks += f" --base-dtype float32 --context 1024,4096 --cache {cache}"
        needs = ("gpu", "eval", "tasks")
        judged = step(f"eval-latent-{size}-{state}-{model}", command + tasks, needs=needs)
        yield dataclasses.replace(judged, minutes=5, after=(last, name), keeps=(cache,))
        last = judged.name


def _healing(model: str, size: str, folder: str, last: str) -> Step:
    """The rates were found by heal_rates.py (docs/log.md)."""
    if model == SMOL:
        command = f"heal_rates.py {folder} --teacher {model} --device cuda --rates 1e-4,3e-4"
        command += " --tokens 1600000 --full-tokens 20000000 --text-tokens 7000000"
        command += " --micro-tokens 16384 --out {out}"
        name = f"heal-rates-{size}-h100-{model}"
        return step(name, command, needs=("gpu",), minutes=9, after=(last,))
    command = f"flashhead heal {folder} --teacher {model} --device cuda --stage b --rate-b 5e-6"
    command += " --tokens 8000000 --text-tokens 4000000 --micro-tokens 8192 --json"
    name = f"heal-{size}-h100-{model}"
    return step(name, command, needs=("gpu",), minutes=7, after=(last,), prints=True)


def healed() -> Iterator[Step]:
    """Latents through the cache, before and after healing, in folders of their own."""
    for name, model, cases, heal in (
        ("latent-closed-form-mixed-h100", SMOL, "2:bf16,2:mixed,4:mixed,8:mixed", False),
        ("latent-closed-form-h100", SMOL, "2:bf16,4:mixed", False),
        ("latent-closed-form-h100", CODER, "2:bf16,4:mixed", False),
        ("latent-closed-form-8x-h100", CODER, "8:mixed", False),
        ("latent-8x-mixed-healed-h100", SMOL, "8:mixed", True),
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
    yield conversion(folder, SMOL, 5, arguments, "gpu")
    command = f"flashhead eval {folder} --against {SMOL} --data {TEXT} --limit 16352"
    command += " --device cuda --out {out}"
    name = f"latent-8x-mixed-closed-form-h100-{SMOL}"
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
    command = "train_twins.py times twins --device cuda --repeats 7 --out-json {out}"
    trained = ("train-twins-h100",)
    yield step("train-twins-times-h100", command, needs=gpu, minutes=2, after=trained)
    made = {}
    for folder in TWIN_FOLDERS:
        kind = folder.split("-")[2]
        arguments = f"--attention latent --head dense --kv-ratio 8 --kv-dtype {kind} --device cuda"
        arguments += " --calibration twins/heal.jsonl"
        own = conversion(folder, "twins/mha", 1, arguments, *gpu)
        yield (own := dataclasses.replace(own, after=trained))
        made[folder] = own.name
    for state, folders in (("", TWIN_FOLDERS[:2]), ("-healed", TWIN_FOLDERS[2:])):
        names = [made[folder] for folder in folders]
        for folder in folders if state else ():
            command = f"flashhead heal {folder} --teacher twins/mha --tokens 4800000"
            command += " --data twins/heal.jsonl --device cuda --stage b --rate-b 3e-5 --json"
            name = f"train-twins-heal-{folder.split('-')[2]}-h100"
            after = (made[folder],)
            yield step(name, command, needs=gpu, minutes=2, after=after, prints=True)
            names.append(name)
        command = f"train_twins.py judge twins twins/mha twins/latent {' '.join(folders)}"
        command += " --device cuda --out-json {out}"
        name = f"train-twins-judge{state}-h100"
        yield step(name, command, needs=gpu, minutes=2, after=tuple(names))
