"""Selecting cached tokens by a scan: the choice, its recall where it is known, decode steps."""

import itertools

import numpy as np
import pytest
import torch
from latent_models import ids, tiny, windows

from flashhead.convert.latent import make_latent
from flashhead.errors import FlashHeadError
from flashhead.integrations.latent_cache import LatentCache
from flashhead.integrations.latent_model import latent_modules, serve_latents
from flashhead.nn.token_store import StoreOptions, TokenStore
from flashhead.ops.latent_select import codes, reference
from flashhead.ops.latent_select.api import estimate, latent_select
from flashhead.ops.latent_select.codes import KeyCodes
from flashhead.ops.latent_select.options import SelectOptions
from flashhead.options_latent import LatentOptions

CASES = [
    *itertools.product(["gqa", "biases", "gemma3", "partial-rotary"], ["rebuilt", "decoupled"]),
    ("qwen3", "rebuilt"),
]
STORES = [StoreOptions(), StoreOptions("int8", 16, 3, 5), StoreOptions("int4", 16, 0, 4)]
FEW = SelectOptions(tokens=12, block=2, bits=4, first=2, last=4)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moved(keys, device):
    return KeyCodes(keys.codes.to(device), keys.scale.to(device), keys.dim, keys.bits)


def full(lengths):
    return torch.tensor(lengths, dtype=torch.int32)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("dim", [64, 96, 7])
def test_codes_are_unbiased_and_as_good_as_max_says(bits, dim):
    """Codes in the wrong order, a scale that shrinks scores, a rotation that is none."""
    keys = normal(3000, dim) * torch.logspace(-3, 3, 3000)[:, None]
    held = KeyCodes.of(keys[None, :, None], bits)
    turn = codes.rotation(dim, keys.device)
    torch.testing.assert_close(turn @ turn.T, torch.eye(dim), atol=1e-5, rtol=0)
    back = held.read()[0, :, 0] @ turn.T
    length = keys.square().sum(-1)
    # float16 scales round by 2^-11
    torch.testing.assert_close((back * keys).sum(-1), length, rtol=2**-10, atol=0)
    if dim > 7:
        # Max's error of a Gaussian number, D; an unbiased code has D / (1 - D)
        loss = {1: 0.3634, 2: 0.1188, 4: 0.01154}[bits]
        error = ((back - keys).square().sum(-1) / length).mean()
        assert abs(error / (loss / (1 - loss)) - 1) < 0.1
    assert held.token_bytes == -(-dim * bits // 8) + 2


@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_kernel_scans_as_the_reference(bits, impl):
    """Bytes of another group, heads in another order, the rest of a task left out, memory of
    another row.
    """
    if impl == "triton":
        pytest.importorskip("triton")
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    # on tensor cores queries are float16: half a unit in the last place, of sums of dim products
    tolerance = 1e-5 if impl == "cpu" else 2**-11
    for batch, heads, groups, tokens, dim in (
        (1, 9, 3, 1100, 64),
        (3, 4, 4, 37, 20),
        (2, 8, 1, 5, 7),
    ):
        keys = KeyCodes.of(normal(batch, tokens, groups, dim, seed=1), bits)
        query = normal(batch, heads, dim, seed=2)
        wanted = reference.estimate(query, keys, 0.3)
        lengths = keys.read().norm(dim=-1).amax() * query.norm(dim=-1).amax() * 0.3
        found = estimate(query.to(device), moved(keys, device), scale=0.3, impl=impl).cpu()
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * float(lengths))
        # views of a store with room
        roomy = torch.cat((keys.codes, keys.codes), 1)[:, :tokens]
        scale = torch.cat((keys.scale, keys.scale), 1)[:, :tokens]
        held = moved(KeyCodes(roomy, scale, dim, bits), device)
        again = estimate(query.to(device), held, scale=0.3, impl=impl).cpu()
        torch.testing.assert_close(again, found, rtol=0, atol=0)
    if impl == "cpu":
        # bfloat16 rounds a query's numbers by 2^-9, and holds the codes exactly
        rounded = estimate(query.bfloat16(), keys, scale=0.3, impl=impl)
        torch.testing.assert_close(rounded, wanted, rtol=0, atol=2**-8 * float(lengths))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_what_stands_out_is_found(bits):
    """Attention mass that is known: each head looks at its own few tokens, which a code must not
    lose; the mass it claims is the mass that is there.
    """
    heads, tokens, dim = 4, 2000, 64
    keys, query = normal(1, tokens, 1, dim), normal(1, heads, dim, seed=3)
    needles = torch.tensor([[300, 301], [777, 1500], [42, 43], [1200, 9]])
    for head, places in enumerate(needles):
        keys[0, places, 0] += query[0, head] * 2
    held = KeyCodes.of(keys, bits)
    options = SelectOptions(tokens=64, bits=bits, first=1, last=16)
    index, mass = latent_select(query, held, full([tokens]), scale=0.2, options=options)
    assert set(needles.flatten().tolist()) <= set(index[0].tolist())
    true = (query[0] @ keys[0, :, 0].T * 0.2).softmax(-1)
    share = true[:, index[0].long()].sum(-1)
    assert share.min() > 0.99
    assert mass[0] == pytest.approx(float(share.mean()), abs=0.01)


def test_more_bits_hold_more_mass():
    """A selection no better than chance, or worse than the best possible by more than its noise."""
    tokens, dim = 1500, 64
    keys, query = normal(8, tokens, 2, dim), normal(8, 4, dim, seed=5) * 2
    scores = query.unflatten(1, (2, -1)) @ keys.permute(0, 2, 3, 1) * 0.125
    true = scores.flatten(1, 2).softmax(-1)
    best = true.mean(1).topk(150).values.sum(-1).mean()
    found = []
    for bits in (1, 2, 4):
        options = SelectOptions(tokens=150, bits=bits, first=0, last=1)
        index, _ = latent_select(
            query, KeyCodes.of(keys, bits), full([tokens] * 8), scale=0.125, options=options
        )
        found.append(true.mean(1).gather(1, index.long()).sum(-1).mean())
    chance = 150 / tokens
    assert chance * 2 < found[0] < found[1] < found[2] <= best
    assert found[2] > 0.98 * best


def chosen_by_hand(scores, length, start, options):
    """The rule in plain Python."""
    block = options.block
    weights = np.exp(scores[:, start:length] - scores[:, start:length].max(1, keepdims=True))
    weights = np.concatenate((np.zeros((len(scores), start)), weights), 1)
    mass = (weights / weights.sum(1, keepdims=True)).mean(0)
    low, high = start // block, -(-length // block)
    forced = {*range(low, min(low + options.first_blocks, high))}
    forced |= {*range(max(low, high - options.last_blocks), high)}
    order = sorted(
        set(range(low, high)) - forced, key=lambda b: -mass[b * block : (b + 1) * block].sum()
    )
    blocks = sorted([*forced, *order[: options.blocks - len(forced)]])
    places = [t for b in blocks for t in range(b * block, (b + 1) * block)]
    return [t for t in places if start <= t < length], mass


@pytest.mark.parametrize("block", [1, 4, 16])
def test_the_rule_by_hand(block):
    """Rows of unequal lengths, starts inside a block, rows shorter than the selection, a bias of
    one head, a last block that is cut.
    """
    options = SelectOptions(tokens=64, block=block, bits=4, first=3, last=5)
    lengths, starts = [333, 20, 70, 1], [7, 0, 19, 0]
    keys, query = KeyCodes.of(normal(4, 333, 2, 16), 4), normal(4, 6, 16, seed=1) * 3
    bias = normal(4, 6, 333, seed=2)
    index, mass = latent_select(
        query,
        keys,
        full(lengths),
        scale=0.5,
        options=options,
        starts=full(starts),
        bias=bias,
        impl="reference",
    )
    assert index.shape == (4, 64)
    scores = (reference.estimate(query, keys, 0.5) + bias).double().numpy()
    for row in range(4):
        wanted, weights = chosen_by_hand(scores[row], lengths[row], starts[row], options)
        assert [t for t in index[row].tolist() if t >= 0] == wanted
        assert mass[row] == pytest.approx(weights[wanted].sum(), abs=1e-5)


def test_a_hidden_token_is_not_worth_reading():
    """A mask that the scan forgets."""
    keys, query = normal(1, 100, 1, 16), normal(1, 2, 16, seed=1)
    keys[0, 50, 0] = query[0, 0] * 9
    bias = torch.zeros(1, 1, 100)
    options = SelectOptions(tokens=20, first=0, last=1)
    held = KeyCodes.of(keys, 2)
    index, _ = latent_select(query, held, full([100]), scale=1.0, options=options, bias=bias)
    assert 50 in index
    bias[..., 50] = -torch.inf
    index, _ = latent_select(query, held, full([100]), scale=1.0, options=options, bias=bias)
    assert 50 not in index


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"tokens": 0}, "tokens=0: wanted an integer, 1 or more"),
        ({"tokens": 2.0}, "tokens=2.0"),
        ({"bits": 3}, "bits=3: wanted 1, 2 or 4"),
        ({"block": 12, "tokens": 120}, "block=12: wanted a power of two"),
        ({"block": 512, "tokens": 1024}, "block=512: wanted a power of two, 256 at most"),
        ({"block": 16, "tokens": 100}, "tokens=100: wanted a multiple of block=16"),
        ({"tokens": 17}, "wanted more than the first 1 and the last 16"),
        ({"last": 0}, "last=0: wanted an integer, 1 or more"),
    ],
)
def test_bad_options(values, said):
    with pytest.raises(FlashHeadError, match=said):
        SelectOptions(**values)


def test_bad_arguments():
    """Something that does not fit, computed with."""
    keys, options = KeyCodes.of(normal(2, 40, 2, 16), 2), SelectOptions(tokens=20)
    query, lengths = normal(2, 4, 16), full([40, 40])
    for wrong, said in (
        ({"query": normal(2, 3, 16)}, "a multiple of 2 heads, 16"),
        ({"query": normal(2, 4, 12)}, "query is"),
        ({"lengths": torch.tensor([40, 40])}, "lengths is torch.int64"),
        ({"starts": torch.tensor([0, 0])}, "starts is torch.int64"),
        ({"bias": torch.zeros(2, 1, 30)}, "bias is"),
        ({"impl": "fast"}, "impl='fast'"),
    ):
        given = {"query": query, "lengths": lengths} | wrong
        with pytest.raises(FlashHeadError, match=said):
            latent_select(given.pop("query"), keys, scale=1.0, options=options, **given)
    with pytest.raises(FlashHeadError, match="key codes are"):
        KeyCodes(keys.codes, keys.scale, 17, 2)
    with pytest.raises(FlashHeadError, match="bits=3"):
        KeyCodes.of(normal(1, 4, 1, 8), 3)


def test_a_store_gives_some_of_its_tokens():
    """Tokens of another run, of another row, at a border between runs."""
    x, index = normal(3, 40, 32), torch.randint(0, 40, (3, 25))
    index[:, :6] = torch.tensor([0, 2, 3, 34, 35, 39])
    mixed = TokenStore(StoreOptions("mixed", exact_first=1), (8, 8, 16))
    for store in (*map(TokenStore, STORES), TokenStore(StoreOptions("fp8", 16, 2, 0)), mixed):
        store.append(x)
        wanted = store.read().gather(1, index[..., None].expand(-1, -1, 32))
        assert torch.equal(store.take(index), wanted)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def model(request):
    family, rotary = request.param
    made = tiny(family)
    make_latent(made, LatentOptions(kv_ratio=1.5, rotary=rotary), windows(), progress=False)
    serve_latents(made, StoreOptions())
    return made


@torch.no_grad()
def steps(model, cache, tokens, mask=None, prefill=17):
    """Logits of a prefill, and of each token after it."""
    parts = []
    for a, b in itertools.pairwise([0, *range(prefill, tokens.shape[1] + 1)]):
        more = {} if mask is None else {"attention_mask": mask[:, :b]}
        parts.append(model(tokens[:, a:b], past_key_values=cache, **more).logits[:, -1])
    return torch.stack(parts)


def select_everything(monkeypatch):
    """Every step goes the selecting way, and selects all that is seen."""
    from flashhead.nn import latent_select as steps_of

    ran = []

    def everything(query, keys, lengths, *, options, starts=None, **more):
        ran.append(len(query))
        whole = SelectOptions(tokens=64, bits=options.bits, first=1, last=1)
        return latent_select(query, keys, lengths, options=whole, starts=starts, **more)

    monkeypatch.setattr(steps_of, "latent_select", everything)
    return ran


def record_choices(monkeypatch):
    """Indexes that steps chose."""
    from flashhead.nn import latent_select as steps_of

    chosen = []

    def recorded(*arguments, **more):
        index, mass = latent_select(*arguments, **more)
        chosen.append(index)
        return index, mass

    monkeypatch.setattr(steps_of, "latent_select", recorded)
    return chosen


@pytest.mark.parametrize("options", STORES, ids=lambda options: f"{options.kind}{options.group}")
def test_everything_selected_is_full_attention(options, model, monkeypatch):
    """An index off by one, angles of another token, a constant key that does not turn, a window
    that is cut, a token that is counted twice.
    """
    tokens = ids(2, 30)
    wanted = steps(model, LatentCache(model, options), tokens)
    ran = select_everything(monkeypatch)
    found = steps(model, LatentCache(model, options, select=FEW), tokens)
    assert len(ran) == 13 * sum(m.shape.window is None for m in latent_modules(model).values())
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)


def test_padding(model, monkeypatch):
    """A padded token that is seen or counted among the first ones; rows that disturb each other."""
    tokens = ids(2, 30)
    mask = torch.ones_like(tokens)
    mask[0, :6] = 0
    tokens[0, :6] = 0
    whole = steps(model, LatentCache(model), tokens, mask, prefill=20)
    chosen = record_choices(monkeypatch)
    found = steps(model, LatentCache(model, select=FEW), tokens, mask, prefill=20)
    assert not torch.allclose(found, whole, rtol=1e-3, atol=1e-3)
    for index in chosen:
        padded, other = (set(row.tolist()) - {-1} for row in index)
        assert min(padded) == 6
        assert {6, 7} <= padded
        assert {0, 1} <= other
        assert max(padded) == max(other)
        assert len(padded) >= FEW.tokens - 1
    monkeypatch.undo()
    select_everything(monkeypatch)
    found = steps(model, LatentCache(model, select=FEW), tokens, mask, prefill=20)
    torch.testing.assert_close(found, whole, rtol=2e-3, atol=2e-3)


def test_a_step_reads_its_selection_only(model):
    """Tokens that were not selected change nothing: they are overwritten before they are read."""
    cache = LatentCache(model, select=FEW)
    steps(model, cache, ids(1, 29))
    layers = [layer for layer in cache.layers if hasattr(layer, "select")]
    given = [layer.take for layer in layers]

    def poisoned(layer, take):
        def taken(index):
            for store in layer.stores:
                if store.parts:
                    kept = store.take(index)
                    store.parts["last"].fill_(torch.nan)
                    rows = torch.arange(len(index))[:, None]
                    store.parts["last"][rows, index] = kept
            return take(index)

        return taken

    for layer, take in zip(layers, given, strict=True):
        layer.take = poisoned(layer, take)
    with torch.no_grad():
        assert model(ids(1, 1), past_key_values=cache).logits.isfinite().all()
    assert any(layer.stores[0].read().isnan().any() for layer in layers)


def test_generate_crop_beams_and_files(model, tmp_path):
    """Codes that stay behind when tokens are taken back, rows change places or a cache is saved."""
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    wanted = model.generate(ids(2, 20), past_key_values=LatentCache(model, select=FEW), **options)
    model.latent_select = FEW
    try:
        assert torch.equal(model.generate(ids(2, 20), **options), wanted)
        beams = model.generate(ids(2, 20), num_beams=2, **options)
        assert beams.shape == (2, 28)
    finally:
        del model.latent_select
    cache, before = (LatentCache(model, select=FEW) for _ in range(2))
    cache.activate_past_recording()
    with torch.no_grad():
        model(ids(2, 20)[:, :19], past_key_values=before)
        model(ids(2, 20)[:, :19], past_key_values=cache)
        for token in ids(2, 4, seed=9).split(1, 1):
            model(token, past_key_values=cache)
    cache.crop(-4)
    cache.save(tmp_path / "cache.safetensors")
    again = LatentCache(model, select=FEW)
    again.restore(tmp_path / "cache.safetensors")
    # the prompt's last token is a decode step here, so it reads its selection too
    wanted = model.generate(ids(2, 20), past_key_values=before, **options)
    assert torch.equal(model.generate(ids(2, 20), past_key_values=cache, **options), wanted)
    assert torch.equal(model.generate(ids(2, 20), past_key_values=again, **options), wanted)
    with pytest.raises(FlashHeadError, match="kept as"):
        LatentCache(model).restore(tmp_path / "cache.safetensors")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", STORES, ids=lambda options: f"{options.kind}{options.group}")
def test_on_a_gpu(options, model, monkeypatch):
    """Steps on a GPU in bfloat16 that differ from full attention although all is selected."""
    on_gpu = model.to("cuda", torch.bfloat16)
    try:
        tokens = ids(2, 30).cuda()
        wanted = steps(on_gpu, LatentCache(on_gpu, options), tokens)
        ran = select_everything(monkeypatch)
        found = steps(on_gpu, LatentCache(on_gpu, options, select=FEW), tokens)
        assert ran
        assert (found - wanted).norm() <= 0.03 * wanted.norm()
    finally:
        model.to("cpu", torch.float32)


def test_codes_are_counted(model):
    """Bytes that no one counts."""
    plain, selecting = LatentCache(model, reserve=0), LatentCache(model, reserve=0, select=FEW)
    for cache in (plain, selecting):
        steps(model, cache, ids(2, 17))
    more = sum(
        layer.scanned().token_bytes * 2 * 17
        for layer in selecting.layers
        if hasattr(layer, "select")
    )
    assert selecting.bytes_held() - plain.bytes_held() == more > 0


def test_what_cannot_select_says_so():
    """A choice that is silently not made."""
    made = tiny("mistral")
    make_latent(made, LatentOptions(kv_ratio=1.5), windows(), progress=False)
    with pytest.raises(FlashHeadError, match="every layer has a window"):
        LatentCache(made, select=FEW)
    made = tiny("gqa")
    make_latent(made, LatentOptions(kv_ratio=1.5), windows(), progress=False)
    for module in latent_modules(made).values():
        module.mode = "materialised"
    with pytest.raises(FlashHeadError, match="select with mode='materialised'"), torch.no_grad():
        made(ids(1, 20), past_key_values=LatentCache(made, select=FEW))
    with pytest.raises(FlashHeadError, match="codes of 0 keys for 1 tokens"):
        LatentCache(made, select=FEW).update(torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1, 0), 0)
