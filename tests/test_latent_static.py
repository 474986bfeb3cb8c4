"""Steps over a cache of fixed size against the cache that grows: same numbers, nothing baked in."""

import copy
import functools
import itertools

import pytest
import torch
from latent_models import ids, tiny, windows
from torch.utils._python_dispatch import TorchDispatchMode

from flashhead.convert.latent import make_latent
from flashhead.errors import FlashHeadError
from flashhead.integrations import latent_graph
from flashhead.integrations.latent_cache import LatentCache
from flashhead.integrations.latent_model import latent_modules, serve_latents, store_of
from flashhead.integrations.latent_static import StaticLatentCache
from flashhead.nn import latent, latent_step
from flashhead.nn.graphs import GraphCache
from flashhead.nn.token_rooms import TokenRooms
from flashhead.nn.token_store import StoreOptions, TokenStore
from flashhead.options_latent import LatentOptions

CASES = [
    ("gqa", "rebuilt"),
    ("biases", "decoupled"),
    ("gemma3", "rebuilt"),
    ("gemma3", "decoupled"),
    ("partial-rotary", "rebuilt"),
]
STORES = [
    StoreOptions(),
    StoreOptions("fp8", 16),
    StoreOptions("int8", 16, exact_first=3),
    StoreOptions("int4", 16),
]
GREEDY = {"do_sample": False, "eos_token_id": None}


def converted(family, rotary="rebuilt"):
    made = tiny(family)
    make_latent(made, LatentOptions(kv_ratio=1.5, rotary=rotary), windows(4), progress=False)
    serve_latents(made, StoreOptions())
    return made


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def model(request):
    return converted(*request.param)


@pytest.fixture(scope="module")
def plain():
    return converted("gqa")


def kind_of(options):
    return f"{options.kind}-{options.exact_first}"


@torch.no_grad()
def logits(model, cache, tokens, mask=None, prefill=11):
    """Of a prompt, and of each token after it."""
    parts, edges = [], [0, *range(min(prefill, tokens.shape[1]), tokens.shape[1] + 1)]
    for a, b in itertools.pairwise(edges):
        more = {} if mask is None else {"attention_mask": mask[:, :b]}
        parts.append(model(tokens[:, a:b], past_key_values=cache, **more).logits[:, -1])
    return torch.stack(parts)


def padded(tokens=24, hidden=6):
    given = ids(2, tokens)
    mask = torch.ones_like(given)
    given[0, :hidden] = mask[0, :hidden] = 0
    return given, mask


@pytest.mark.parametrize("options", STORES, ids=kind_of)
def test_as_the_cache_that_grows(options, model):
    """A token at the wrong place, a window that starts one off, exact tokens counted twice or not
    at all, angles of another index; then the same in rooms that another text has filled.
    """
    cache = StaticLatentCache(model, 40, options)
    for seed in (1, 5):
        tokens = ids(2, 30, seed)
        cache.reset()
        wanted = logits(model, LatentCache(model, options), tokens)
        torch.testing.assert_close(logits(model, cache, tokens), wanted, rtol=2e-3, atol=2e-3)
        assert cache.get_seq_length() == 30


def test_exact_tokens_of_steps(plain):
    """Steps among the exact first tokens: what lies behind them is written over later."""
    options, tokens = StoreOptions("int4", 16, exact_first=20), ids(2, 30)
    wanted = logits(plain, LatentCache(plain, options), tokens)
    found = logits(plain, StaticLatentCache(plain, 30, options), tokens)
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)


def test_left_padding(model):
    """A padded token that is seen, or the padding of the text before."""
    tokens, mask = padded()
    cache = StaticLatentCache(model, 24)
    wanted = logits(model, LatentCache(model), tokens, mask)
    torch.testing.assert_close(logits(model, cache, tokens, mask), wanted, rtol=1e-3, atol=1e-3)
    cache.reset()
    whole = logits(model, LatentCache(model), tokens)
    torch.testing.assert_close(logits(model, cache, tokens), whole, rtol=1e-3, atol=1e-3)


def test_steps_never_go_the_ordinary_way(plain, monkeypatch):
    """Steps that are eager after all: the numbers would be right, and slow."""
    tokens, cache = ids(1, 14), StaticLatentCache(plain, 16)
    logits(plain, cache, tokens[:, :12])
    monkeypatch.setattr(StaticLatentCache, "update", None)
    logits(plain, cache, tokens[:, 12:], prefill=1)
    assert cache.get_seq_length() == 14


@pytest.mark.parametrize("options", [STORES[0], STORES[2]], ids=kind_of)
def test_a_recording_serves_every_length(options, model, monkeypatch):
    """A length or place that the host bakes in: a graph would repeat the step that it captured."""
    from torch.fx.experimental.proxy_tensor import make_fx

    for name in ("latent_decode", "latent_decode_rebuilt"):
        reference = functools.partial(getattr(latent_step, name), impl="reference")
        monkeypatch.setattr(latent_step, name, reference)
    tokens, mask = padded(20, 2)
    wanted = logits(model, LatentCache(model, options), tokens, mask)
    recorded = {}

    class Recorder(GraphCache):
        def __call__(self, kind, function, inputs):
            if kind not in recorded:
                function(*inputs)  # as before a capture: tables are made
                recorded[kind] = make_fx(function)(*inputs)
            return recorded[kind](*inputs)

    cache = StaticLatentCache(model, 20, options)
    cache.graphs = Recorder()
    found = logits(model, cache, tokens, mask)
    assert len(recorded) == 1
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=lambda case: "-".join(case))
def test_through_the_kernels(case, monkeypatch):
    """The step's own use of the Triton kernels: a run of another length, starts of another run."""
    made = converted(*case)
    options = StoreOptions("int8", 16, exact_first=13)
    tokens = ids(2, 16)
    wanted = logits(made, LatentCache(made, options), tokens, prefill=14)
    for name in ("latent_decode", "latent_decode_rebuilt"):
        kernel = functools.partial(getattr(latent_step, name), impl="triton")
        monkeypatch.setattr(latent_step, name, kernel)
    found = logits(made, StaticLatentCache(made, 16, options), tokens, prefill=14)
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)


def test_generate_takes_it(plain):
    """`cache_implementation` that makes another cache, a cache that is made anew, or too small."""
    settings = {"max_new_tokens": 9, **GREEDY}
    tokens, mask = padded(20, 5)
    for given in ({}, {"num_beams": 3}):
        wanted = plain.generate(tokens, attention_mask=mask, **settings, **given)
        cached = {"cache_implementation": "static", **given}
        found = plain.generate(tokens, attention_mask=mask, **settings, **cached)
        assert torch.equal(found, wanted)
    held = plain.latent_static
    assert isinstance(held, StaticLatentCache)
    assert torch.equal(
        plain.generate(ids(1, 7), cache_implementation="static", **settings),
        plain.generate(ids(1, 7), **settings),
    )
    assert plain.latent_static is held
    plain.generate(ids(1, 40), cache_implementation="static", **settings)
    assert plain.latent_static is not held
    explicit = StaticLatentCache(plain, 48)
    found = plain.generate(ids(1, 40), past_key_values=explicit, **settings)
    assert torch.equal(found, plain.generate(ids(1, 40), **settings))
    with torch.inference_mode():
        plain.generate(ids(3, 7), cache_implementation="static", **settings)
    plain.generate(ids(3, 7), cache_implementation="static", **settings)


def test_certified_greedy_takes_it():
    """A head that is asked by another loop, which forgets the cache."""
    import flashhead

    made = converted("gqa")
    settings = {"max_new_tokens": 9, **GREEDY}
    wanted = made.generate(ids(1, 12), **settings)
    with flashhead.attach(made, progress=False, calibration_tokens=256) as attachment:
        attachment.head.crossover_rows = attachment.head.token_crossover_rows = 1
        found = flashhead.generate_certified(
            made, ids(1, 12), cache_implementation="static", **settings
        )
        assert attachment.head.stats.rows > 0
    assert torch.equal(found, wanted)
    assert made.latent_static.get_seq_length() > 12


def test_going_back_and_other_rows(plain):
    """Tokens that were taken back and stay, rows that keep their old texts."""
    tokens, cache = ids(3, 20), StaticLatentCache(plain, 20)
    wanted = logits(plain, LatentCache(plain), tokens)
    logits(plain, cache, ids(3, 15, seed=7))
    cache.crop(-15)
    torch.testing.assert_close(logits(plain, cache, tokens), wanted, rtol=1e-3, atol=1e-3)
    cache.crop(-1)
    order = torch.tensor([2, 0, 1])
    cache.reorder_cache(order)
    again = logits(plain, cache, tokens[order, -1:])
    torch.testing.assert_close(again[0], wanted[-1][order], rtol=1e-3, atol=1e-3)
    cache.crop(-1)
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    again = logits(plain, cache, tokens[[0, 0], -1:])
    torch.testing.assert_close(again[0], wanted[-1][[0, 0]], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_what_a_graph_does_not_give(plain):
    """Hidden states that were asked for and are not there; embeddings that are not read."""
    tokens, cache = ids(1, 14), StaticLatentCache(plain, 14)
    logits(plain, cache, tokens[:, :13])
    given = {"past_key_values": cache, "output_hidden_states": True}
    out = plain(inputs_embeds=plain.get_input_embeddings()(tokens[:, 13:]), **given)
    wanted = plain(tokens, use_cache=False, output_hidden_states=True)
    assert len(out.hidden_states) == len(wanted.hidden_states)
    for found, one in zip(out.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(found, one[:, 13:], rtol=1e-3, atol=1e-3)


def test_mixed_latents():
    """Codes of three widths unpacked from the wrong rooms."""
    made = tiny("gqa")
    options = LatentOptions(kv_ratio=4.0, kv_dtype="mixed")
    make_latent(made, options, windows(), progress=False)
    serve_latents(made, store_of("mixed"))
    tokens = ids(2, 24)
    wanted = logits(made, LatentCache(made), tokens)
    found = logits(made, StaticLatentCache(made, 24), tokens)
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)


def test_what_it_cannot_do_is_said(plain):
    cache = StaticLatentCache(plain, 8)
    logits(plain, cache, ids(1, 8), prefill=4)
    with pytest.raises(FlashHeadError, match=r"8 \+ 1 tokens, room for 8"):
        logits(plain, cache, ids(1, 1))
    cache.reset()
    logits(plain, cache, ids(1, 4))
    with pytest.raises(FlashHeadError, match="2 rows"):
        logits(plain, cache, ids(2, 1))
    mask = torch.ones(1, 6, dtype=torch.int64)
    mask[0, 3] = 0
    with pytest.raises(FlashHeadError, match="left padding"):
        plain(ids(1, 6), attention_mask=mask, past_key_values=StaticLatentCache(plain, 8))
    with pytest.raises(FlashHeadError, match="exact_last=4"):
        StaticLatentCache(plain, 8, StoreOptions("int8", exact_last=4))
    with pytest.raises(FlashHeadError, match="no latent attention"):
        StaticLatentCache(tiny("gqa"), 8)


def test_eager_modes_are_not_ignored(plain, caplog):
    """A mode that was asked for and does not run."""
    modules = list(latent_modules(plain).values())
    tokens = ids(1, 14)
    wanted = logits(plain, LatentCache(plain), tokens)
    try:
        for module in modules:
            module.mode = "materialised"
        with caplog.at_level("WARNING", "flashhead"):
            found = logits(plain, StaticLatentCache(plain, 14), tokens)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
        assert "mode='materialised'" in caplog.text
        modules[0].mode = "kernel"
        with pytest.raises(FlashHeadError, match="mode='kernel'"):
            logits(plain, StaticLatentCache(plain, 14), tokens)
    finally:
        for module in modules:
            module.mode = "auto"


def test_a_copy_of_the_model_is_its_own(plain):
    """A copy whose steps run through the first model's weights."""
    other = copy.deepcopy(plain)
    with torch.no_grad():
        other.get_decoder().norm.weight.mul_(2)
    tokens = ids(1, 14)
    found = logits(other, StaticLatentCache(other, 14), tokens)
    wanted = logits(other, LatentCache(other), tokens)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert (found - logits(plain, StaticLatentCache(plain, 14), tokens)).norm() > 1


@pytest.mark.parametrize("kind", ["bf16", "fp8", "int8", "int4"])
def test_rooms_hold_what_a_store_holds(kind):
    """A range that begins among the exact tokens, the place behind them written over, bytes."""
    x = torch.randn(2, 40, 20, generator=torch.Generator().manual_seed(0))
    for exact in (0, 1, 16):
        options = StoreOptions(kind, 16, exact_first=exact)
        store, rooms = TokenStore(options), TokenRooms(options, 40, x)
        store.append(x)
        rooms.write(0, x[:, :9])
        for i in range(9, 30):
            rooms.write_at(torch.tensor([i]), x[:, i : i + 1])
        rooms.write(30, x[:, 30:])
        for begin, end in ((0, 40), (3, 9), (10, 40), (16, 17), (5, 5)):
            assert torch.equal(rooms.read(begin, end), store.read()[:, begin:end])
        whole = torch.cat([run.read(torch.float32) for _, run in rooms.runs()], 1)
        assert torch.equal(whole[:, :40], store.read())
        assert rooms.bytes_held() == sum(part.nbytes for part in rooms.parts.values())


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation makes."""

    found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(one, torch.Tensor):
                self.found = max(self.found, one.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("static", [False, True], ids=["grows", "static"])
def test_a_long_prompt_in_chunks(static, plain):
    """Chunks that change the answer, or memory that grows with the square of the prompt."""
    tokens = ids(1, 2048)
    settings = {"max_new_tokens": 3, **GREEDY}
    wanted = plain.generate(tokens, **settings)
    more = {"cache_implementation": "static"} if static else {}
    with Largest() as largest:
        found = plain.generate(tokens, prefill_chunk_size=64, **settings, **more)
    assert torch.equal(found, wanted)
    shape = next(iter(latent_modules(plain).values())).shape
    scores = 64 * 2112 * 4 * shape.heads  # a chunk's, in float32
    keys = 2112 * shape.kv_width * 4
    angles = 4096 * shape.rotary_dim * 4
    assert largest.found <= max(scores, keys, angles)


def test_rows_of_a_prompt_are_cut_up(plain, monkeypatch):
    """Rows mixed up where keys and values of all of them would take too much."""
    tokens, mask = padded(24, 5)
    wanted = logits(plain, LatentCache(plain), tokens, mask, prefill=24)
    monkeypatch.setattr(latent, "MATERIALISED_BYTES", 1)
    found = logits(plain, LatentCache(plain), tokens, mask, prefill=24)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", STORES, ids=kind_of)
def test_on_a_gpu(options, model, monkeypatch):
    """A graph that differs from the eager form in bfloat16, that is captured at every step, or
    that keeps what the step of its capture saw.
    """
    truth = logits(model, LatentCache(model, options), *padded(30, 5))
    on_gpu = model.to("cuda", torch.bfloat16)
    try:
        tokens, mask = (x.cuda() for x in padded(30, 5))
        for module in latent_modules(on_gpu).values():
            module.mode = "absorbed"
        eager = logits(on_gpu, LatentCache(on_gpu, options), tokens, mask).float().cpu()
        for module in latent_modules(on_gpu).values():
            module.mode = "kernel"
        runs, run = [], latent_graph._run
        monkeypatch.setattr(latent_graph, "_run", lambda *a: runs.append(1) or run(*a))
        cache = StaticLatentCache(on_gpu, 64, options)
        for _ in range(2):
            cache.reset()
            found = logits(on_gpu, cache, tokens, mask)
            # two independent roundings to bf16, and to codes, of one truth
            assert (found.float().cpu() - eager).norm() <= 2 * (eager - truth).norm()
        assert len(cache.graphs) == 1
        assert len(runs) == 2, "once to compile, once to capture; the others are replays"
    finally:
        model.to("cpu", torch.float32)
        for module in latent_modules(model).values():
            module.mode = "auto"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_generate_on_a_gpu(model):
    """`generate` that takes no graph, tokens of another cache."""
    on_gpu = model.to("cuda")
    try:
        settings = {"max_new_tokens": 20, **GREEDY}
        tokens, mask = (x.cuda() for x in padded(20, 5))
        wanted = on_gpu.generate(tokens, attention_mask=mask, **settings)
        found = on_gpu.generate(
            tokens, attention_mask=mask, cache_implementation="static", **settings
        )
        assert torch.equal(found, wanted)
        assert len(on_gpu.latent_static.graphs) == 1
    finally:
        model.to("cpu")
