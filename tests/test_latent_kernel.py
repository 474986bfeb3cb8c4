"""Decode steps through `ops.latent_decode` against the eager absorbed form, on real caches."""

import dataclasses
import itertools

import pytest
import torch
from latent_models import ids, tiny, windows

from flashhead.convert.latent import make_latent
from flashhead.errors import FlashHeadError
from flashhead.integrations.latent_cache import LatentCache
from flashhead.integrations.latent_model import latent_modules, serve_latents
from flashhead.nn import latent_kernel
from flashhead.nn.token_store import StoreOptions, TokenStore
from flashhead.options_latent import LatentOptions

CASES = [
    *itertools.product(["gqa", "biases", "gemma3", "partial-rotary"], ["rebuilt", "decoupled"]),
    ("qwen3", "rebuilt"),
]
STORES = [
    StoreOptions(),
    StoreOptions("bf16", exact_first=3),
    StoreOptions("int8", 16, 3, 5),
    StoreOptions("int4", 16, 0, 4),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def model(request):
    family, rotary = request.param
    made = tiny(family)
    options = LatentOptions(kv_ratio=1.5, rotary=rotary)
    make_latent(made, options, windows(), progress=False)
    serve_latents(made, StoreOptions())
    return made


@torch.no_grad()
def steps(model, mode, cache, tokens, mask=None, prefill=11):
    """Logits of a prefill, and of each token after it."""
    for module in latent_modules(model).values():
        module.mode = mode
    parts = []
    for a, b in itertools.pairwise([0, *range(prefill, tokens.shape[1] + 1)]):
        more = {} if mask is None else {"attention_mask": mask[:, :b]}
        parts.append(model(tokens[:, a:b], past_key_values=cache, **more).logits[:, -1])
    return torch.stack(parts)


@pytest.mark.parametrize("options", STORES, ids=lambda options: f"{options.kind}{options.group}")
def test_as_the_eager_form(options, model):
    """A run of the cache left out or counted twice, a window that is off by one, an index that
    forgets what the window dropped, a constant key that does not turn, a head of another group.
    """
    wanted = steps(model, "absorbed", LatentCache(model, options), ids(2, 30))
    for reserve in (0, 7):
        cache = LatentCache(model, options, reserve)
        found = steps(model, "kernel", cache, ids(2, 30))
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)


def test_padding(model):
    """A padded token that is seen."""
    tokens = ids(2, 24)
    mask = torch.ones_like(tokens)
    mask[0, :6] = 0
    tokens[0, :6] = 0
    wanted = steps(model, "absorbed", LatentCache(model), tokens, mask)
    found = steps(model, "kernel", LatentCache(model), tokens, mask)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    alone = steps(model, "kernel", LatentCache(model), tokens[:1, 6:], prefill=5)
    torch.testing.assert_close(found[:, :1], alone, rtol=1e-3, atol=1e-3)


def test_generate_and_go_back(model):
    """Tokens that stay after they were taken back, where there was room for them."""
    for module in latent_modules(model).values():
        module.mode = "kernel"
    cache = LatentCache(model, StoreOptions(), 16)
    cache.activate_past_recording()
    arguments = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    wanted = model.generate(ids(1, 12), **arguments)
    with torch.no_grad():
        model(ids(1, 12)[:, :11], past_key_values=cache)
        for token in ids(1, 4, seed=9).split(1, 1):
            model(token, past_key_values=cache)
        cache.crop(-4)
        found = model.generate(ids(1, 12), past_key_values=cache, **arguments)
    assert torch.equal(found, wanted)


def test_mode_is_never_ignored(model):
    """The eager form where the kernel was asked for."""
    from transformers import DynamicCache

    modules = list(latent_modules(model).values())
    for module in modules:
        module.mode = "kernel"
    with pytest.raises(FlashHeadError, match="wanted a LatentCache"), torch.no_grad():
        model(ids(1, 1), past_key_values=DynamicCache())
    cache = LatentCache(model)
    cache.options = dataclasses.replace(cache.options, kind="mixed")
    with pytest.raises(FlashHeadError, match="kept as 'mixed'"), torch.no_grad():
        model(ids(1, 1), past_key_values=cache)
    modules[0].mode = "fast"
    with pytest.raises(FlashHeadError, match="mode='fast'"), torch.no_grad():
        model(ids(1, 1), past_key_values=LatentCache(model))


def test_room_is_counted_and_filled():
    """Tokens written over, memory that is not counted, a copy although there is room."""
    x = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0))
    for options in STORES:
        plain, roomy = TokenStore(options), TokenStore(options, reserve=8)
        for part in x.split((3, 1, 1, 20, 1, 14), 1):
            plain.append(part)
            roomy.append(part)
            assert torch.equal(plain.read(), roomy.read())
        joined = torch.cat([run.read(torch.float32) for run in roomy.rows()], 1)
        assert torch.equal(joined, plain.read())
    store = TokenStore(StoreOptions(), reserve=8)
    store.append(x[:, :4])
    place = store.parts["last"].data_ptr()
    assert store.bytes_held() == 2 * (4 + 8) * 16 * 4
    store.append(x[:, 4:12])
    assert store.parts["last"].data_ptr() == place
    store.append(x[:, 12:13])
    assert store.parts["last"].data_ptr() != place
    store.keep(0, 5)
    assert store.bytes_held() == 2 * 5 * 16 * 4


def test_merge_of_runs():
    """A run without tokens that counts, or inf - inf."""
    generator = torch.Generator().manual_seed(0)
    scores, values = torch.randn(2, 3, 9, generator=generator), torch.randn(2, 9, 4)
    wanted = scores.softmax(-1) @ values
    parts = []
    for a, b in ((0, 4), (4, 5), (5, 9)):
        own = scores[..., a:b]
        parts.append((own.softmax(-1) @ values[:, a:b], own.logsumexp(-1)))
    parts.append((torch.zeros(2, 3, 4), torch.full((2, 3), -torch.inf)))
    torch.testing.assert_close(latent_kernel.merge(parts), wanted)
    assert not latent_kernel.merge(parts[-1:] * 2).any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", STORES, ids=lambda options: f"{options.kind}{options.group}")
def test_on_a_gpu(options, model):
    """Kernels that differ from the eager form on a GPU in bfloat16."""
    on_gpu = model.to("cuda", torch.bfloat16)
    try:
        tokens = ids(2, 30).cuda()
        exact = steps(on_gpu, "absorbed", LatentCache(on_gpu, options), tokens)
        found = steps(on_gpu, "kernel", LatentCache(on_gpu, options), tokens)
        assert (found - exact).norm() <= 0.03 * exact.norm()
    finally:
        model.to("cpu", torch.float32)
