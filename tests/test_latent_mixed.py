"""Latents in 8, 4 and 2 bits a number: codes, who gets how many, bytes a cache holds."""

import math

import pytest
import torch
from latent_models import ids, tiny, windows

from flashhead.convert.latent import make_latent
from flashhead.convert.latent_bits import choose_bits, lost_nats
from flashhead.convert.latent_factors import Piece
from flashhead.errors import FlashHeadError
from flashhead.integrations.latent_cache import LatentCache, RoundedCache
from flashhead.integrations.latent_model import latent_modules, serve_latents, store_of
from flashhead.nn.mixed_bits import BITS, LOSS, STEPS, code_bytes, decode, encode
from flashhead.nn.token_store import StoreOptions, TokenStore, round_through
from flashhead.options_latent import LatentOptions

NONE = torch.empty(0, dtype=torch.float64)


def layer(gains):
    return [Piece(gain, None, NONE, NONE) for gain in gains]


@pytest.mark.parametrize("counts", [(8, 4, 8), (0, 6, 4), (3, 0, 0), (0, 0, 12)])
def test_codes_are_packed_as_documented(counts):
    """Fields that overlap, in the wrong order, or of another width."""
    torch.manual_seed(0)
    packed, wanted = [], []
    for bits, count in zip(BITS, counts, strict=True):
        codes = torch.randint(0, 2**bits, (count,)).tolist()
        wanted += [(code - (2**bits - 1) / 2) * STEPS[bits] for code in codes]
        for start in range(0, count, 8 // bits):
            fields = codes[start : start + 8 // bits]
            packed.append(sum(code << (bits * place) for place, code in enumerate(fields)))
    scale = torch.tensor([0.5], dtype=torch.float16)
    found = decode(torch.tensor(packed, dtype=torch.uint8), scale, counts, torch.float32)
    torch.testing.assert_close(found, 0.5 * torch.tensor(wanted))


def test_the_nearest_code_is_taken():
    """A code one off, or a scale that is not the vector's."""
    x = torch.randn(200, 24, generator=torch.Generator().manual_seed(0))
    codes, scale = encode(x, (8, 8, 8))
    off = (decode(codes, scale, (8, 8, 8), torch.float32) - x).abs() / scale.float()
    for part, bits in zip(off.split(8, -1), BITS, strict=True):
        inside = part[
            (x / scale).split(8, -1)[BITS.index(bits)].abs() < 2 ** (bits - 1) * STEPS[bits]
        ]
        assert inside.max() <= STEPS[bits] / 2 + 1e-5


@pytest.mark.parametrize(
    ("bits", "counts"), [(8, (1024, 0, 0)), (4, (0, 1024, 0)), (2, (0, 0, 1024))]
)
def test_the_loss_of_a_gaussian_is_as_stated(bits, counts):
    """Steps or losses mistaken would give directions the wrong widths."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 1024, generator=generator)
    error = (decode(*encode(x, counts), counts, torch.float32) - x).square().mean()
    assert float(error) == pytest.approx(LOSS[bits], rel=0.02)


def test_a_larger_token_loses_no_more():
    """A token ten times as large would be clipped without a scale of its own."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 100, 16, generator=generator)
    x[:, 3] *= 10
    found = decode(*encode(x, (0, 16, 0)), (0, 16, 0), torch.float32)
    shares = ((found - x).square().sum(-1) / x.square().sum(-1))[0]
    assert shares[3] < 4 * shares.median()


@pytest.mark.parametrize("ranks", ["budget", "uniform"])
@pytest.mark.parametrize("budget", [40, 120, 500])
def test_bits_spend_their_budget_and_nothing_beats_them(ranks, budget):
    """Against every other choice of widths for a small case."""
    gains = [[2.0 ** -(i * rate) for i in range(24)] for rate in (0.3, 0.9)]
    layers = [layer(g) for g in gains]
    counts = choose_bits(layers, [budget, budget], ranks, 4)
    spent = [16 + sum(n * b for n, b in zip(own, BITS, strict=True)) for own in counts]
    assert sum(spent) <= 2 * budget
    if ranks == "uniform":
        assert max(spent) <= budget
        return
    lost = sum(lost_nats(own, c) for own, c in zip(layers, counts, strict=True))
    # the other choices that spend no more: all multiples of 4 of each width, both layers
    options = [
        [
            (16 + 4 * (8 * a + 4 * b + 2 * c), lost_nats(own, (4 * a, 4 * b, 4 * c)))
            for a in range(7)
            for b in range(7 - a)
            for c in range(7 - a - b)
        ]
        for own in layers
    ]
    best = min(
        (x[1] + y[1] for x in options[0] for y in options[1] if x[0] + y[0] <= sum(spent)),
    )
    assert lost <= best * (1 + 1e-9) or math.isclose(lost, best)


def test_too_small_a_budget():
    with pytest.raises(FlashHeadError, match="kv_ratio: a layer would keep 20 bits"):
        choose_bits([layer([1.0] * 8)], [20], "budget", 4)


@pytest.fixture(scope="module")
def mixed():
    model = tiny("gqa").bfloat16()
    report = make_latent(
        model, LatentOptions(kv_ratio=4.0, kv_dtype="mixed"), windows(), progress=False
    )
    serve_latents(model, store_of("mixed"))
    return model, report


@torch.no_grad()
def test_the_cache_holds_what_was_asked(mixed):
    """A quarter of a bf16 cache's bytes, beside the first token: counted in storage."""
    model, report = mixed
    tokens = ids(2, 40)
    cache, base = LatentCache(model), RoundedCache(model.config, StoreOptions())
    model(tokens, past_key_values=cache, use_cache=True)
    plain = tiny("gqa").bfloat16()
    plain(tokens, past_key_values=base, use_cache=True)
    counts = [m.shape.counts for m in latent_modules(model).values()]
    first = 2 * sum(2 * sum(own) for own in counts)
    assert cache.bytes_held() == first + 2 * 39 * sum(code_bytes(own) + 2 for own in counts)
    assert report["bytes_ratio"] >= 4
    assert (cache.bytes_held() - first) * 4 <= base.bytes_held()
    assert len(set(counts)) > 1 or counts[0][0] != sum(counts[0])


@torch.no_grad()
def test_training_rounds_as_the_cache_does(mixed):
    """Healing that trains for other numbers than the cache will give."""
    model, _ = mixed
    tokens = ids(2, 40)
    served = model(tokens, past_key_values=LatentCache(model), use_cache=True).logits
    exact = model(tokens, use_cache=False).logits
    for module in latent_modules(model).values():
        module.rounding = store_of("mixed")
    try:
        trained = model(tokens, use_cache=False).logits
    finally:
        for module in latent_modules(model).values():
            module.rounding = None
    assert (trained - served).abs().max() < 0.25 * (exact - served).abs().max()


def test_gradients_pass_through_rounding():
    x = torch.randn(1, 5, 16, requires_grad=True)
    options = StoreOptions("mixed", exact_first=1)
    rounded = round_through(x, options, (4, 8, 4))
    rounded.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(rounded[:, 0], x[:, 0])
    store = TokenStore(options, (4, 8, 4))
    store.append(x.detach())
    torch.testing.assert_close(store.read(), rounded.detach(), atol=1e-6, rtol=0)


def test_latents_of_another_kind_are_refused():
    model = tiny("gqa")
    make_latent(model, LatentOptions(kv_ratio=2.0), windows(), progress=False)
    with pytest.raises(FlashHeadError, match="converted for it"):
        LatentCache(model, StoreOptions("mixed"))
    with pytest.raises(FlashHeadError, match="rebuilt"):
        LatentOptions(kv_dtype="mixed", rotary="decoupled")


@pytest.mark.parametrize("family", ["biases", "qwen3", "gemma3", "partial-rotary"])
@torch.no_grad()
def test_eight_bits_of_every_family_change_little(family):
    """Biases, normed keys, windows: a mean or a scale that is lost only when numbers are coded."""
    exact = tiny(family)
    tokens = ids(2, 40)
    wanted = exact(tokens, use_cache=False).logits
    off = {}
    for ratio, kind in ((2.0, "mixed"), (2.0, "bf16"), (1.0, "int4")):
        model = tiny(family)
        options = LatentOptions(kv_ratio=ratio, kv_dtype=kind)
        make_latent(model, options, windows(), progress=False)
        serve_latents(model, store_of(kind))
        found = model(tokens, past_key_values=LatentCache(model), use_cache=True).logits
        off[kind] = float((found - wanted).square().mean())
    assert off["mixed"] < off["int4"]
    assert off["mixed"] < off["bf16"]
