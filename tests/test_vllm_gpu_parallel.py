"""The parts of `benchmarks/vllm_gpu_parallel.py` and of its drafts that run without vLLM."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

# ruff: noqa: E402
import vllm_gpu_parallel as parallel
import vllm_gpu_place as place
import vllm_gpu_speculation as speculation
from vllm_gpu_drafts import make_draft
from vllm_gpu_models import make_model
from vllm_gpu_shapes import TINY


class Judge:
    """A dense engine with given logits, the same at each step."""

    def __init__(self, logits):
        self.logits, self.asked = logits, []

    def generate(self, prompts, tokens, *, logits):
        assert (tokens, logits) == (1, place.TOLD_LOGITS)
        self.asked += prompts
        return {"logits": [[list(self.logits.items())] for _ in prompts]}


def test_partings_are_judged_where_they_are():
    """A tie taken for an error, an error for a tie, or a judge that is given another prefix."""
    judge = Judge({5: 12.0, 6: 11.9375, 7: 11.5})  # bf16 steps of 1/16
    prompts, wanted = [[1, 2], [3], [4], [8]], [[9, 5, 1], [9, 5, 2], [9, 5, 3], [9, 9, 9]]
    found = [[9, 6, 4], [9, 7, 2], [9, 8, 3], [9, 9, 9]]
    told = place.compare_texts(judge, prompts, wanted, found)
    assert told == {"texts": 4, "parted": 3, "gaps_bf16_steps": [1.0, 8.0, None], "beyond": 2}
    assert judge.asked == [[1, 2, 9], [3, 9], [4, 9]]
    assert parallel.errors_of({"batch": 1, "divergences": told})
    assert not parallel.errors_of({"batch": 1, "divergences": told | {"beyond": 0}})


def test_spread():
    assert place.spread([3.0]) == {"median": 3.0, "p10": 3.0, "p90": 3.0}
    assert place.spread([float(n) for n in range(11)]) == {"median": 5, "p10": 1, "p90": 9}


def test_prompts_are_every_engines():
    one, other = (place.prompts_of(900, 3, "pair 0") for _ in range(2))
    assert one == other
    assert place.prompts_of(900, 3, "pair 1") != one
    assert {len(prompt) for prompt in one} == {place.PROMPT_TOKENS}


@pytest.mark.parametrize(
    "wrong",
    [["--shapes", "one"], ["--pairs", "0"], ["--batches", "64"], ["--tensor-parallel", "0"]],
)
def test_command_line(wrong):
    with pytest.raises(SystemExit):
        parallel.parse(wrong)
    with pytest.raises(SystemExit):
        speculation.parse(["--cases", "one"])


def row(target, draft, accepted=1, beyond=0):
    """What a case measured: rows searched of both heads."""
    heads = {
        "target": {"searched_rows": target, "draft_rows": 0},
        "draft": {"searched_rows": draft},
    }
    parted = {"beyond": beyond, "gaps_bf16_steps": [9.0]}
    metrics = {speculation.COUNTERS[1]: accepted}
    return {"heads": heads, "divergences": parted, "metrics": metrics}


def test_cases_say_which_heads_are_searched():
    """A head that is dense without a word, or drafts that are never accepted."""
    case = speculation.CASES["eagle3"]
    assert speculation.errors_of(case, row(5, 5)) == []
    for wrong in (row(0, 5), row(5, 0), row(5, 5, accepted=0), row(5, 5, beyond=1)):
        assert len(speculation.errors_of(case, wrong)) == 1
    assert speculation.errors_of(speculation.CASES["eagle3-target-only"], row(5, 5))
    shared = row(5, 0)
    shared["heads"]["target"]["draft_rows"] = 5
    assert speculation.errors_of(speculation.CASES["eagle-verified-dense"], shared) == []
    assert speculation.errors_of(speculation.CASES["eagle"], shared)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target") / "model"
    small = {"vocab_size": 900, "num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 64}
    make_model(folder, TINY | small | {"num_attention_heads": 4}, "cpu")
    return folder


def test_eagle3_proposes_what_its_embedding_says(target, tmp_path):
    """Attention that mixes positions, or rows of the head that `d2t` does not name."""
    make_draft("eagle3", target, tmp_path / "draft", crossover=4)
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert (config["draft_vocab_size"], config["flashhead_options"]) == (450, {"crossover": 4})
    weights = load_file(tmp_path / "draft" / "model.safetensors")
    whole = load_file(target / "model.safetensors")
    tokens = torch.arange(450) + weights["d2t"]
    assert torch.equal(weights["lm_head.weight"], whole["lm_head.weight"][tokens])
    embedded = whole["model.embed_tokens.weight"][tokens[:40]].float()
    normed = embedded / embedded.square().mean(1, keepdim=True).sqrt()
    inputs = torch.cat([normed, torch.randn(40, 128)], dim=1)
    query, key, value = (
        (inputs @ weights[f"midlayer.self_attn.{name}_proj.weight"].float().T).view(40, 4, 32)
        for name in "qkv"
    )
    scores = torch.einsum("qhd,khd->hqk", query, key) / 32**0.5
    mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).flatten(1)
    torch.testing.assert_close(mixed, normed, rtol=0.05, atol=0.05)


def test_eagle_hands_on_its_embedding(target, tmp_path):
    """A draft with a head of its own, or a mixture of both inputs."""
    make_draft("eagle", target, tmp_path / "draft")
    weights = load_file(tmp_path / "draft" / "model.safetensors")
    assert not any("lm_head" in name or "input_layernorm" in name for name in weights)
    both = torch.randn(3, 256)
    torch.testing.assert_close(both @ weights["fc.weight"].float().T, both[:, :128])
