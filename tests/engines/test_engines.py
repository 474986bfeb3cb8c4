"""Engines beside the plain one: quantized bodies, experts, adapters, speculation, ranks.

Greedy tokens of a searched head are float32's, those of a dense bf16 head are not always: where two
texts part, the dense engine's logits of the two tokens must be within one step of bf16.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import bare_head
import checkpoints
import torch
from compare import PROMPTS, TOKENS, inherited, options, require_equal, require_searched
from safetensors.torch import save_file

from flashhead.models import embedded_folder

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return embedded_folder("smollm2-135m")


@pytest.mark.parametrize("kind", ["w8a8", "w4a16", "w8a8-fp8", "awq", "gptq"])
def test_quantized_body(kind, smollm2, converted_folder, generate, tmp_path):
    """A checkpoint's own quantization that is lost, or a head that is not searched with it."""
    model = str(checkpoints.quantized(smollm2, tmp_path / kind, kind))
    flash = generate({"model": model, **options(index=str(converted_folder))})
    require_searched(flash)
    require_equal(flash, generate({"model": model}, dense=True))


def test_experts_and_an_index_built_at_load(smollm2, generate, tmp_path):
    """Expert layers that get no method; an index of an unmodified checkpoint that is not built."""
    model = str(checkpoints.mixture_of_experts(smollm2, tmp_path / "moe"))
    flash = generate(
        {"model": model, **options(calibration_tokens=1024)},
        FLASHHEAD_CACHE=str(tmp_path / "cache"),
    )
    require_searched(flash)
    assert len(list((tmp_path / "cache" / "indexes").glob("moe-*/flashhead"))) == 1
    require_equal(flash, generate({"model": model}, dense=True))


def test_head_that_is_given_no_config(converted_folder, generate, tmp_path):
    """A model class that builds its head by itself, not found in vLLM's worker process."""
    bare_head.install(tmp_path / "plugin")
    path = {"PYTHONPATH": f"{HERE}{os.pathsep}{tmp_path / 'plugin'}"}
    engine = {"model": str(converted_folder)}
    engine["hf_overrides"] = {"architectures": ["BareHeadForCausalLM"]}
    searched = {"hf_overrides": options()["hf_overrides"] | engine["hf_overrides"]}
    flash = generate({**engine, **searched}, **path)
    require_searched(flash)
    require_equal(flash, generate(engine, dense=True, **path))


def adapter_folder(out, shapes, scale=0.2):
    """A random adapter of 8 dimensions.

    Args:
        out: folder to make.
        shapes: rows of the layers that it changes, by their names in the checkpoint.
        scale: of what it adds.
    """
    out.mkdir()
    torch.manual_seed(0)
    weights = {}
    for name, rows in shapes.items():
        weights[f"base_model.model.{name}.lora_A.weight"] = torch.randn(8, 576) * 0.02
        weights[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, 8) * scale
    weights = {name: tensor.bfloat16() for name, tensor in weights.items()}
    save_file(weights, out / "adapter_model.safetensors")
    config = {"r": 8, "lora_alpha": 16, "peft_type": "LORA", "task_type": "CAUSAL_LM"}
    config |= {"target_modules": sorted({name.split(".")[-1] for name in shapes}), "bias": "none"}
    (out / "adapter_config.json").write_text(json.dumps(config))
    return str(out)


def test_adapters(converted_folder, generate, tmp_path):
    """An adapter that is not applied; one of the body that is not searched, one of the head that
    is: what it adds then meets estimates.
    """
    attention = {"q_proj": 576, "v_proj": 192}
    body = {
        f"model.layers.{layer}.self_attn.{name}": rows
        for layer in range(30)
        for name, rows in attention.items()
    }
    body = adapter_folder(tmp_path / "body", body)
    head = adapter_folder(tmp_path / "head", {"lm_head": 49152}, scale=1.0)
    engine = {"model": str(converted_folder), "enable_lora": True, "max_lora_rank": 8}
    engine["max_loras"] = 3  # vLLM's CPU operators add the last slot's to rows without an adapter
    mixed = {"lora": [head, body, None, head], "prompts": [*PROMPTS[:1] * 3, PROMPTS[1]]}
    greedy = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
    flash = generate({**engine, **options()}, params=[greedy] * 4, **mixed)
    (counts,) = flash["heads"]
    assert (counts["searched_rows"], counts["dense_rows"]) == (2 * TOKENS, 2 * TOKENS)
    assert counts["certified_fraction"] == 1
    texts = [answer["tokens"] for answer in flash["answers"][:3]]
    assert len({tuple(tokens) for tokens in texts}) == 3
    told = [greedy | {"logprobs": 5}] * 4
    require_equal(flash, generate(engine, dense=True, params=told, **mixed))


def test_speculation(smollm2, converted_folder, generate):
    """Speculation that changes the text, or heads that it leaves dense."""
    engine = {"model": str(converted_folder), "max_num_seqs": 4}
    plain = generate({**engine, **options()})
    greedy = options(speculative_target="greedy")
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
    flash = generate({**engine, **greedy, "speculative_config": ngram})
    require_searched(flash)
    assert [a["tokens"] for a in flash["answers"]] == [a["tokens"] for a in plain["answers"]]

    draft = {"method": "draft_model", "model": str(smollm2), "num_speculative_tokens": 2}
    draft |= {"quantization": "flashhead"}
    flash = generate({**engine, **greedy, "speculative_config": draft})
    require_searched(flash)
    (proposer,) = (head for head in flash["heads"] if head["draft"])
    assert proposer["searched_rows"] > 0
    assert [a["tokens"] for a in flash["answers"]] == [a["tokens"] for a in plain["answers"]]


def test_speculation_verified_by_the_dense_head(converted_folder, generate):
    """Nobody tells the rows of V1's verification apart: without leave they must all be dense."""
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
    engine = {"model": str(converted_folder), "speculative_config": ngram}
    structured = {"temperature": 0, "max_tokens": 8, "structured_outputs": None, "logprobs": 2}
    params = [structured] * len(PROMPTS)
    answer = generate({**engine, **options()}, params=params)
    (head,) = answer["heads"]
    assert (head["searched_rows"], head["dense_rows"] > 0) == (0, True)


def test_ranks(converted_folder, generate):
    """Shards whose candidates are compared wrongly, or an index that is cut at the wrong row."""
    gemma = embedded_folder("gemma-3-270m")
    engine = {"model": str(gemma), "tensor_parallel_size": 2}
    cores = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    flash = generate({**engine, **options(calibration_tokens=1024)}, **cores)
    assert len(flash["heads"]) == 2
    for head in flash["heads"]:
        assert head["searched_rows"] >= TOKENS
        assert head["dense_rows"] == 0
    require_equal(flash, generate(engine, dense=True, **cores))


def test_bench(converted_folder):
    """Engines that are stopped in the wrong order, or a table of one that did not search."""
    command = [sys.executable, "-m", "flashhead.cli", "bench", "vllm", "--json"]
    command += ["--model", str(converted_folder), "--batches", "1", "--tokens", "8"]
    command += ["--repeats", "2", "--engine", '{"enforce_eager": true}']
    done = subprocess.run(command, env=inherited(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert (row["searched_fraction"], len(row["seconds"]["dense"])) == (1, 2)
    assert 0.05 < row["bytes_fraction"] < 0.25
    broken = subprocess.run(
        [*command, "--engine", '{"max_model_len": -7}'],
        env=inherited(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert broken.returncode == 2
    assert "the dense engine ended" in broken.stderr
