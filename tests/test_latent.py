"""The algebra of latent attention: exact at ratio 1, absorbed equals materialised."""

import itertools

import pytest
import torch
from latent_models import FAMILIES, ids, tiny, windows

from flashhead.convert.latent import make_latent
from flashhead.errors import FlashHeadError
from flashhead.integrations.latent_cache import LatentCache
from flashhead.integrations.latent_model import latent_modules, serve_latents
from flashhead.nn.latent import LatentAttention
from flashhead.nn.latent_shape import LatentShape
from flashhead.nn.rotary import RotaryTable
from flashhead.nn.token_store import StoreOptions
from flashhead.options_latent import LatentOptions


def converted(family, ratio, rotary="rebuilt", **changes):
    model = tiny(family, **changes)
    options = LatentOptions(kv_ratio=ratio, rotary=rotary)
    report = make_latent(model, options, windows(), progress=False)
    serve_latents(model, StoreOptions())
    return model, report


@torch.no_grad()
def logits(model, tokens, **kwargs):
    return model(tokens, use_cache=False, **kwargs).logits


@torch.no_grad()
def decoded(model, tokens, cache, prefill=17):
    """Logits by way of a cache: a prefill, then a chunk, then token by token."""
    cuts = [0, prefill, prefill + 5, *range(prefill + 6, tokens.shape[1] + 1)]
    parts = [
        model(tokens[:, a:b], past_key_values=cache, use_cache=True).logits
        for a, b in itertools.pairwise(cuts)
    ]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("rotary", ["rebuilt", "decoupled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ratio_one_changes_nothing(family, rotary):
    """Catches any mistake in rotation, mixes, means, biases, norms, windows, scales or grouping."""
    want = logits(tiny(family), ids())
    model, report = converted(family, 1.0, rotary)
    assert report["kv_ratio"] == 1.0
    assert all(isinstance(m, LatentAttention) for m in latent_modules(model).values())
    error = (logits(model, ids()) - want).abs().max() / want.abs().max()
    assert error < 1e-4
    through_cache = decoded(model, ids(), LatentCache(model))
    assert (through_cache - want).abs().max() / want.abs().max() < 1e-4


@pytest.mark.parametrize("rotary", ["rebuilt", "decoupled"])
@pytest.mark.parametrize("family", ["gqa", "biases", "qwen3", "gemma3", "partial-rotary"])
def test_absorbed_equals_materialised(family, rotary):
    """At a ratio that loses something both forms must lose the same."""
    model, report = converted(family, 2.0, rotary)
    assert report["kv_ratio"] >= 2.0
    assert sum(report["expected_kl"]) > 0
    found = {}
    for mode in ("materialised", "absorbed"):
        for module in latent_modules(model).values():
            module.mode = mode
        found[mode] = (logits(model, ids()), decoded(model, ids(), LatentCache(model)))
    for pair in zip(*found.values(), strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*found["absorbed"], rtol=1e-4, atol=1e-4)


def test_left_padding_changes_nothing():
    """Indexes stand for positions: a padded row must see the same distances."""
    model, _ = converted("gqa", 2.0)
    short = ids(1, 12)
    padded = torch.cat((torch.zeros(1, 9, dtype=torch.long), short), 1)
    batch = torch.cat((padded, ids(1, 21, seed=5)))
    mask = (batch != 0).long()
    arguments = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    alone = model.generate(short, **arguments)[0, 12:]
    together = model.generate(batch, attention_mask=mask, **arguments)[0, 21:]
    assert torch.equal(alone, together)


def test_module_alone_trains_and_decodes():
    """A layer from scratch: gradients reach every weight; both forms keep window and norm."""
    torch.manual_seed(0)
    shape = LatentShape(
        hidden_size=32, heads=8, kv_heads=8, head_dim=8, value_dim=8, rank=12, rotary_dim=4,
        rotary="decoupled", components=(1, 1), scale=8**-0.5, window=5, norm=True,
        key_constant=False,
    )  # fmt: skip
    layer = LatentAttention(shape, RotaryTable.of_base(4))
    x = torch.randn(2, 20, 32)
    out = layer(x)[0]
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    layer.mode = "absorbed"
    torch.testing.assert_close(layer(x)[0], out, rtol=1e-4, atol=1e-5)
    moved = x.clone()
    moved[:, :10] += 1
    assert torch.equal(layer(moved)[0][:, 14:], layer(x)[0][:, 14:])  # the window's end
    assert not torch.equal(layer(moved)[0][:, 13], layer(x)[0][:, 13])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rank": 200}, "rank=200: wanted at most 128"),
        ({"rotary_dim": 7}, "rotary_dim=7"),
        ({"kv_heads": 3}, "kv_heads=3: wanted a divisor of 8"),
        ({"rotary": "none"}, "rotary='none'"),
        ({"components": (1,)}, "components"),
        ({"rank": 2.5}, "rank=2.5: wanted an integer"),
    ],
)
def test_impossible_shapes_are_refused(change, match):
    values = {"hidden_size": 32, "heads": 8, "kv_heads": 8, "head_dim": 8, "value_dim": 8}
    with pytest.raises(FlashHeadError, match=match):
        LatentShape(**{**values, "rank": 12, "rotary_dim": 4, **change})


def test_what_cannot_be_converted_is_refused():
    from transformers import CohereConfig, CohereForCausalLM, GPT2Config, GPT2LMHeadModel

    options = LatentOptions()
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 99}
    cohere = CohereForCausalLM(CohereConfig(**sizes, intermediate_size=32))
    with pytest.raises(FlashHeadError, match="computes something else"):
        make_latent(cohere, options, windows(), progress=False)  # interleaved rotary
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=99))
    with pytest.raises(FlashHeadError, match="no attention with q_proj"):
        make_latent(gpt2, options, windows(), progress=False)
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(FlashHeadError, match="rotary type 'dynamic'"):
        converted("gqa", 2.0, rope_parameters=dynamic)
    with pytest.raises(FlashHeadError, match="calibration text of 20 tokens"):
        make_latent(tiny("gqa"), options, [torch.arange(20)], progress=False)
    model, _ = converted("gqa", 2.0)
    with pytest.raises(FlashHeadError, match="latent attention already"):
        make_latent(model, options, windows(), progress=False)
    with pytest.raises(FlashHeadError, match="kv_ratio"):
        converted("gqa", 900.0)


@pytest.mark.parametrize(
    "values",
    [{"kv_ratio": 0.5}, {"kv_dtype": "int3"}, {"ranks": "x"}, {"calibration_tokens": 3}],
)
def test_options_are_checked(values):
    with pytest.raises(FlashHeadError, match=next(iter(values))):
        LatentOptions(**values)
