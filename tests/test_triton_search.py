"""The GPU search of a codes index against the eager reference and float64.

Without a GPU the kernels run in Triton's interpreter, in float32 and float16; with one the same
tests run compiled, in bfloat16 too.
"""

import dataclasses

import pytest
import torch
from conftest import clustered_head

pytest.importorskip("triton")

from flashhead.errors import FlashHeadError
from flashhead.index.build_codes import build_codes
from flashhead.nn.device import DeviceSearch
from flashhead.nn.head import FlashHead
from flashhead.ops.cascade import reference as cascade_reference
from flashhead.ops.cascade import triton as ops
from flashhead.ops.cascade import triton_launch
from flashhead.ops.noise import reference as noise_reference
from flashhead.ops.noise import triton as noise
from flashhead.ops.scan import reference as scan_reference
from flashhead.ops.scan.query import make_plan, make_query
from flashhead.options import CodesOptions, Sampling

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
CASES = [(1280, 96, 1.25, 2), (547, 200, 1.5, 1), (333, 65, 2.5, 2), (261, 48, 1.0, 2)]
"""Rows, dimensions, bits, planes: aligned, with more tiles of the batched scan than programs; three
segments; two and an odd dimension; one. All but the first have a tail.
"""


@dataclasses.dataclass
class Case:
    weight: torch.Tensor
    hidden: torch.Tensor
    index: object
    search: DeviceSearch
    reference: object  # the index on the CPU


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request):  # type: ignore[no-untyped-def]
    rows, d, bits, planes = request.param
    weight, hidden = clustered_head(rows, d)
    return make_case(weight.float(), hidden, bits, planes)


def make_case(weight, hidden, bits=None, planes=None, bias=None):  # type: ignore[no-untyped-def]
    options = CodesOptions(bits=bits, planes=planes, kl_budget=1e-3)
    index = build_codes(weight, options, hidden.to(weight.dtype))
    moved = index.to(DEVICE)
    own_bias = None if bias is None else bias.to(DEVICE)
    search = DeviceSearch(moved, weight.to(DEVICE), own_bias)
    return Case(weight, hidden.to(weight.dtype), moved, search, index)


def truth(case, hidden):  # type: ignore[no-untyped-def]
    return hidden.double() @ case.weight.double().T


@pytest.mark.parametrize("n", [1, 9])
def test_scan_equals_the_reference(case, n):
    """A wrong coordinate, field or gain changes estimates by whole units."""
    hidden = case.hidden[:n].contiguous()
    plan = make_plan(case.reference)
    wanted = scan_reference.scan(
        make_query(hidden, case.reference, plan, 1e-6), case.reference, plan, None
    )
    found = ops.scan(hidden.to(DEVICE), case.search.weight, None, case.search.codes).cpu()
    assert not found.isnan().any()
    # both round the same integers; a coordinate on the edge may round to the other side
    assert (found - wanted).abs().max() <= 1e-3 * wanted.abs().max()


@pytest.mark.parametrize("n", [1, 2, 17])
def test_certified_tokens_are_the_float64_winners(case, n):
    hidden = case.hidden[20 : 20 + n].contiguous()
    case.search.take_totals()
    found = case.search.next_token(hidden.to(DEVICE), 1e-6)
    assert bool(found.certified.all())
    assert torch.equal(found.tokens.cpu(), truth(case, hidden).argmax(1))
    best = truth(case, hidden).amax(1)
    assert ((found.scores.cpu().double() - best).abs() <= 1e-5 * best.abs().max()).all()
    assert bool((found.candidates >= 1).all())
    assert bool((found.bytes_read >= case.reference.scan_bytes).all())
    counted = case.search.take_totals()
    assert counted[:2] == [n, n]
    assert counted[3] == int(found.candidates.sum())


def test_all_batch_sizes_agree(case, monkeypatch):
    """A row's answer does not depend on who else is in the batch, or on its place there."""
    blocks = dataclasses.replace(ops.BLOCKS, batch_states=8, query_bytes=0)
    monkeypatch.setattr(ops, "BLOCKS", blocks)
    hidden = case.hidden[:10].contiguous().to(DEVICE)  # 8 a program, and a rest that is not full
    together = case.search.next_token(hidden, 1e-6).tokens[::9]
    alone = [case.search.next_token(hidden[i : i + 1], 1e-6).tokens for i in (0, 9)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("n", [1, 2])
def test_deterministic_bound(case, n):
    hidden = case.hidden[40 : 40 + n].contiguous()
    found = case.search.next_token(hidden.to(DEVICE), 0.0)
    assert bool(found.certified.all())
    assert torch.equal(found.tokens.cpu(), truth(case, hidden).argmax(1))


@pytest.mark.parametrize("n", [1, 2])
def test_samples_are_the_perturbed_argmax(case, n):
    """The noise in the kernels is the reference's, so a seed draws the same token everywhere."""
    hidden = case.hidden[:n].contiguous()
    steps = torch.arange(n) + 2**33
    for seed in (3, 2**64 - 5):
        found = case.search.next_token(hidden.to(DEVICE), 1e-6, 0.8, seed, steps.to(DEVICE))
        drawn = noise_reference.gumbel(seed, steps, len(case.weight)).double()
        assert bool(found.certified.all())
        assert torch.equal(found.tokens.cpu(), (truth(case, hidden) + 0.8 * drawn).argmax(1))


@pytest.mark.parametrize("n", [1, 8])
def test_complete_logits(case, n):
    """Winner exact, expected KL within the budget, as many exact logits as candidates claimed."""
    hidden = case.hidden[60 : 76 if CUDA else 60 + max(n, 2)].contiguous()
    parts = [case.search.logits(part.to(DEVICE), 1e-6, 1e-3) for part in hidden.split(n)]
    logits = torch.cat([part[0] for part in parts]).cpu()
    candidates = torch.cat([part[1].candidates for part in parts]).cpu()
    exact = truth(case, hidden)
    assert not logits.isnan().any()
    assert torch.equal(logits.argmax(1), exact.argmax(1))
    assert torch.equal(torch.cat([part[1].tokens for part in parts]).cpu(), exact.argmax(1))
    p = exact.log_softmax(1)
    kl = (p.exp() * (p - logits.double().log_softmax(1))).sum(1)
    # the budget is for the mean: one of two rows may take more of it
    assert float(kl.mean()) <= 1e-3 * (1 if len(kl) >= 8 else 5)
    near = (logits.double() - exact).abs() <= 1e-5 * exact.abs().max()
    assert bool((near.sum(1) >= candidates).all())


def test_candidates_are_about_the_references(case):
    """The selection is the reference's but for the pilots: it must not read all rows unnoticed."""
    hidden = case.hidden[:5].contiguous()
    plan = make_plan(case.reference)
    wanted = cascade_reference.cascade(
        hidden, case.weight, None, case.reference, plan, 1e-6, None, 0.0
    )
    found = case.search.next_token(hidden.to(DEVICE), 1e-6)
    assert (
        float(found.answers[6].float().mean()) <= 1.5 * float(wanted.read[:, 0].float().mean()) + 16
    )
    assert float(found.candidates.float().mean()) <= float(wanted.read[:, -1].float().mean()) + 16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_bias(dtype):
    weight, hidden = clustered_head(500, 64)
    bias = 3 * torch.randn(500, generator=torch.Generator().manual_seed(1))
    case = make_case(weight.to(dtype), hidden, bias=bias)
    states = case.hidden[:4].contiguous()
    exact = truth(case, states) + bias.double()
    found = case.search.next_token(states.to(DEVICE), 1e-6)
    assert bool(found.certified.all())
    lost = exact.amax(1) - exact.gather(1, found.tokens.cpu()[:, None])[:, 0]
    assert float(lost.max()) <= 1e-5 * float(exact.abs().max())
    logits, _ = case.search.logits(states.to(DEVICE), 1e-6, 1e-3)
    assert torch.equal(logits.argmax(1).cpu(), found.tokens.cpu())


def test_bit_planes_give_the_same_estimates(case, monkeypatch):
    """Popcounts of codes and planes, summed up here, are the scan's integer dot products."""
    n = 1
    hidden = case.hidden[:n].contiguous().to(DEVICE)
    codes = case.search.codes
    wanted = ops.scan(hidden, case.search.weight, None, codes).cpu()
    monkeypatch.setattr(triton_launch, "_has_bit_products", lambda _: True)
    counters = torch.zeros(ops.COUNTERS, dtype=torch.int32, device=DEVICE)
    totals = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    call = triton_launch.Call(
        hidden, case.search.weight, None, codes.tensors, codes.sizes, [], counters, totals, 5.0,
        codes.reach, ops.BLOCKS,
    )  # fmt: skip
    call.prepare()
    numbers, planes = call.numbers[:n].cpu(), call.bit_planes.cpu()
    words = codes.base.cpu().transpose(1, 2).flatten(0, 1)[: len(case.weight)]  # [V, words]
    lanes = torch.arange(32, dtype=torch.int64)

    def bits_of(x):  # type: ignore[no-untyped-def]
        return (x.long()[..., None] >> lanes) & 1

    codes_bits, plane_bits = bits_of(words), bits_of(planes)  # [V, words, 32], [n, groups, 8, 32]
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, -128])
    queries = (plane_bits * weights[:, None]).sum(2)  # coordinates where codes have their low bits
    _, at2, at1 = codes.layout.plane_groups
    d4, d2, _ = codes.layout.dims
    dots = torch.zeros(3, n, len(case.weight))
    for w in range(codes.layout.words):
        low, high = codes_bits[:, w].clone(), codes_bits[:, w].roll(-1, 1)
        low[:, 1::2], high[:, 1::2] = 0, 0
        two_bits = low + 2 * high
        if w < d4 // 8:
            part = (queries[:, w % (d4 // 16)] @ two_bits.T) * (4 if w < d4 // 16 else 1)
            dots[0] += part
        elif w < d4 // 8 + d2 // 16:
            dots[1] += queries[:, at2 + w - d4 // 8] @ two_bits.T
        else:
            place = at1 + 2 * (w - d4 // 8 - d2 // 16)
            dots[2] += (queries[:, place] + queries[:, place + 1]) @ codes_bits[:, w].T
    found = codes.direction.cpu() * numbers[:, 6:7] + numbers[:, 7:8]
    slots = [slot for slot in range(3) if codes.layout.dims[slot] > 0]
    for row, slot in enumerate(slots):
        centre = codes.constants[slot, 1].cpu()
        dot = dots[slot] - centre * numbers[:, 3 + slot, None]
        found = found + codes.scale[row].cpu().float() * numbers[:, slot, None] * dot
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_scans_agree(case, monkeypatch):
    """Binary products and integer dot products: the same estimates but for rounding."""
    hidden = case.hidden[:1].contiguous().to(DEVICE)
    ours = ops.scan(hidden, case.search.weight, None, case.search.codes)
    found = case.search.next_token(hidden, 1e-6)
    monkeypatch.setattr(ops, "BLOCKS", dataclasses.replace(ops.BLOCKS, bit_products=False))
    other = ops.scan(hidden, case.search.weight, None, case.search.codes)
    assert (ours - other).abs().max() <= 1e-5 * other.abs().max()
    fresh = DeviceSearch(case.index, case.search.weight, None)
    assert torch.equal(found.tokens, fresh.next_token(hidden, 1e-6).tokens)


def test_query_by_dot_products_equals_the_long_way(monkeypatch):
    """16-bit hidden states take the tensor cores: the interpreter sees that path in float32."""
    weight, hidden = clustered_head(320, 300)  # two steps of 256, the second not full
    case = make_case(weight.float(), hidden)
    states = hidden[:5].float().contiguous().to(DEVICE)
    codes = case.search.codes
    wide = dataclasses.replace(codes, transform=codes.transform.float())
    monkeypatch.setattr(ops, "BLOCKS", dataclasses.replace(ops.BLOCKS, query_bytes=0))
    one = ops.scan(states, case.search.weight, None, codes)
    other = ops.scan(states, case.search.weight, None, wide)
    # TF32 on a card rounds the operands: coordinates may move by a step of the query
    assert (one - other).abs().max() <= (2e-2 if CUDA else 1e-4) * one.abs().max()


def test_equal_rows_give_the_lowest():
    """Ties go to the lowest row, as with argmax."""
    weight, hidden = clustered_head(400, 48)
    weight = weight.float()
    top = (hidden[:4].double() @ weight.double().T).argmax(1)
    weight[399] = weight[top[0]]
    weight[3] = weight[top[0]]
    case = make_case(weight, hidden)
    found = case.search.next_token(hidden[:4].contiguous().to(DEVICE), 1e-6)
    assert int(found.tokens[0]) == min(3, int(top[0]))


def test_winners_in_the_last_rows():
    """A tail that is scanned but not selected from."""
    weight, hidden = clustered_head(1029, 48, seed=2)
    winners = (hidden[:8].double() @ weight.double().T).argmax(1).unique()
    others = torch.ones(1029, dtype=torch.bool).index_fill(0, winners, False)
    weight = torch.cat([weight[others], weight[winners]]).float()
    case = make_case(weight, hidden, bits=1.0, planes=1)
    found = case.search.next_token(hidden[:8].to(DEVICE), 1e-6)
    assert torch.equal(found.tokens.cpu(), truth(case, hidden[:8]).argmax(1))
    pilots = 0x7FFFFFFF - (found.answers[7] & 0x7FFFFFFF)
    assert bool((pilots != found.tokens).any())  # else the selection has nothing to find


def test_not_finite_is_never_certified():
    weight, hidden = clustered_head(300, 48)
    case = make_case(weight.float(), hidden)
    states = hidden[:4].float().clone()
    states[1, 5] = torch.nan
    states[2, 0] = torch.inf
    found = case.search.next_token(states.to(DEVICE), 1e-6)
    assert found.certified.tolist() == [True, False, False, True]
    assert bool(((found.tokens >= 0) & (found.tokens < 300)).all())


def test_everything_forbidden_is_not_certified():
    weight, hidden = clustered_head(100, 48)
    case = make_case(weight.float(), hidden, bias=torch.full((100,), -torch.inf))
    assert not case.search.next_token(hidden[:2].float().to(DEVICE), 1e-6).certified.any()


def test_worst_case_reads_every_row():
    """All rows alike: no list overflows, every row is scored exactly, and the answer holds."""
    noise = torch.randn(280, 48, generator=torch.Generator().manual_seed(0))
    weight = 1 + 1e-6 * noise
    hidden = torch.randn(64, 48, generator=torch.Generator().manual_seed(1))
    case = make_case(weight, hidden, bits=1.0, planes=1)
    found = case.search.next_token(hidden[:2].contiguous().to(DEVICE), 0.0)
    exact = truth(case, hidden[:2])
    lost = exact.amax(1) - exact.gather(1, found.tokens.cpu()[:, None])[:, 0]
    assert float(lost.max()) <= 1e-5


def test_noise_kernel_is_the_reference_bit_by_bit():
    steps = torch.tensor([0, 7, 2**40 + 3])
    for seed in (0, 12345678901234567890):
        found = noise.gumbel(seed, steps.to(DEVICE), 1001).cpu()
        assert torch.equal(found, noise_reference.gumbel(seed, steps, 1001))


@pytest.fixture
def heads(monkeypatch):  # type: ignore[no-untyped-def]
    """The same head searched by Triton and by the reference."""
    monkeypatch.setattr("flashhead.nn.head.find_crossover", lambda _: Wide())
    weight, hidden = clustered_head(400, 64)
    index = build_codes(weight.float(), CodesOptions(), hidden)

    def head(device, impl):  # type: ignore[no-untyped-def]
        linear = torch.nn.Linear(64, 400, bias=False)
        linear.weight.data = weight.float()
        return FlashHead(linear.to(device), index, impl=impl)

    return head(DEVICE, "triton"), head("cpu", "reference"), hidden


class Wide:
    logits = token = 64


def test_log_probs_without_draws(heads):
    """Catches an estimate, or another row's logit, in place of the token's exact one."""
    ours, _, hidden = heads
    states, tokens = hidden[:4], torch.tensor([399, 0, 17, 250])
    found = ours.log_probs(states.to(DEVICE), tokens, draws=0)
    logits = states.double() @ ours.weight.detach().cpu().double().T
    exact = logits.gather(1, tokens[:, None])[:, 0]
    assert torch.allclose(found.logits.double(), exact, rtol=1e-5, atol=1e-4)
    log_z = ours.search(states.to(DEVICE)).logits.cpu().double().logsumexp(1)
    assert torch.allclose(found.values.double(), exact - log_z, rtol=1e-5, atol=1e-4)


def test_head_equals_the_reference_head(heads):
    """Greedy, sampling, filters and penalties choose the same tokens on both."""
    from flashhead.nn.next_token import Context

    ours, reference, hidden = heads
    states = hidden[:4]
    contexts = [Context(previous=torch.tensor([1, 2, 3])) for _ in states]
    for sampling in (
        Sampling(),
        Sampling(temperature=0.7, seed=5),
        Sampling(temperature=0.7, seed=5, top_p=0.9),
    ):
        found = ours.next_token(states.to(DEVICE), sampling).tokens
        assert torch.equal(found.cpu(), reference.next_token(states, sampling).tokens)
    penalties = Sampling(repetition_penalty=1.3)
    found = ours.next_token(states.to(DEVICE), penalties, contexts=contexts).tokens
    assert torch.equal(
        found.cpu(), reference.next_token(states, penalties, contexts=contexts).tokens
    )
    with torch.no_grad():
        logits = ours(states.to(DEVICE)).cpu()
    assert torch.equal(logits.argmax(1), reference.next_token(states).tokens)
    assert ours.stats.rows > 0
    assert ours.stats.certified <= ours.stats.rows


def test_operators_are_safe_to_compile():
    """Fake kernels and mutation of the operators: what torch.compile and graphs rely on."""
    weight, hidden = clustered_head(200, 48)
    case = make_case(weight.float(), hidden)
    hidden = case.hidden[:2].contiguous().to(DEVICE)
    codes = case.search.codes
    counters = torch.zeros(ops.COUNTERS, dtype=torch.int32, device=DEVICE)
    totals = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    arguments = (hidden, case.search.weight, None, codes.tensors, codes.sizes)
    rest = (counters, totals, 4.97, codes.reach)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.next_token, (*arguments, [], *rest), test_utils=tests)
    torch.library.opcheck(ops.logits, (*arguments, *rest, 1e-3), test_utils=tests)
    assert int(counters.abs().sum()) == 0


def test_wrong_heads_are_refused(case):
    with pytest.raises(FlashHeadError, match="not contiguous"):
        ops.check(torch.zeros(4, 6).T)
    segments = (case.reference.segments[0],) * 2
    with pytest.raises(FlashHeadError, match="falling widths"):
        ops.make_layout(dataclasses.replace(case.reference, segments=segments))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_graphs_streams_and_capture(case):
    """Replays return the caller's own tensors, on any stream, and in a capture of the caller's."""
    hidden = case.hidden[:64].to(DEVICE)
    wanted = truth(case, case.hidden[:64]).argmax(1)
    kept = [case.search.next_token(hidden[i : i + 1], 1e-6).tokens for i in range(32)]
    assert torch.equal(torch.cat(kept).cpu(), wanted[:32])
    streams = [torch.cuda.Stream() for _ in range(2)]
    found = []
    for i in range(32):
        with torch.cuda.stream(streams[i % 2]):
            streams[i % 2].wait_stream(torch.cuda.default_stream())
            found.append(case.search.next_token(hidden[i : i + 1], 1e-6).tokens)
    torch.cuda.synchronize()
    assert torch.equal(torch.cat(found).cpu(), wanted[:32])
    static = hidden[:3].clone()
    case.search.next_token(static, 1e-6)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = case.search.next_token(static, 1e-6).tokens
    for start in (0, 10, 20):
        static.copy_(hidden[start : start + 3])
        graph.replay()
        assert torch.equal(tokens.cpu(), wanted[start : start + 3])


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_compiled_caller(case):
    """torch.compile takes the operator whole, without a graph break."""
    hidden = case.hidden[:4].to(DEVICE)

    @torch.compile(fullgraph=True)
    def call(states):  # type: ignore[no-untyped-def]
        return case.search.next_token(2 * states / 2, 1e-6).tokens + 0

    assert torch.equal(call(hidden).cpu(), truth(case, case.hidden[:4]).argmax(1))
