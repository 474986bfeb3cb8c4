"""The probe in Triton: on a GPU if there is one, else interpreted."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashhead.errors import FlashHeadError
from flashhead.index.clusters import ClustersIndex
from flashhead.nn.search import search_clusters
from flashhead.ops.probe import api, reference
from flashhead.options import ClustersOptions

pytest.importorskip("triton")

from flashhead.ops.probe import triton as kernels

DEVICE = "cpu" if kernels.IS_INTERPRETED else "cuda"
CENTROIDS = ("int8", "int4", "bf16")
WEIGHTS = [torch.float32, torch.float16]
if DEVICE != "cpu":
    WEIGHTS.append(torch.bfloat16)


@pytest.fixture(autouse=True)
def poison(monkeypatch):  # type: ignore[no-untyped-def]
    """Nothing reads memory that no kernel has written, unseen."""
    allocate = torch.empty

    def poisoned(*size, **options):  # type: ignore[no-untyped-def]
        tensor = allocate(*size, **options)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else -(2**30))

    monkeypatch.setattr(torch, "empty", poisoned)


def make_index(
    vocab: int,
    d: int,
    size: int,
    probes: int,
    dtype: str = "int8",
    always: tuple[int, ...] = (),
    seed: int = 0,
) -> ClustersIndex:
    """An index of random centroids over shuffled tokens."""
    generator = torch.Generator().manual_seed(seed)
    count = -(-vocab // size)
    members = torch.full((count, size), -1, dtype=torch.int32)
    free = count * size - vocab  # padded one a cluster, then the next
    lengths = [size - free // count - (j < free % count) for j in range(count)]
    order = torch.randperm(vocab, generator=generator).int()
    cluster_of = torch.empty(vocab, dtype=torch.int32)
    for j, tokens in enumerate(order.split(lengths)):
        members[j, : len(tokens)] = tokens
        cluster_of[tokens.long()] = j
    if dtype == "int8":
        centroids = torch.randint(-127, 128, (count, d), generator=generator, dtype=torch.int8)
    elif dtype == "int4":
        shape = (count, -(-d // 2))
        centroids = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    else:
        centroids = torch.randn(count, d, generator=generator).bfloat16()
    step = {"int8": 1 / 127, "int4": 1 / 8, "bf16": 1.0}[dtype]
    tensors = {
        "centroids": centroids,
        "centroid_scale": step * (0.5 + torch.rand(count, generator=generator)),
        "centroid_offset": torch.randn(count, generator=generator),
        "common": torch.randn(d, generator=generator),
        "estimate_scale": 0.5 + torch.rand(count, generator=generator),
        "estimate_offset": -torch.rand(count, generator=generator),
        "members": members,
        "cluster_of": cluster_of,
        "always": torch.tensor(always, dtype=torch.int32),
    }
    options = ClustersOptions(cluster_size=size, probes=probes, centroid_dtype=dtype, always=always)
    return ClustersIndex(
        **{name: tensor.to(DEVICE) for name, tensor in tensors.items()},
        options=options,
        calibration_tokens=0,
    )


def make_head(index: ClustersIndex, n: int, dtype: torch.dtype, seed: int = 1):  # type: ignore[no-untyped-def]
    """hidden [n, d] and weight [V, d] of `dtype`, bias float32[V]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (index.vocab_size, index.hidden_size)
    hidden = torch.randn(n, shape[1], generator=generator).to(DEVICE, dtype)
    weight = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    return hidden, weight, torch.randn(shape[0], generator=generator).to(DEVICE)


def probe_arguments(index: ClustersIndex) -> tuple[Tensor, ...]:
    return (index.centroids, index.centroid_scale, index.centroid_offset, index.common)


def exact_scores(hidden: Tensor, index: ClustersIndex) -> Tensor:
    """Scores of all clusters in float64."""
    centroids, scale, offset, common = probe_arguments(index)
    if centroids.dtype == torch.uint8:
        centroids = reference.unpack_int4(centroids, index.hidden_size)
    rows = centroids.double() * scale[:, None].double() + common.double()
    return hidden.double() @ rows.T + offset.double()


def exact_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, index: ClustersIndex):  # type: ignore[no-untyped-def]
    """What a search must give, in float64."""
    scores = exact_scores(hidden, index)
    clusters = scores.sort(dim=1, descending=True, stable=True).indices
    logits = api.estimates(
        scores, index.cluster_of, index.estimate_scale.double(), index.estimate_offset.double()
    )
    dense = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    for n, order in enumerate(clusters[:, : index.options.probes]):
        rows = api.candidate_rows(index.members, order, index.always).long()
        logits[n, rows] = dense[n, rows]
    return logits


def assert_as_exact_as(got: Tensor, eager: Tensor, truth: Tensor) -> None:
    """Error of `got` at most 3 times that of eager float32, or one rounding of the largest."""
    assert got.dtype == torch.float32
    assert not got.isnan().any()
    allowed = 3 * (eager - truth).abs().max() + 2**-24 * truth.abs().max()
    assert (got - truth).abs().max() <= allowed


def lowest_argmax(logits: Tensor) -> Tensor:
    """argmax that takes the lowest of equal logits."""
    tokens = torch.arange(logits.shape[1], device=logits.device)
    best = logits == logits.amax(1, keepdim=True)
    return torch.where(best, tokens, logits.shape[1]).amin(1)


def search(hidden, weight, bias, index, **options):  # type: ignore[no-untyped-def]
    return api.search(hidden, weight, bias, index, api.estimated_tokens(index), **options)


@pytest.mark.parametrize("dtype", CENTROIDS)
@pytest.mark.parametrize(
    ("n", "vocab", "d", "size", "probes"),
    [
        (1, 512, 64, 8, 8),
        (3, 331, 33, 9, 5),
        (8, 70, 129, 2, 1),
        (5, 13, 1, 4, 9),
        (1, 33, 896, 1, 4),
    ],
)
def test_probe(dtype, n, vocab, d, size, probes):
    """A tail read as data, int4 halves swapped, a hidden state of another row, clusters that are
    not best first.
    """
    index = make_index(vocab, d, size, probes, dtype)
    hidden = make_head(index, n, torch.float32)[0]
    arguments = (hidden, *probe_arguments(index), probes)
    scores, clusters = api.probe(*arguments, impl="triton")
    eager = api.probe(*arguments, impl="reference")[0]
    assert_as_exact_as(scores, eager, exact_scores(hidden, index))
    order = scores.sort(dim=1, descending=True, stable=True).indices
    assert clusters.dtype == torch.int64
    assert torch.equal(clusters, order[:, :probes])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_probe_of_strided_hidden_states(dtype):
    """16 bits read as another type, and memory walked as if it were contiguous."""
    index = make_index(200, 40, 8, 4)
    hidden = make_head(index, 6, dtype)[0]
    wanted = api.probe(hidden.float(), *probe_arguments(index), 4, impl="triton")
    strided = hidden.repeat_interleave(2, 1)[:, ::2]
    for got in (hidden, strided):
        scores, clusters = api.probe(got, *probe_arguments(index), 4, impl="triton")
        assert torch.equal(scores, wanted[0])
        assert torch.equal(clusters, wanted[1])


def test_rows_are_independent():
    """A hidden state whose answer depends on how many others are searched with it."""
    index = make_index(600, 48, 4, 8)
    hidden, weight, bias = make_head(index, 7, torch.float32)
    strided = hidden.repeat_interleave(2, 1)[:, ::2]
    logits = search(strided, weight, bias, index)[1]
    alone = [search(row[None], weight, bias, index)[1] for row in hidden]
    assert torch.equal(logits, torch.cat(alone))


SPECIAL = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3e38, -3e38, torch.inf, -torch.inf])


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(), values=st.lists(SPECIAL | st.floats(-9, 9, width=16), min_size=1, max_size=70)
)
def test_selection(data, values):
    """Not exactly P clusters, ties that are not the lowest, -0 below 0, a sign taken for size, or
    a place lost where one block of clusters ends.
    """
    probes = data.draw(st.integers(1, len(values)))
    scores = torch.tensor([values, values[::-1]], dtype=torch.float32, device=DEVICE)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    wanted = order[:, :probes].sort(1).values.int()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "MAX_BLOCK_CLUSTERS", data.draw(st.sampled_from([16, 16384])))
        clusters = kernels.best_clusters(scores, probes)[0]
    assert torch.equal(clusters, wanted)


def test_selection_of_a_real_size():
    """Counts that leave their field of a packed sum."""
    generator = torch.Generator().manual_seed(0)
    scores = (8 * torch.randn(2, 17000, generator=generator)).to(DEVICE)
    scores[1] = scores[1].round()
    wanted = scores.sort(dim=1, descending=True, stable=True).indices
    for probes in (1, 256, 16999):
        clusters = kernels.best_clusters(scores, probes)[0]
        assert torch.equal(clusters, wanted[:, :probes].sort(1).values.int())


@pytest.mark.parametrize("weight_dtype", WEIGHTS)
@pytest.mark.parametrize(
    ("n", "vocab", "d", "size", "probes", "dtype", "always", "has_bias"),
    [
        (1, 512, 64, 16, 4, "int8", (), False),
        (3, 331, 33, 9, 5, "int4", (0, 7, 330), True),
        (8, 70, 129, 2, 1, "bf16", (69,), True),
        (2, 13, 24, 4, 9, "int8", (3,), False),
        (1, 300, 576, 16, 1, "int4", (), True),
        (3, 7, 5, 1, 2, "int8", (0, 1, 2, 3, 4, 5, 6), False),
        (1, 5, 8, 8, 1, "bf16", (), False),
    ],
)
def test_search(weight_dtype, n, vocab, d, size, probes, dtype, always, has_bias):
    """Padding scored as a token, a candidate left at its estimate or the reverse, an always-token
    missed, a bias of another token, a winner that is not the argmax.
    """
    index = make_index(vocab, d, size, probes, dtype, always)
    hidden, weight, bias = make_head(index, n, weight_dtype)
    bias = bias if has_bias else None
    tokens, logits = search(hidden, weight, bias, index)
    truth = exact_logits(hidden, weight, bias, index)
    assert_as_exact_as(
        logits, search_clusters(hidden, weight, bias, index, "reference").logits, truth
    )
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, lowest_argmax(logits))
    alone, nothing = search(hidden, weight, bias, index, winner_only=True)
    assert nothing is None
    assert torch.equal(alone, tokens)


@pytest.mark.parametrize("winner_only", [True, False])
def test_equal_logits(winner_only):
    """The first program to finish wins, not the lowest token; -0 loses to 0."""
    index = make_index(160, 16, 4, 40)
    hidden, weight, _ = make_head(index, 2, torch.float32)
    weight[:] = 0
    assert search(hidden, weight, None, index, winner_only=winner_only)[0].tolist() == [0, 0]
    weight[[30, 77, 140]] = hidden[0]
    bias = torch.zeros(160, device=DEVICE)
    bias[::2] = -0.0
    tokens = search(hidden[:1], weight, bias, index, winner_only=winner_only)[0]
    assert tokens.tolist() == [30]


@pytest.mark.parametrize("winner_only", [True, False])
def test_equal_scores(winner_only):
    """Ties of clusters that are all taken, or not the lowest ones, in a search."""
    index = make_index(160, 16, 4, 3)
    for tensor in probe_arguments(index):
        tensor.zero_()
    hidden, weight, bias = make_head(index, 2, torch.float32)
    tokens, logits = search(hidden, weight, bias, index, winner_only=winner_only)
    truth = exact_logits(hidden, weight, bias, index)
    assert torch.equal(tokens, truth.argmax(1))
    if logits is not None:
        torch.testing.assert_close(logits, truth.float())


@pytest.mark.parametrize("winner_only", [True, False])
def test_an_estimate_can_win(winner_only):
    """A greedy search that forgets what complete logits hold: the estimates, but not of a probed
    cluster, nor of an always-token.
    """
    index = make_index(50, 16, 5, 2, always=(4, 11))
    hidden, weight, bias = make_head(index, 3, torch.float32)
    index.estimate_offset[:] = 1e4
    index.estimate_scale[:] = 0
    bias[index.always.long()] = -1e4
    tokens, _ = search(hidden, weight, bias, index, winner_only=winner_only)
    assert torch.equal(tokens, lowest_argmax(exact_logits(hidden, weight, bias, index)))


@given(data=st.data(), vocab=st.integers(1, 40), size=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_estimated_tokens(data, vocab, size):
    """Padding or an always-token taken for the lowest."""
    always = sorted(data.draw(st.sets(st.integers(0, vocab - 1))))
    index = make_index(vocab, 2, size, 1, always=tuple(always))
    wanted = [
        min((token for token in cluster if token >= 0 and token not in always), default=-1)
        for cluster in index.members.tolist()
    ]
    assert api.estimated_tokens(index).tolist() == wanted
    assert api.estimated_tokens(index).dtype == torch.int32


def test_no_rows():
    """A grid of nothing."""
    index = make_index(40, 8, 4, 2)
    hidden, weight, _ = make_head(index, 0, torch.float32)
    tokens, logits = search(hidden, weight, None, index)
    assert (tokens.shape, logits.shape) == ((0,), (0, 40))
    scores, clusters = api.probe(hidden, *probe_arguments(index), 2, impl="triton")
    assert (scores.shape, clusters.shape) == ((0, 10), (0, 2))


def test_bad_arguments():
    """A kernel run on memory that is not what it takes it for."""
    index = make_index(40, 8, 4, 2)
    hidden, weight, bias = make_head(index, 1, torch.float32)
    estimated = api.estimated_tokens(index)
    good = {
        "hidden": hidden,
        "weight": weight,
        "bias": bias,
        "index": index,
        "estimated": estimated,
    }
    for change, word in (
        ({"weight": weight[:39]}, "weight"),
        ({"weight": weight.T.contiguous().T}, "weight .* contiguous"),
        ({"weight": weight.double()}, "weight"),
        ({"bias": bias.half()}, "bias"),
        ({"estimated": estimated[1:]}, "estimated"),
        ({"hidden": hidden[:, 1:]}, "hidden"),
        ({"weight": weight.to("meta")}, "meta"),
        ({"bias": bias.to("meta")}, "meta"),
    ):
        with pytest.raises(FlashHeadError, match=word):
            api.search(**(good | change))


def test_devices(monkeypatch):
    """Compiled kernels started on memory of the CPU, or another implementation run instead."""
    monkeypatch.setattr(kernels, "IS_INTERPRETED", False)
    index = make_index(40, 8, 4, 2)
    arguments = [
        tensor.cpu() for tensor in (make_head(index, 1, torch.float32)[0], *probe_arguments(index))
    ]
    with pytest.raises(FlashHeadError, match=r"impl='triton'.* on cpu, wanted one GPU"):
        api.probe(*arguments, 2, impl="triton")


def test_missing_triton_is_named(monkeypatch):
    """An ImportError without the fix."""
    index = make_index(40, 8, 4, 2)
    hidden = make_head(index, 1, torch.float32)[0]
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "flashhead.ops.probe.triton")
    with pytest.raises(FlashHeadError, match="pip install triton"):
        api.probe(hidden, *probe_arguments(index), 2, impl="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize("dtype", CENTROIDS)
@pytest.mark.parametrize("winner_only", [True, False])
def test_in_a_cuda_graph(n, dtype, winner_only):
    """A wait for the host, a shape that depends on data, state left from the last replay; in bf16
    at the size of a real head.
    """
    index = make_index(151_936, 896, 16, 256, dtype, always=(0, 151_643))
    states, weight, bias = make_head(index, 4 * n, torch.bfloat16)
    hidden, estimated = states[:n].clone(), api.estimated_tokens(index)
    api.search(hidden, weight, bias, index, estimated, winner_only=winner_only)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, logits = api.search(hidden, weight, bias, index, estimated, winner_only=winner_only)
    for chunk in states.split(n):
        hidden.copy_(chunk)
        graph.replay()
        truth = exact_logits(chunk, weight, bias, index)
        eager = search_clusters(chunk, weight, bias, index, "reference").logits
        assert torch.equal(tokens, truth.argmax(1))
        if logits is not None:
            assert_as_exact_as(logits, eager, truth)
            assert torch.equal(tokens, lowest_argmax(logits))
