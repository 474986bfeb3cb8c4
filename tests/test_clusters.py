"""The clusters index: balance, determinism, odd sizes, what a saved index may claim, and how well
it searches.
"""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashhead.errors import FlashHeadError
from flashhead.index.build_clusters import build_clusters, fit_clusters, store_clusters
from flashhead.index.clusters import ClustersIndex
from flashhead.ops.probe.api import candidate_rows, estimates, probe
from flashhead.ops.probe.reference import unpack_int4
from flashhead.options import ClustersOptions


def make_head(vocab: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows in groups with a common part, and hidden states that favour a few directions: bf16[V,
    d], bf16[512, d].
    """
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(max(1, vocab // 12), d, generator=generator)
    group = torch.randint(len(centres), (vocab,), generator=generator)
    rows = 0.5 + centres[group] + 0.5 * torch.randn(vocab, d, generator=generator)
    spread = torch.linspace(2.0, 0.2, d)
    hidden = (torch.randn(512, d, generator=generator) + 0.3) * spread
    return rows.bfloat16(), hidden.bfloat16()


def search(index: ClustersIndex, hidden: Tensor, probes: int) -> tuple[Tensor, Tensor]:
    """Scores of all clusters and the probed ones, by the reference."""
    return probe(
        hidden,
        index.centroids,
        index.centroid_scale,
        index.centroid_offset,
        index.common,
        probes,
        impl="reference",
    )


def recall(index: ClustersIndex, weight: Tensor, hidden: Tensor, probes: int) -> float:
    """Share of hidden states whose best token (float32) lies in a probed cluster."""
    truth = (hidden.float() @ weight.float().T).argmax(1)
    clusters = search(index, hidden, probes)[1]
    return float((clusters == index.cluster_of[truth].long()[:, None]).any(1).float().mean())


def assert_partition(index: ClustersIndex, vocab: int, size: int) -> None:
    """Every token in exactly one place of `members`, where `cluster_of` says, padding last."""
    members = index.members
    assert members.shape == (-(-vocab // size), size)
    assert sorted(members[members >= 0].tolist()) == list(range(vocab))
    for cluster, row in enumerate(members.tolist()):
        held = [token for token in row if token >= 0]
        assert held
        assert row == held + [-1] * (size - len(held))
        assert all(int(index.cluster_of[token]) == cluster for token in held)


@settings(max_examples=25, deadline=None)
@given(
    vocab=st.integers(1, 90),
    d=st.integers(1, 9),
    size=st.integers(1, 20),
    metric=st.sampled_from(["hidden", "spherical"]),
    dtype=st.sampled_from(["int8", "int4", "bf16"]),
    seed=st.integers(0, 5),
    calibrated=st.booleans(),
)
def test_any_shape_partitions_and_round_trips(vocab, d, size, metric, dtype, seed, calibrated):
    """A token lost or doubled when V is no multiple of the size, V < size, V = 1 or d = 1; a field
    lost by saving.
    """
    weight, hidden = make_head(vocab, d, seed)
    options = ClustersOptions(
        cluster_size=size,
        metric=metric,
        centroid_dtype=dtype,
        seed=seed,
        iterations=2,
        always=(vocab - 1, 0, 0),
    )
    index = build_clusters(weight, options, hidden[:20] if calibrated else None)
    assert_partition(index, vocab, size)
    assert index.always.tolist() == sorted({0, vocab - 1})
    metadata = json.loads(json.dumps(index.metadata()))
    again = ClustersIndex.from_tensors(index.tensors(), metadata)
    assert again.options == options
    assert (again.vocab_size, again.hidden_size) == (vocab, d)
    assert again.tensors().keys() == index.tensors().keys()
    assert all(
        torch.equal(again.tensors()[name], tensor) for name, tensor in index.tensors().items()
    )
    scores, _ = search(index, hidden, 1)
    logits = estimates(scores, index.cluster_of, index.estimate_scale, index.estimate_offset)
    assert logits.shape == (len(hidden), vocab)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("metric", ["hidden", "spherical"])
@pytest.mark.parametrize("value", ["zero", "equal", "half zero"])
def test_degenerate_rows(metric, value):
    """Division by a zero norm or scale, or an auction that never ends when every bid is equal."""
    weight, hidden = make_head(300, 12)
    if value == "half zero":
        weight[::2] = 0
    else:
        weight[:] = 0 if value == "zero" else weight[0].clone()
    index = build_clusters(
        weight, ClustersOptions(cluster_size=7, metric=metric, iterations=2), hidden
    )
    assert_partition(index, 300, 7)
    assert all(torch.isfinite(tensor).all() for tensor in index.tensors().values())


def test_constant_hidden_states():
    """A second moment or ridge of zero (one calibration token repeated) that makes the regression
    NaN.
    """
    weight, hidden = make_head(100, 8)
    index = build_clusters(
        weight, ClustersOptions(cluster_size=8, iterations=2), hidden[:1].expand(5, 8)
    )
    ClustersIndex.from_tensors(index.tensors(), index.metadata())


@pytest.mark.parametrize("metric", ["hidden", "spherical"])
def test_same_seed_same_index(metric):
    """An index that differs from run to run, or a seed that is not used."""
    weight, hidden = make_head(700, 24)
    options = ClustersOptions(metric=metric, iterations=3, seed=1)
    first = build_clusters(weight, options, hidden).tensors()
    torch.rand(3)  # the global generator must not matter
    second = build_clusters(weight, options, hidden).tensors()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = build_clusters(weight, dataclasses.replace(options, seed=2), hidden)
    assert not torch.equal(other.cluster_of, first["cluster_of"])


def test_clusters_find_groups():
    """A balance step that scatters rows: groups of exactly `size` near-equal rows must come out as
    the clusters.
    """
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(20, 32, generator=generator)
    weight = centres.repeat_interleave(8, 0) + 0.01 * torch.randn(160, 32, generator=generator)
    index = build_clusters(
        weight, ClustersOptions(cluster_size=8, metric="spherical", iterations=25)
    )
    whole = [len({token // 8 for token in row}) == 1 for row in index.members.tolist()]
    assert sum(whole) >= 14  # k-means may merge a few; rows in random order would give 0


def test_probing_beats_chance_and_calibration_helps():
    """Centroids that do not belong to their members, or a regression with a wrong sign or
    offset.
    """
    weight, hidden = make_head(3000, 32)
    options = ClustersOptions(cluster_size=8, iterations=4)
    calibrated = build_clusters(weight, options, hidden[:384])
    plain = build_clusters(weight, dataclasses.replace(options, metric="spherical"))
    held_out = hidden[384:]
    assert recall(plain, weight, held_out, 38) > 0.5  # a tenth of the clusters
    assert recall(calibrated, weight, held_out, 38) > max(0.8, recall(plain, weight, held_out, 38))
    assert recall(calibrated, weight, held_out, 375) == 1.0


def test_score_is_the_log_sum_exp_of_the_cluster():
    """A centroid fitted to something else than the mass: with one token a cluster it is that
    token's logit.
    """
    weight, hidden = make_head(60, 16)
    bias = torch.linspace(-1, 1, 60)
    index = build_clusters(
        weight,
        ClustersOptions(cluster_size=1, iterations=1, centroid_dtype="bf16"),
        hidden,
        bias=bias,
    )
    scores, _ = search(index, hidden, 1)
    logits = estimates(
        scores, index.cluster_of, index.estimate_scale, index.estimate_offset
    ).double()
    truth = hidden.double() @ weight.double().T + bias
    # bf16 logits in the regression and bf16 centroids: two roundings of relative size 2^-9, with
    # room
    assert (logits - truth).abs().max() < 4 * 2**-9 * truth.abs().max()


@pytest.mark.parametrize("d", [1, 7, 64])
def test_int4_centroids_are_the_nearest(d):
    """Halves of a byte swapped, an odd last dimension lost, or a scale of another centroid."""
    weight, hidden = make_head(300, d)
    options = ClustersOptions(cluster_size=8, iterations=2, centroid_dtype="int4")
    fitted = fit_clusters(weight, options, hidden)
    index = store_clusters(fitted, options)
    assert index.centroids.nbytes == 38 * ((d + 1) // 2)
    wanted = fitted.centroids - index.common
    stands_for = unpack_int4(index.centroids, d) * index.centroid_scale[:, None]
    clipped = wanted.clamp(
        -8 * index.centroid_scale[:, None], 7 * index.centroid_scale[:, None]
    )  # half a step from the nearest code, and float32 rounding of the quotient
    slack = index.centroid_scale[:, None] * (0.5 + 1e-5)
    assert ((stands_for - clipped).abs() <= slack).all()
    plain = wanted.abs().amax(1, keepdim=True) / 7
    rounded = (wanted / plain).round() * plain
    errors = [(x - wanted).square().sum(1) for x in (stands_for, rounded)]
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()


def test_one_fit_serves_every_dtype():
    """An index stored from a shared fit that differs from the one built for that dtype."""
    weight, hidden = make_head(300, 12)
    options = ClustersOptions(cluster_size=8, iterations=2, centroid_dtype="bf16")
    fitted = fit_clusters(weight, options, hidden)
    for dtype in ("bf16", "int8", "int4"):
        wanted = dataclasses.replace(options, centroid_dtype=dtype)
        built, stored = build_clusters(weight, wanted, hidden), store_clusters(fitted, wanted)
        assert stored.options == built.options
        for name, tensor in built.tensors().items():
            assert torch.equal(tensor, stored.tensors()[name]), (dtype, name)


def test_bias_shifts_estimates():
    """A head's bias left out of the estimates of tokens that are not probed."""
    weight, hidden = make_head(96, 16)
    bias = torch.full((96,), 3.0)
    for metric in ("hidden", "spherical"):
        for states in (hidden, None):
            options = ClustersOptions(cluster_size=8, metric=metric, iterations=2)
            pair = [build_clusters(weight, options, states, bias=b) for b in (None, bias)]
            logits = [
                estimates(
                    search(index, hidden, 1)[0],
                    index.cluster_of,
                    index.estimate_scale,
                    index.estimate_offset,
                )
                for index in pair
            ]
            torch.testing.assert_close(
                logits[1] - logits[0], torch.full_like(logits[0], 3.0), atol=1e-3, rtol=0
            )


def test_progress_goes_to_stderr_only(capfd):
    """A progress bar on stdout breaks `--json`; one that shows although it was not asked for breaks
    logs.
    """
    weight, hidden = make_head(100, 8)
    build_clusters(weight, ClustersOptions(iterations=1), hidden)
    assert capfd.readouterr() == ("", "")
    build_clusters(weight, ClustersOptions(iterations=1), hidden, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "clusters" in err


def test_threads_are_restored():
    """The one-thread auction leaking its setting into the caller's process."""
    before = torch.get_num_threads()
    build_clusters(make_head(100, 8)[0], ClustersOptions(iterations=1))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("weight", "options", "hidden", "bias", "word"),
    [
        (torch.zeros(4), {}, None, None, "wanted floating"),
        (torch.zeros(0, 3), {}, None, None, "wanted floating"),
        (torch.zeros(4, 3, dtype=torch.int8), {}, None, None, "wanted floating"),
        (torch.tensor([[1.0, torch.nan]]), {}, None, None, "NaN"),
        (torch.ones(4, 3), {"always": (4,)}, None, None, "always"),
        (torch.ones(4, 3), {}, torch.ones(5, 2), None, "calibration"),
        (torch.ones(4, 3), {}, torch.full((5, 3), torch.inf), None, "NaN or infinity"),
        (torch.ones(4, 3), {}, None, torch.ones(3), "bias"),
    ],
)
def test_bad_input_is_one_clear_error(weight, options, hidden, bias, word):
    """A traceback from deep inside torch, or an index of NaN, instead of a message that names the
    argument.
    """
    with pytest.raises(FlashHeadError, match=word):
        build_clusters(weight, ClustersOptions(**options), hidden, bias=bias)


@pytest.fixture(scope="module")
def saved() -> tuple[dict[str, Tensor], dict[str, object]]:
    """Tensors and metadata of a small index with padding: V = 30, d = 6, 4 clusters of 8."""
    weight, hidden = make_head(30, 6)
    index = build_clusters(
        weight, ClustersOptions(cluster_size=8, always=(2,), iterations=2), hidden
    )
    return index.tensors(), index.metadata()


def put(tensor: Tensor, place: object, value: float) -> Tensor:
    """A copy with one place changed."""
    changed = tensor.clone()
    changed[place] = value
    return changed


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("members", lambda t: put(t, (0, 0), 30)),
        ("members", lambda t: put(t, (0, 0), -2)),
        ("members", lambda t: put(t, (0, 0), -1)),
        ("members", lambda t: put(t, (0, 0), int(t[1, 0]))),
        ("members", lambda t: t.flip(1)),
        ("members", lambda t: t.long()),
        ("members", lambda t: t[:-1]),
        ("cluster_of", lambda t: put(t, 0, 4)),
        ("cluster_of", lambda t: put(t, 0, -1)),
        ("cluster_of", lambda t: (t + 1) % 4),
        ("always", lambda t: put(t, 0, 30)),
        ("always", lambda t: put(t, 0, -1)),
        ("centroid_scale", lambda t: put(t, 0, torch.nan)),
        ("estimate_offset", lambda t: put(t, 0, torch.inf)),
        ("centroids", lambda t: t.float()),
        ("common", lambda t: t[:-1]),
        ("common", lambda t: None),
    ],
)
def test_corrupted_tensor_is_rejected(saved, name, damage):
    """An index from a stranger's file that makes the search read outside the head, or score a token
    twice.
    """
    tensors, metadata = dict(saved[0]), saved[1]
    damaged = damage(tensors.pop(name))
    if damaged is not None:
        tensors[name] = damaged
    with pytest.raises(FlashHeadError, match=name):
        ClustersIndex.from_tensors(tensors, metadata)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vocab_size", 31),
        ("vocab_size", "30"),
        ("hidden_size", 0),
        ("options", None),
        ("options", {"cluster_size": "x"}),
        ("options", {"surprise": 1}),
        ("options", {"cluster_size": 4, "always": [2]}),
        ("options", {"cluster_size": 8, "always": [99]}),
        ("calibration_tokens", -1),
    ],
)
def test_corrupted_metadata_is_rejected(saved, name, value):
    """Metadata that contradicts the tensors or has the wrong types, taken at its word."""
    with pytest.raises(FlashHeadError):
        ClustersIndex.from_tensors(saved[0], saved[1] | {name: value})


def test_counted_bytes(saved):
    """A byte count that leaves out a tensor every query reads."""
    index = ClustersIndex.from_tensors(*saved)
    # 4 clusters: 6 int8 + 4 float32 each; common 6 float32; cluster_of 30 int32; always 1 int32
    assert index.scan_bytes == 4 * (6 + 16) + 24 + 120 + 4
    assert index.probe_bytes == 32
    assert len(candidate_rows(index.members, torch.arange(4), index.always)) == 30
