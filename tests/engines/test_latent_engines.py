"""Converted models in real engines against transformers with the same latents, in float32."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import torch
from compare import inherited, require_equal, require_searched

sys.path.insert(0, str(Path(__file__).parents[1]))
from latent_models import ids, tiny, windows

from flashhead.convert.latent import make_latent
from flashhead.errors import FlashHeadError
from flashhead.integrations.deepseek import to_deepseek
from flashhead.integrations.latent_cache import LatentCache
from flashhead.integrations.latent_model import (
    install,
    latent_modules,
    mark_folder,
    section_of,
    serve_latents,
)
from flashhead.integrations.latent_roles import find_attention
from flashhead.nn.latent import LatentAttention
from flashhead.nn.token_store import StoreOptions
from flashhead.options_latent import LatentOptions

HERE = Path(__file__).parent
CASES = [
    ("gqa", "rebuilt"),
    ("biases", "decoupled"),
    ("yarn", "rebuilt"),
    ("mistral", "rebuilt"),
    ("qwen2", "rebuilt"),
    ("qwen2", "decoupled"),
    ("qwen3", "rebuilt"),
    ("gemma3", "rebuilt"),
    ("gemma3", "decoupled"),
]
TOKENS, PIECE = 12, 32
ROUNDS = [[70, 3, 1, 33], [70, 90]]
"""Tokens of the prompts that are served together; prompts of a second round begin as those of the
first, so blocks that are cached serve them.
"""


def written(folder, family, rotary):
    """A tiny converted model and its folder."""
    model = tiny(family, vocab_size=256)
    make_latent(model, LatentOptions(kv_ratio=1.5, rotary=rotary), windows(), progress=False)
    serve_latents(model, StoreOptions())
    model.save_pretrained(folder)
    mark_folder(folder, section_of(model, "bf16"))
    return model


def deepseek(folder):
    """A model as trained from scratch, written in DeepSeek-V3's layout: 512 + 64 numbers a token,
    the only size that the CPU build's MLA kernel has.
    """
    sizes = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 8}
    model = tiny("mha", **sizes, head_dim=64, vocab_size=256)
    torch.manual_seed(3)
    for roles in find_attention(model):
        shape = dataclasses.replace(
            roles.exact, head_dim=96, value_dim=64, rank=512, rotary="decoupled",
            components=(1,) * 32, scale=96**-0.5, norm=True, key_constant=False,
        )  # fmt: skip
        attention = LatentAttention(shape, roles.table, roles.module.layer_idx)
        with torch.no_grad():
            for parameter in attention.parameters():
                spread = {1: 0, 2: 0.15, 3: 1}[parameter.dim()]
                parameter.copy_(spread * torch.randn_like(parameter))
            attention.latent_norm.weight.add_(1)
        install(model, roles.name, attention)
    made, report = to_deepseek(model.eval())
    assert not report["attention_bias"]
    made.save_pretrained(folder)
    return model


def prompts():
    long = ids(1, 128)[0].tolist()
    return [[long[:n] if n > 50 else long[-n:] for n in lengths] for lengths in ROUNDS]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Models, and what engines answer: all in one process, which starts once."""
    work = tmp_path_factory.mktemp("latent-engines")
    models, jobs = {}, {}
    for case in CASES:
        folder = work / "-".join(case)
        models[case] = written(folder, *case)
        engine = {"model": str(folder), "dtype": "float32", "max_model_len": 128,
                  "max_num_seqs": 8, "enforce_eager": case != ("qwen2", "rebuilt"),
                  "max_num_batched_tokens": PIECE, "enable_chunked_prefill": True,
                  "block_size": 32, "enable_prefix_caching": True}  # fmt: skip
        jobs[folder.name] = {"engine": engine, "rounds": prompts(), "tokens": TOKENS}
    models["deepseek"] = deepseek(work / "deepseek")
    # the CPU build's own rotary operator turns DeepSeek's queries wrongly
    engine = {"model": str(work / "deepseek"), "dtype": "float32", "max_model_len": 128,
              "max_num_seqs": 8, "enforce_eager": True,
              "compilation_config": {"custom_ops": ["none"]}}  # fmt: skip
    jobs["deepseek"] = {"engine": engine, "rounds": prompts(), "tokens": TOKENS}
    (work / "job.json").write_text(json.dumps(jobs))
    answer = work / "answer.json"
    done = subprocess.run(
        [sys.executable, str(HERE / "latent_engines.py"), str(work / "job.json"), str(answer)],
        env=inherited() | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_CI_ENV": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return models, json.loads(answer.read_text())


@torch.no_grad()
def wanted(model, prompt, tokens):
    """transformers' greedy tokens after a prompt, and their log-probabilities."""
    cache, given = LatentCache(model), torch.tensor([prompt])
    found, values = [], []
    for _ in range(tokens):
        line = model(given, past_key_values=cache).logits[0, -1].log_softmax(-1)
        found.append(int(line.argmax()))
        values.append(float(line.max()))
        given = torch.tensor([found[-1:]])
    return found, values


def require_same(model, rounds):
    """Tokens and log-probabilities of transformers' with latent attention."""
    for lengths, answered in zip(prompts(), rounds, strict=True):
        for prompt, got in zip(lengths, answered, strict=True):
            tokens, values = wanted(model, prompt, TOKENS)
            assert got["tokens"] == tokens
            assert got["logprobs"] == pytest.approx(values, abs=1e-4)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case))
def test_as_transformers(case, served):
    """Blocks that are read in another order, a prompt's pieces that forget each other, a cached
    prefix that is another's, rows of a batch that are exchanged, a norm, a bias, a window or a
    rotary type that vLLM's model has otherwise, weights that were not loaded.
    """
    models, answers = served
    require_same(models[case], answers["-".join(case)]["rounds"])


def test_deepseek_layout_in_vllms_own_classes(served):
    """An export that only transformers reads as it was meant: vLLM has no biases, one epsilon for
    all norms, and its own order of rotary coordinates.
    """
    models, answers = served
    require_same(models["deepseek"], answers["deepseek"]["rounds"])
    assert set(answers["deepseek"]["cache_bytes"].values()) == {4 * (512 + 64)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case))
def test_blocks_hold_latents_only(case, served):
    """A cache that is allocated for keys and values, or for the widest layer."""
    models, answers = served
    widths = [module.shape.width for module in latent_modules(models[case]).values()]
    assert list(answers["-".join(case)]["cache_bytes"].values()) == [4 * width for width in widths]


@pytest.mark.model
def test_latents_and_a_searched_head(generate, tmp_path):
    """A folder with both, of which vLLM takes one: SmolLM2-135M, searched and dense."""
    out = tmp_path / "smollm2"
    command = [sys.executable, "-m", "flashhead.cli", "convert", "smollm2-135m", str(out)]
    options = ["--attention", "latent", "--kv-ratio", "1", "--calibration-tokens", "256"]
    done = subprocess.run(
        [*command, *options, "--set", "calibration_tokens=1024"],
        env=inherited(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    engine = {"model": str(out), "hf_overrides": {"flashhead_options": {"crossover": 16}}}
    flash = generate(engine)
    require_searched(flash)
    assert "FlashHead on" in flash["log"]
    require_equal(flash, generate(engine, dense=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size 2: wanted 1"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size 2: wanted 1"),
        ({"lora_config": object()}, "LoRA"),
        ({"cache_dtype": "fp8"}, "kv_cache_dtype 'fp8'"),
    ],
)
def test_what_is_not_served_is_refused(changes, message):
    """A sharded, adapted or rounded engine that answers something wrong."""
    from types import SimpleNamespace

    from flashhead.integrations.vllm.latent_model import require_servable

    values = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "cache_dtype": "auto"}
    values |= {"lora_config": None} | changes
    engine = SimpleNamespace(
        parallel_config=SimpleNamespace(**values),
        cache_config=SimpleNamespace(**values),
        model_config=SimpleNamespace(dtype=torch.float32),
        lora_config=values["lora_config"],
    )
    with pytest.raises(FlashHeadError, match=message):
        require_servable(engine)
