"""Latent attention in DeepSeek-V3's layout: transformers' own classes give the same logits."""

import dataclasses

import pytest
import torch
from latent_models import ids, tiny, windows
from torch import nn
from transformers import DeepseekV3ForCausalLM

from flashhead.cli import main
from flashhead.convert.latent import make_latent
from flashhead.errors import FlashHeadError
from flashhead.integrations.deepseek import to_deepseek
from flashhead.integrations.latent_cache import LatentCache
from flashhead.integrations.latent_model import (
    install,
    latent_modules,
    mark_folder,
    section_of,
)
from flashhead.integrations.latent_roles import find_attention
from flashhead.nn.latent import LatentAttention
from flashhead.options_latent import LatentOptions

TWIN = {
    "head_dim": 24,
    "value_dim": 12,
    "rank": 40,
    "rotary": "decoupled",
    "components": (1,) * 8,
    "scale": 24**-0.5,
    "norm": True,
    "key_constant": False,
}
"""As trained from scratch: rotary and fixed coordinates, a norm on the latent."""
CHANGES = {
    "twin": {},
    "without-norm": {"norm": False},
    "another-scale": {"scale": 0.3},
    "missing-pairs": {"components": (1, 0, 1, 1, 0, 0, 1, 1)},
    "shared-heads": {"kv_heads": 2},
}


def latent(family="mha", ranks=(40, 32), **changes):
    """A tiny model whose attention is latent with random weights, of another rank a layer."""
    model = tiny(family)
    torch.manual_seed(3)
    for roles, rank in zip(find_attention(model), ranks, strict=True):
        shape = dataclasses.replace(roles.exact, **{**TWIN, "rank": rank, **changes})
        attention = LatentAttention(shape, roles.table, roles.module.layer_idx)
        with torch.no_grad():
            for name, parameter in attention.named_parameters():
                spread = 1 if "norm" in name or "mix" in name else 0.3
                parameter.copy_(spread * torch.randn_like(parameter))
            if attention.key_constant is not None:
                attention.key_constant.unflatten(0, (shape.kv_heads, -1))[:, :16] = 0
        install(model, roles.name, attention)
    return model.eval()


def require_same(model, made):
    """Logits of a text at once, and of a prompt and then token by token."""
    tokens = ids(2, 24)
    with torch.no_grad():
        want = model(tokens, use_cache=False).logits
        got = made(tokens, use_cache=False).logits
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))
        cache, parts = None, []
        for start, stop in [(0, 9), *((i, i + 1) for i in range(9, 24))]:
            out = made(tokens[:, start:stop], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), got, rtol=0, atol=1e-4)


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_logits(changes):
    """Interleaved pairs in the wrong order, a mix that turns backwards, a norm over padded
    numbers, a constant value or a bias that is lost, heads that read another group's.
    """
    model = latent(**changes)
    made, report = to_deepseek(model)
    assert type(made) is DeepseekV3ForCausalLM
    assert report["attention_bias"]
    assert report["rank"] == 40 + (not changes.get("norm", True))
    assert report["logit_error"] < 1e-4
    require_same(model, made)


def test_a_constant_key_that_does_not_turn_is_nothing():
    """An export that refuses, or changes, what the softmax does not see."""
    model = latent(key_constant=True)
    assert all(m.key_constant.any() for m in latent_modules(model).values())
    require_same(model, to_deepseek(model)[0])


def test_without_biases():
    """Biases that are declared where there are none: engines do not have them."""
    model = latent()
    with torch.no_grad():
        for module in latent_modules(model).values():
            module.encode.bias.zero_()
            module.value_constant.zero_()
    made, report = to_deepseek(model)
    assert not report["attention_bias"]
    assert not [name for name, _ in made.named_parameters() if name.endswith("bias")]
    require_same(model, made)


def test_converted_with_one_kv_head():
    """A converted model: no norm, no coordinates that do not turn, means that are constants."""
    model = tiny("mqa")
    options = LatentOptions(kv_ratio=1.0, rotary="decoupled")
    make_latent(model, options, windows(), progress=False)
    for module in latent_modules(model).values():
        nn.init.zeros_(module.key_constant)
    require_same(model, to_deepseek(model)[0])


def test_the_model_itself_stays():
    """An export that leaves the original in another dtype, or shares its weights."""
    model = latent().bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made, _ = to_deepseek(model)
    assert made.dtype == torch.bfloat16
    for parameter in made.parameters():
        parameter.data.zero_()
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    tokens = ids(1, 8)
    assert model(tokens, past_key_values=LatentCache(model)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny("gqa"), "latent attention in all layers"),
        (lambda: latent("qwen3"), "wanted one of LlamaForCausalLM"),
        (lambda: latent(components=(2,) * 8, kv_heads=2), "2 components of one rotary pair"),
        (lambda: latent("mistral"), "windows and norms"),
        (lambda: latent("yarn"), "rotary type 'yarn'"),
        (lambda: latent("biases"), "a bias of queries"),
        (lambda: latent(rotary="rebuilt", components=()), "--rotary decoupled"),
    ],
)
def test_what_the_layout_cannot_hold(make, message):
    """A folder that is written and says something else."""
    with pytest.raises(FlashHeadError, match=message):
        to_deepseek(make())


def test_a_constant_key_that_turns_is_refused():
    """Scores that lose a part which depends on the distance."""
    model = latent(key_constant=True)
    with torch.no_grad():
        next(iter(latent_modules(model).values())).key_constant[0] = 1
    with pytest.raises(FlashHeadError, match="a constant key that turns"):
        to_deepseek(model)


def test_folder(tiny_folder, tmp_path, capsys):
    """A folder that plain transformers cannot load, or one without its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, out = tmp_path / "latent", tmp_path / "deepseek"
    model = tiny("mha")
    shapes = [roles.exact for roles in find_attention(model)]
    for roles, exact in zip(find_attention(model), shapes, strict=True):
        own = {**TWIN, "head_dim": 16, "value_dim": 16, "scale": exact.scale}
        shape = dataclasses.replace(exact, **own)
        install(model, roles.name, LatentAttention(shape, roles.table, roles.module.layer_idx))
    model.save_pretrained(source)
    mark_folder(source, section_of(model, "bf16"))
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(source)
    assert main(["convert", str(source), str(out), "--layout", "deepseek"]) == 0
    assert "kv_lora_rank 40" in capsys.readouterr().out
    made = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert type(made) is DeepseekV3ForCausalLM
    require_same(model, made)
    assert AutoTokenizer.from_pretrained(out).vocab_size == 515


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["OUT", "--head", "codes"], "--layout deepseek with --head"),
        (["OUT", "--kv-ratio", "2"], "--layout deepseek with --kv-ratio"),
        ([], "wanted OUT"),
        (["OUT"], "wanted a folder with latent attention"),
    ],
)
def test_a_users_mistake(arguments, message, tiny_folder, tmp_path, capsys):
    """A wrong call that is found out after the work, or not at all."""
    given = [str(tmp_path / "out") if a == "OUT" else a for a in arguments]
    assert main(["convert", str(tiny_folder), *given, "--layout", "deepseek"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
