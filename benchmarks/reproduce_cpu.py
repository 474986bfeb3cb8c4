"""Steps of `make reproduce` for two CPU cores."""

import dataclasses
from collections.abc import Iterator

from reproduce_step import (
    FIRST_HALF,
    MODELS,
    QWEN,
    SECOND_HALF,
    SMALL,
    TEXT,
    Step,
    conversion,
    drawing,
    step,
)


def conversions() -> Iterator[Step]:
    """Models are fetched by the first command that names them."""
    for model, minutes in zip(MODELS, (2, 4, 3, 6), strict=True):
        yield conversion(f"flash-{model}", model, minutes)
        yield conversion(f"w4-{model}", model, minutes, "--quantize w4a16", "quantize")
        plain = "--quantize w4a16 --head dense"
        yield conversion(f"w4-dense-{model}", model, minutes, plain, "quantize")
    gptq = f"--quantize w4a16 --calibration {FIRST_HALF}"
    yield conversion("gptq-smollm2-135m", "smollm2-135m", 10, gptq, "quantize", "calibrate")
    for model in ("smollm2-135m", "qwen2.5-coder-0.5b"):
        yield conversion(f"latent-2x-{model}", model, 5, "--attention latent --kv-ratio 2")


def fidelity() -> Iterator[Step]:
    """Heads against float32 logits."""
    data = f"--data {TEXT}"
    for model, minutes in zip(MODELS, (3, 12, 10, 9), strict=True):
        methods = "--positions 20000 --methods flashhead,certified,bf16,int8"
        command = f"flashhead eval head --model flash-{model} {data} {methods} --out {{out}}"
        made = (f"convert-flash-{model}",)
        yield step(f"certified-{model}", command, minutes=minutes, after=made)
    for name, model, more in (
        ("certified-alone", "qwen2.5-coder-0.5b", "--positions 20000 --methods certified"),
        (
            "deterministic",
            "smollm2-135m",
            "--positions 128 --methods certified --failure-probability 0",
        ),
    ):
        command = f"flashhead eval head --model flash-{model} {data} {more} --out {{out}}"
        yield step(f"{name}-{model}", command, minutes=2, after=(f"convert-flash-{model}",))
    clusters = "--head clusters --positions 4096 --methods flashhead --out {out}"
    command = f"flashhead eval head --model gemma-3-270m {data} {clusters}"
    yield step("eval-clusters-gemma-3-270m", command)
    for model, positions in zip(MODELS, (4096, 4096, 1024, 1024), strict=True):
        command = f"flashhead eval logprobs --model flash-{model} {data} --positions {positions}"
        made = (f"convert-flash-{model}",)
        yield step(f"logprobs-{model}", command + " --out {out}", after=made)
    command = f"flashhead eval sampling --model flash-smollm2-135m {data} --draws 1000000"
    made = ("convert-flash-smollm2-135m",)
    yield step("sampling-smollm2-135m", command + " --out {out}", minutes=13, after=made)
    for model, positions in zip(MODELS, (1024, 256, 256, 128), strict=True):
        command = f"flashhead eval frontier --model {model} {data} --positions {positions}"
        name = f"frontier-{model}"
        files = (f"{name}.json", f"{name}.svg")
        yield step(name, command + " --out-dir out", documents=files, needs=("plots",), minutes=3)


def evaluations() -> Iterator[Step]:
    """May a converted model replace its original?"""
    for model, minutes in zip(MODELS, (4, 10, 20, 50), strict=True):
        pairs = [("w4a16-", "w4", f"w4-dense-{model}")]
        if model == SMALL[0]:  # the others take hours here: reproduce_gpu.py
            pairs.insert(0, ("", "flash", model))
        for kind, folder, base in pairs:
            name = f"eval-{kind}{model}"
            made = tuple(f"convert-{own}" for own in (f"{folder}-{model}", base) if own != model)
            needs = ("eval", "tasks") + (("quantize",) if kind else ())
            command, cache = asked(f"{folder}-{model}", base, name)
            yield step(name, command, needs=needs, minutes=minutes, after=made, keeps=cache)
    for model in SMALL:  # older evaluations scored the text's tokens by the complete logits
        command = f"flashhead eval flash-{model} --against {model} --tasks perplexity"
        command += f" --data-dir data --limit 50 --cache cache-perplexity-{model} --out {{out}}"
        own = step(f"perplexity-{model}", command, needs=("eval",), minutes=5)
        cache = (f"cache-perplexity-{model}",)
        yield dataclasses.replace(own, after=(f"convert-flash-{model}",), keeps=cache)
    name = "eval-latent-2x-smollm2-135m"
    command, cache = asked("latent-2x-smollm2-135m", "smollm2-135m", name)
    made = ("convert-latent-2x-smollm2-135m",)
    yield step(name, command, needs=("eval", "tasks"), minutes=10, after=made, keeps=cache)
    folder = "latent-2x-mixed-smollm2-135m"
    arguments = "--attention latent --head dense --kv-ratio 2 --kv-dtype mixed"
    arguments += f" --calibration {TEXT} --calibration-tokens 2048"
    yield conversion(folder, "smollm2-135m", 2, arguments)
    command = f"flashhead eval {folder} --against smollm2-135m --data {TEXT} --limit 2044"
    yield step(folder, command + " --out {out}", minutes=3, after=(f"convert-{folder}",))
    for kind, folder in (("rtn", "w4"), ("gptq", "gptq")):
        made = (f"convert-{folder}-smollm2-135m",)
        command = f"flashhead verify {folder}-smollm2-135m --against smollm2-135m"
        command += f" --data {SECOND_HALF} --positions 2048 --json"
        name = f"verify-w4a16-{kind}-smollm2-135m"
        yield step(name, command, needs=("quantize",), minutes=2, after=made, prints=True)


def asked(model: str, base: str, name: str) -> tuple[str, tuple[str, ...]]:
    """All tasks, and the folder that keeps their answers."""
    cache = f"cache-{name}"
    tasks = f"--tasks all --data-dir data --limit 200 --cache {cache}"
    return f"flashhead eval {model} --against {base} {tasks} --out {{out}}", (cache,)


def speed() -> Iterator[Step]:
    """Two CPU cores."""
    made = ("convert-flash-gemma-3-270m",)
    command = "flashhead bench head --model flash-gemma-3-270m --batches 1,4,16 --repeats 40"
    yield step("bench-head-gemma-3-270m", command + " --out {out}", after=made)
    command = "flashhead bench decode --model gemma-3-270m --json"
    yield step("bench-decode-gemma-3-270m", command, minutes=3, prints=True)
    for name, tokens in (("stacked", 48), ("winner", 32)):
        command = "flashhead bench decode --model w4-gemma-3-270m --against gemma-3-270m"
        command += f" --new-tokens {tokens} --repeats 3 --compile --json"
        fields = {"needs": ("quantize",), "after": ("convert-w4-gemma-3-270m",), "prints": True}
        yield step(f"{name}-decode-gemma-3-270m", command, minutes=3, **fields)
    yield step("attach-time-quiet", "attach_time.py qwen2.5-coder-0.5b --out {out}", minutes=2)
    yield step("ledger", "flashhead inspect --config all --out {out}", minutes=0.2)
    command = "flashhead bench attention --batch 1 --context 1024,4096,16384,32768"
    command += " --dtype bf16,int8,int4 --repeats 31 --out {out}"
    yield step("long-context-cpu", command, minutes=3)
    yield drawing("long-context-cpu", "bench attention", ("long-context-cpu",))


def latents() -> Iterator[Step]:
    """Latent attention on two CPU cores."""
    for model, limit, minutes in (("smollm2-135m", 8176, 4), ("qwen2.5-coder-0.5b", 2044, 3)):
        made = (f"convert-latent-2x-{model}",)
        command = f"flashhead eval latent-2x-{model} --against {model} --data {TEXT}"
        command += f" --limit {limit} --out {{out}}"
        yield step(f"latent-2x-{model}", command, minutes=minutes, after=made)
    command = f"latent_exact.py {' '.join((*SMALL, QWEN[0]))} --data {TEXT} --out {{out}}"
    yield step("latent-exact", command, minutes=3)
    command = f"latent_ratios.py smollm2-135m --data {TEXT} --limit 8176 --out {{out}}"
    yield step("latent-ratios-smollm2-135m", command, minutes=20)


def served() -> Iterator[Step]:
    """vLLM's CPU build."""
    made = ("convert-flash-gemma-3-270m",)
    command = "flashhead bench vllm --model flash-gemma-3-270m --batches 1,4 --repeats 9"
    name = "vllm-decode-gemma-3-270m"
    yield step(name, command + " --out {out}", needs=("vllm",), minutes=6, after=made)
    for model, kind, more in (
        ("smollm2-135m", "float32-", " --reference float32"),
        ("smollm2-135m", "", ""),
        ("gemma-3-270m", "", ""),
    ):
        command = f"flashhead eval vllm --model flash-{model}{more} --out {{out}}"
        made = (f"convert-flash-{model}",)
        name = f"vllm-features-{kind}{model}"
        yield step(name, command, needs=("vllm",), minutes=7, after=made)
    made = ("convert-latent-2x-qwen2.5-coder-0.5b",)
    for kind, dtype, prompts in (("bf16", "bfloat16", 2), ("float32", "float32", 2)):
        command = f"vllm_latent.py latent-2x-qwen2.5-coder-0.5b --text {TEXT} --context 8192"
        command += f" --tokens 64 --prompts {prompts} --dtype {dtype} --against qwen2.5-coder-0.5b"
        name = f"vllm-latent-8k-{kind}-qwen2.5-coder-0.5b"
        yield step(name, command + " --json {out}", needs=("vllm",), minutes=15, after=made)
