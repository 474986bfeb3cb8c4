"""The probe op: both implementations for CPUs against float64, candidate rows, estimates, and what
it refuses.
"""

import sys

import pytest
import torch
from conftest import IMPLS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashhead.errors import FlashHeadError
from flashhead.ops.probe.api import candidate_rows, estimates, probe


def make_case(
    n: int, clusters: int, d: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, ...]:
    """hidden, centroids, scale, offset, common."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator).bfloat16().float()
    if dtype == torch.int8:
        centroids = torch.randint(-127, 128, (clusters, d), generator=generator, dtype=torch.int8)
    elif dtype == torch.uint8:
        shape = (clusters, -(-d // 2))
        centroids = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    else:
        centroids = torch.randn(clusters, d, generator=generator).bfloat16()
    scale, offset = (
        torch.rand(clusters, generator=generator),
        torch.randn(clusters, generator=generator),
    )
    return hidden, centroids, scale, offset, torch.randn(d, generator=generator)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize(
    ("n", "clusters", "d"), [(1, 64, 64), (3, 37, 33), (2, 1, 1), (4, 1000, 640), (1, 5, 7)]
)
def test_scores_against_float64(impl, dtype, n, clusters, d):
    """A kernel that misreads int8 signs, bf16 bits or int4 halves, drops a tail, or mixes rows;
    aligned, odd and real widths.
    """
    hidden, centroids, scale, offset, common = case = make_case(n, clusters, d, dtype)
    if dtype == torch.uint8:
        half = centroids.shape[1]
        nibble = [
            [int(row[k % half]) >> 4 * (k >= half) & 15 for k in range(d)] for row in centroids
        ]
        centroids = torch.tensor(nibble).view(clusters, d) - 8
    exact = (
        (hidden.double() @ centroids.double().T) * scale
        + offset
        + (hidden.double() @ common.double())[:, None]
    )
    scores, chosen = probe(*case, 16, impl=impl)
    # float32 summation in any order: at most d + 3 roundings of 2^-24 of the sum of magnitudes
    magnitude = (hidden.double().abs() @ centroids.double().abs().T) * scale + offset.abs()
    magnitude += (hidden.double().abs() @ common.double().abs())[:, None]
    assert scores.dtype == torch.float32
    assert ((scores - exact).abs() <= (d + 3) * 2**-24 * magnitude).all()
    assert chosen.dtype == torch.int64
    assert torch.equal(scores.gather(1, chosen), scores.topk(min(16, clusters)).values)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_are_independent(impl):
    """A row whose probed clusters depend on its neighbours in the batch."""
    hidden, *index = make_case(6, 200, 48, torch.int8)
    together = probe(hidden, *index, 8, impl=impl)[1]
    alone = torch.cat([probe(row[None], *index, 8, impl=impl)[1] for row in hidden])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("impl", IMPLS)
def test_bf16_and_strided_hidden_states(impl):
    """A kernel that walks memory as if every tensor were contiguous float32."""
    hidden, *index = make_case(8, 50, 40, torch.int8)
    strided = hidden.repeat_interleave(2, 0)[::2]
    wanted = probe(hidden, *index, 4, impl=impl)[0]
    assert torch.equal(probe(strided, *index, 4, impl=impl)[0], wanted)
    assert torch.equal(probe(hidden.bfloat16(), *index, 4, impl=impl)[0], wanted)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows(impl):
    """An empty batch that crashes the kernel."""
    hidden, *index = make_case(0, 50, 40, torch.int8)
    scores, chosen = probe(hidden, *index, 4, impl=impl)
    assert (scores.shape, chosen.shape) == ((0, 50), (0, 4))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), vocab=st.integers(1, 60), size=st.integers(1, 9))
def test_candidate_rows(data, vocab, size):
    """Padding taken for a token, a token listed twice when it is probed and always scored, or
    unsorted rows.
    """
    order = data.draw(st.permutations(range(vocab)))
    count = -(-vocab // size)
    members = torch.tensor(list(order) + [-1] * (count * size - vocab), dtype=torch.int32).view(
        count, size
    )
    clusters = data.draw(st.lists(st.integers(0, count - 1), unique=True))
    always = data.draw(st.lists(st.integers(0, vocab - 1), max_size=5))
    got = candidate_rows(
        members,
        torch.tensor(clusters, dtype=torch.int64),
        torch.tensor(sorted(always), dtype=torch.int32),
    )
    wanted = {
        token for cluster in clusters for token in members[cluster].tolist() if token >= 0
    } | set(always)
    assert got.dtype == torch.int32
    assert got.tolist() == sorted(wanted)


def test_estimates():
    """An estimate taken from another token's cluster, or scale and offset swapped."""
    scores = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    cluster_of = torch.tensor([1, 0, 1], dtype=torch.int32)
    got = estimates(scores, cluster_of, torch.tensor([10.0, 100.0]), torch.tensor([0.5, -0.5]))
    assert got.tolist() == [[199.5, 10.5, 199.5], [399.5, 30.5, 399.5]]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"impl": "magic"}, "impl='magic'"),
        ({"probes": 0}, "probes=0"),
        ({"hidden": torch.zeros(2, 5)}, "hidden"),
        ({"hidden": torch.zeros(4)}, "hidden"),
        ({"centroids": torch.zeros(3, 4)}, "centroids"),
        ({"centroid_scale": torch.zeros(2)}, "centroid_scale"),
        ({"centroid_offset": torch.zeros(3, dtype=torch.float64)}, "centroid_offset"),
        ({"common": torch.zeros(5)}, "common"),
        ({"impl": "cpu", "hidden": torch.zeros(2, 4, device="meta")}, "meta"),
    ],
)
def test_bad_arguments(change, word):
    """A kernel run on shapes it does not fit (an out-of-bounds read), or a silent fall back to
    another impl.
    """
    names = ("hidden", "centroids", "centroid_scale", "centroid_offset", "common")
    arguments = dict(zip(names, make_case(2, 3, 4, torch.int8), strict=True)) | {
        "probes": 2,
        "impl": "reference",
    }
    with pytest.raises(FlashHeadError, match=word):
        probe(**(arguments | change))


def test_missing_numba_is_named(monkeypatch):
    """impl="cpu" falling back to the reference, or an ImportError without the fix, where numba is
    not installed.
    """
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "flashhead.ops.probe.cpu", raising=False)
    monkeypatch.delattr("flashhead.ops.probe.cpu", raising=False)
    with pytest.raises(FlashHeadError, match=r"pip install 'flashhead\[cpu\]'"):
        probe(*make_case(1, 4, 4, torch.int8), 2, impl="cpu")
