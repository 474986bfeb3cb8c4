"""The cache holds what it says: bytes are counted in storage, not claimed."""

import pytest
import torch
from latent_models import ids, tiny, windows
from transformers import StaticCache

from flashhead.convert.latent import make_latent
from flashhead.errors import FlashHeadError
from flashhead.integrations.latent_cache import LatentCache, RoundedCache
from flashhead.integrations.latent_model import latent_modules, serve_latents
from flashhead.nn.token_store import StoreOptions, TokenStore, bytes_per_token
from flashhead.ops.latent_decode.rows import dequantize, quantize
from flashhead.options_latent import LatentOptions


@pytest.fixture(scope="module")
def latent_model():
    model = tiny("gqa").bfloat16()
    make_latent(model, LatentOptions(kv_ratio=2.0), windows(), progress=False)
    serve_latents(model, StoreOptions())
    return model


@pytest.fixture(scope="module")
def float_model():
    model = tiny("gqa")
    make_latent(model, LatentOptions(kv_ratio=2.0), windows(), progress=False)
    serve_latents(model, StoreOptions())
    return model


@pytest.fixture(scope="module")
def windowed_model():
    model = tiny("gemma3")
    make_latent(model, LatentOptions(kv_ratio=2.0), windows(), progress=False)
    serve_latents(model, StoreOptions())
    return model


def storage_bytes(cache):
    """Counted anew, from tensors."""
    return sum(
        part.untyped_storage().nbytes()
        for layer in cache.layers
        for store in layer.stores
        for part in store.parts.values()
    )


@torch.no_grad()
def filled(model, cache, tokens):
    model(tokens, past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.parametrize("width", [1, 6, 64, 100, 192])
@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
def test_rounding_is_within_half_a_step(kind, width):
    """Catches nibbles in the wrong order, scales of the wrong group, padding that leaks."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, width, generator=generator) * torch.logspace(-3, 2, 5)[:, None]
    options = StoreOptions(kind, group=32)
    codes, scale = quantize(x, kind, 32)
    back = dequantize(codes, scale, width, kind, torch.float32)
    padded = torch.nn.functional.pad(x, (0, -width % min(32, width + width % 2)))
    largest = padded.unflatten(-1, (scale.shape[-1], -1)).abs().amax(-1, keepdim=True)
    steps = {"int8": 1 / 254, "int4": 1 / 14, "fp8": 1 / 28}
    # half a step of the group's largest, and the scale's own rounding to float16
    limit = (largest * (steps[kind] + 2**-10)).expand(*largest.shape[:-1], padded.shape[-1] //
                                                      scale.shape[-1]).flatten(-2)  # fmt: skip
    assert ((back - x).abs() <= limit[..., :width]).all()
    assert (codes.nbytes + scale.nbytes) / 10 == bytes_per_token(width, options)


@pytest.mark.parametrize("kind", ["bf16", "fp8", "int8", "int4"])
def test_bytes_are_in_storage(kind, latent_model):
    cache = filled(latent_model, LatentCache(latent_model, StoreOptions(kind)), ids(3, 40))
    per_token = sum(
        bytes_per_token(m.shape.rank, cache.options) for m in latent_modules(latent_model).values()
    )
    assert cache.bytes_held() == storage_bytes(cache) == 3 * 40 * per_token
    ordinary = filled(tiny("gqa").bfloat16(), RoundedCache(latent_model.config, StoreOptions()),
                      ids(3, 40))  # fmt: skip
    assert ordinary.bytes_held() == 3 * 40 * 2 * 2 * 2 * 16 * 2
    assert cache.bytes_held() <= ordinary.bytes_held() / {"bf16": 2, "fp8": 3.5, "int8": 3.5,
                                                          "int4": 6}[kind]  # fmt: skip


def test_a_windowed_layer_holds_its_window(windowed_model):
    """Catches trimming by views, which keep the whole past in memory."""
    cache = filled(windowed_model, LatentCache(windowed_model), ids(2, 60))
    for i in range(5):
        filled(windowed_model, cache, ids(2, 1, seed=i))
    held = [len(layer.stores[0]) for layer in cache.layers]
    assert held == [7, 65]
    ranks = [m.shape.rank for m in latent_modules(windowed_model).values()]
    assert storage_bytes(cache) == 4 * 2 * (7 * ranks[0] + 65 * ranks[1])


@pytest.mark.parametrize("options", [StoreOptions("int4"), StoreOptions("int8", 16, 3, 5)])
def test_exact_ends_are_exact(options):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 30, 48, generator=generator)
    store = TokenStore(options)
    for part in x.split((1, 4, 1, 20, 1, 3), 1):
        store.append(part)
    read, first, last = store.read(), options.exact_first, options.exact_last
    assert torch.equal(read[:, :first], x[:, :first])
    assert torch.equal(read[:, 30 - last :], x[:, 30 - last :])
    assert not torch.equal(read[:, first], x[:, first])
    once = TokenStore(options)
    once.append(x)
    assert torch.equal(once.read(), read)
    store.keep(2, 27)
    assert torch.equal(store.read(), read[:, 2:27])


@pytest.mark.parametrize("kind", ["bf16", "int4"])
def test_crop_reorder_save(kind, float_model, tmp_path):
    """What is cropped, reordered or restored must go on as if nothing had happened."""
    options, tokens, next_ids = StoreOptions(kind), ids(2, 20), ids(2, 1, seed=9)
    cache = filled(float_model, LatentCache(float_model, options), tokens)
    before = [layer.stores[0].read() for layer in cache.layers]
    cache.crop(-5)
    for layer, read in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.stores[0].read(), read[:, :15])
    cache.save(tmp_path / "cache.safetensors")
    again = LatentCache(float_model, options)
    again.restore(tmp_path / "cache.safetensors")
    again.reorder_cache(torch.tensor([1, 0]))
    with torch.no_grad():
        want = float_model(next_ids, past_key_values=cache).logits
        flipped = float_model(next_ids.flip(0), past_key_values=again).logits
        fresh = filled(float_model, LatentCache(float_model, StoreOptions()), tokens[:, :15])
        exact = float_model(next_ids, past_key_values=fresh).logits
    assert again.get_seq_length() == 16
    assert not torch.allclose(want[0], want[1], atol=1e-2)
    torch.testing.assert_close(flipped.flip(0), want, rtol=1e-5, atol=1e-5)
    if kind == "bf16":
        torch.testing.assert_close(want, exact, rtol=1e-4, atol=1e-4)
    with pytest.raises(FlashHeadError, match="wanted StoreOptions"):
        LatentCache(float_model, StoreOptions("fp8")).restore(tmp_path / "cache.safetensors")


def test_a_window_that_moved_on_cannot_be_cropped(windowed_model):
    cache = filled(windowed_model, LatentCache(windowed_model), ids(1, 30))
    with pytest.raises(RuntimeError, match="left these tokens behind"):
        cache.crop(-3)
    recorded = LatentCache(windowed_model)
    recorded.activate_past_recording()
    filled(windowed_model, recorded, ids(1, 30))
    recorded.crop(-3)
    fresh = filled(windowed_model, LatentCache(windowed_model), ids(1, 30)[:, :27])
    with torch.no_grad():
        one, other = (
            windowed_model(ids(1, 1), past_key_values=c).logits for c in (recorded, fresh)
        )
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_generate_uses_it(latent_model, float_model):
    """Greedy, beams and sampling; the default cache is the folder's kind."""
    latent_model.latent_store = StoreOptions("int8")
    arguments = {"max_new_tokens": 6, "eos_token_id": None, "return_dict_in_generate": True}
    try:
        for more in ({"do_sample": False}, {"num_beams": 3}, {"do_sample": True}):
            out = latent_model.generate(ids(2, 9), **arguments, **more)
            assert isinstance(out.past_key_values, LatentCache)
            assert out.past_key_values.options.kind == "int8"
            assert out.sequences.shape == (2, 15)
        with torch.no_grad():
            direct = latent_model(ids(1, 5), use_cache=True).past_key_values
        assert isinstance(direct, LatentCache)
    finally:
        latent_model.latent_store = StoreOptions()
    beams = float_model.generate(ids(2, 9), num_beams=3, use_cache=False, **arguments)
    cached = float_model.generate(ids(2, 9), num_beams=3, **arguments)
    assert torch.equal(beams.sequences, cached.sequences)


def test_another_cache_of_fixed_size_is_refused(latent_model):
    cache = StaticCache(latent_model.config, max_cache_len=16)
    with pytest.raises(FlashHeadError, match="wanted a LatentCache, StaticLatentCache"):
        latent_model.generate(ids(1, 5), max_new_tokens=3, past_key_values=cache)


def test_a_model_without_latents_has_no_latent_cache():
    with pytest.raises(FlashHeadError, match="no latent attention"):
        LatentCache(tiny("gqa"))


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
def test_rounded_cache_of_an_ordinary_model(kind):
    """The baseline: close to the exact cache, and closer with more bits."""
    model, tokens = tiny("gqa"), ids(2, 40)
    with torch.no_grad():
        want = model(tokens, use_cache=False).logits[:, -1]
        cache = RoundedCache(model.config, StoreOptions(kind, group=16))
        model(tokens[:, :-1], past_key_values=cache)
        got = model(tokens[:, -1:], past_key_values=cache).logits[:, -1]
    error = float((got - want).norm() / want.norm())
    assert 0 < error < {"fp8": 0.1, "int8": 0.02, "int4": 0.3}[kind]
