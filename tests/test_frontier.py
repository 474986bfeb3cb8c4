"""Every method of the frontier against a direct computation in float64 on small heads."""

import dataclasses
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import clustered_head
from test_evaluate import BOS, ByteTokenizer, TinyModel
from test_evaluate import V as TINY_V
from torch import Tensor, nn

from flashhead.errors import FlashHeadError
from flashhead.evaluate import baselines, evaluate_head, format_table, lowrank, probed, sampled
from flashhead.evaluate.measure import Chunk, Family, measure
from flashhead.evaluate.methods import families
from flashhead.evaluate.metrics import Reference, Totals, argmax
from flashhead.index.build_clusters import build_clusters
from flashhead.index.build_codes import build_codes
from flashhead.method_names import METHODS, TABLE_METHODS
from flashhead.nn.head import FlashHead
from flashhead.nn.search import search_codes
from flashhead.ops.refine.api import refine
from flashhead.ops.scan.api import scan, variances
from flashhead.ops.scan.query import make_plan, make_query
from flashhead.options import ClustersOptions, CodesOptions

V, D, SIZE = 333, 24, 16
PROBES = (1, 3, 8, 64)  # 21 clusters: 64 is all of them


def capped(logits: Tensor) -> Tensor:
    """A soft cap, so that nothing is compared before what the model does to its logits."""
    return 20 * torch.tanh(logits / 20)


def make_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


@pytest.fixture(scope="module")
def case():
    """A head with a bias and an odd vocabulary, its indexes, and a chunk of five positions."""
    weight, states = clustered_head(V, D, seed=3)
    states = states.bfloat16()
    bias = torch.linspace(-2, 2, V).bfloat16()
    options = ClustersOptions(cluster_size=SIZE, iterations=2, always=(5, 7))
    clusters = build_clusters(weight, options, states[:300], bias=bias)
    plain = dataclasses.replace(
        clusters, always=clusters.always[:0], options=dataclasses.replace(options, always=())
    )
    codes = build_codes(weight, CodesOptions(bits=1.0, planes=2), states[:300])
    head = FlashHead(make_linear(weight, bias), codes, impl="reference", sample=states[:8])
    hidden = states[300:305] / 8  # flat enough that few probes miss
    exact = baselines.float32_logits(hidden, weight, bias)
    chunk = Chunk(hidden, exact, Reference(capped(exact), torch.float32), capped, 0)
    return SimpleNamespace(head=head, clusters=clusters, plain=plain, codes=codes, chunk=chunk)


def measured(family: Family, chunk: Chunk, monkeypatch) -> dict[str, tuple[Tensor, dict]]:
    """Logits that a family compared and the figures that it gave, by row."""
    logits = {}
    compare = Chunk.compare

    def keep(self, name, values, *args, **kwargs):
        logits[name] = values.clone()
        return compare(self, name, values, *args, **kwargs)

    monkeypatch.setattr(Chunk, "compare", keep)
    figures = dict(family.measure(chunk))
    assert list(figures) == list(family.rows)
    return {row: (logits.get(row), values) for row, values in figures.items()}


def direct(chunk: Chunk, logits: Tensor) -> dict[str, Tensor]:
    """Agreement, KL and TV by their definitions, in float64."""
    truth, other = (chunk.postprocess(x).double() for x in (chunk.exact, logits))
    log_p, log_q = truth.log_softmax(1), other.log_softmax(1)
    return {
        "agree": truth.gather(1, other.argmax(1, keepdim=True))[:, 0] == truth.amax(1),
        "kl": (log_p.exp() * (log_p - log_q)).sum(1),
        "tv": (log_p.exp() - log_q.exp()).abs().sum(1) / 2,
    }


def assert_figures(chunk: Chunk, logits: Tensor, figures: dict[str, Tensor]) -> None:
    """Figures are those of the logits; the bound is the one that `metrics` states."""
    wanted = direct(chunk, logits)
    truth, other = (chunk.postprocess(x).double() for x in (chunk.exact, logits))
    gap = (truth.softmax(1) * (truth - other).abs()).sum(1)
    assert torch.equal(figures["agree"], wanted["agree"])
    assert ((figures["kl"] - wanted["kl"]).abs() <= 1e-6 * (1 + gap)).all()
    assert ((figures["tv"] - wanted["tv"]).abs() <= 1e-6).all()


def product_error(chunk: Chunk, weight: Tensor) -> Tensor:
    """What float32 products in any order may differ by: (d + 1) roundings of the magnitudes, twice
    (two orders).
    """
    magnitude = chunk.hidden.double().abs() @ weight.double().abs().T + 2
    return 2 * (weight.shape[1] + 1) * 2**-24 * magnitude


@pytest.mark.parametrize("vocab", [1, 2, 131, 512, 4096, 5000])
@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.5, 8.0])
def test_float32_metrics_are_bounded(vocab, noise):
    """Catches float32 metrics whose sums or log-sum-exps lose more than the module says: a frontier
    that shows KL of 1e-5 must not be made of rounding.
    """
    generator = torch.Generator().manual_seed(vocab)
    truth = torch.randn(6, vocab, generator=generator) * 6 + 40
    other = truth + torch.randn(6, vocab, generator=generator) * noise + 3
    for logits in (other, other.bfloat16()):
        gap = (truth.double() - logits.double()).abs()
        mean_gap = (truth.double().softmax(1) * gap).sum(1)
        kl, tv = Reference(truth, torch.float32).divergences(logits)
        wanted_kl, wanted_tv = Reference(truth).divergences(logits)
        assert kl.dtype == tv.dtype == torch.float64
        assert ((kl - wanted_kl).abs() <= 1e-6 * (1 + mean_gap)).all()
        assert ((tv - wanted_tv).abs() <= 1e-6).all()
    same = Reference(truth, torch.float32).divergences(truth)
    assert (same[0] == 0).all()
    assert (same[1] == 0).all()


@pytest.mark.parametrize("vocab", [1, 2, 131, 512, 4096])
def test_argmax_is_torchs(vocab):
    """Catches the last of several equal logits, or a block's place lost."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randint(0, 4, (50, vocab), generator=generator).float()
    assert torch.equal(argmax(logits), logits.argmax(1))
    assert torch.equal(argmax(logits.bfloat16()), logits.argmax(1))


def test_fp8_is_the_nearest_float8(monkeypatch):
    """Catches a scale that overflows to NaN, a scale of another row, truncation, lost blocks."""
    monkeypatch.setattr(baselines, "BLOCK_WEIGHTS", 50 * D)
    weight = clustered_head(V, D)[0]
    weight[5] = 0
    bias = torch.randn(V).bfloat16()
    head = baselines.quantize_head_fp8(weight, bias)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    every = every[torch.isfinite(every)]
    scale = weight.float().abs().amax(1, keepdim=True) / 448
    unit = (weight.float() / torch.where(scale > 0, scale, 1.0)).double()
    nearest = (unit[:, :, None] - every).abs().amin(2)
    codes = head.codes.double()
    assert torch.isin(codes, every).all()
    assert torch.equal((codes - unit).abs(), nearest)
    hidden = torch.randn(4, D).bfloat16()
    rows = codes * scale.double()
    wanted = hidden.double() @ rows.T + bias.double()
    slack = (D + 3) * 2**-24 * (hidden.double().abs() @ rows.abs().T + bias.double().abs())
    assert ((head.logits(hidden) - wanted).abs() <= slack).all()
    assert head.bytes_read == V * D + 4 * V + 2 * V


def test_probes_of_a_sweep_are_a_head_of_that_many_probes(case, monkeypatch):
    """Catches an order that depends on P, padding taken for a token, tokens always scored that are
    lost or counted twice, and bytes that differ from the product's own count.
    """
    family = probed.clusters_family("clusters", case.head, {"c": case.clusters}, PROBES)
    rows = measured(family, case.chunk, monkeypatch)
    for P in PROBES:
        options = dataclasses.replace(case.clusters.options, probes=P)
        index = dataclasses.replace(case.clusters, options=options)
        rebuilt = FlashHead(case.head, index, impl="reference", sample=case.chunk.hidden)
        wanted = rebuilt.search(case.chunk.hidden)
        logits, figures = rows[f"c-p{P}"]
        assert ((logits - wanted.logits).abs() <= product_error(case.chunk, case.head.weight)).all()
        assert torch.equal(figures["candidates"], wanted.candidates)
        assert torch.equal(figures["bytes_read"], wanted.bytes_read)
        assert_figures(case.chunk, logits, figures)
    assert torch.equal(rows["c-p64"][0], case.chunk.exact)
    sweep = probed._Sweep(case.chunk, case.clusters, 64)
    tokens, held = sweep.tokens(0, 64)  # a free place stays in its cluster
    assert torch.equal(
        case.clusters.cluster_of[tokens].long(), sweep.order.repeat_interleave(SIZE, 1)
    )
    assert (held.sum(1) == V).all()
    assert not rows["c-p1"][1]["agree"].all()  # or nothing above would be told apart


def test_clusters_then_codes(case, monkeypatch):
    """Catches rows chosen that cannot win (or the reverse), sigma of another row, estimates with a
    plane too few, and codes or rows left out of the bytes.
    """
    z = 12.0  # so that the rule drops rows and keeps more than the best
    monkeypatch.setattr(probed, "index_z", lambda codes: z)
    codes = case.codes
    family = probed.clusters_codes_family(case.head, case.plain, codes, "reference", PROBES)
    rows = measured(family, case.chunk, monkeypatch)
    sweep = measured(
        probed.clusters_family("c", case.head, {"c": case.plain}, PROBES), case.chunk, monkeypatch
    )
    plan = make_plan(codes)
    query = make_query(case.chunk.hidden, codes, plan, 1e-6)
    base = scan(query, codes, plan, case.head.bias.float()[None], impl="reference")
    sigmas = variances(query, codes, 2).sqrt()
    every = torch.arange(V)
    for P, n in itertools.product(PROBES, range(len(base))):
        logits, figures = rows[f"clusters-codes-p{P}"]
        plain, counted = sweep[f"c-p{P}"]
        estimates = base[n]
        for plane in (1, 2):
            estimates = refine(query, n, codes, plan, plane, every, estimates, impl="reference")
        estimates, sigma = estimates.double(), sigmas[n].double()
        order = sweep_order(case, P)[n]
        probed_tokens = torch.isin(case.plain.cluster_of, order)
        pilot = estimates.where(probed_tokens, -math.inf).argmax()
        chosen = probed_tokens & (estimates + z * sigma >= case.chunk.exact[n, pilot])
        chosen[pilot] = True
        wanted = torch.where(probed_tokens, estimates, plain[n].double())
        wanted[chosen] = case.chunk.exact[n, chosen].double()
        torch.testing.assert_close(logits[n].double(), wanted, rtol=2**-20, atol=2**-20)
        assert figures["candidates"][n] == chosen.sum()
        scales = 2 * len(codes.segments)
        code_bytes = codes.base.shape[1] * 4 + scales + 4 + 2 * codes.refine_row_bytes
        read = case.plain.scan_bytes + len(order) * case.plain.probe_bytes
        read += 2 * codes.transform.numel() + 4 * codes.exact.numel()
        read += int(counted["candidates"][n]) * code_bytes + int(chosen.sum()) * (2 * D + 4)
        assert figures["bytes_read"][n] == read
    for logits, figures in rows.values():
        assert_figures(case.chunk, logits, figures)
    assert (rows["clusters-codes-p64"][1]["candidates"] < V).all()
    assert (rows["clusters-codes-p64"][1]["candidates"] > 1).any()


def sweep_order(case, probes: int) -> Tensor:
    return probed._Sweep(case.chunk, case.plain, probes).order


def exact_mixture(phi: list[float], mass: list[float], probes: int) -> tuple[Tensor, Tensor]:
    """w_j and P(j drawn) by all ordered draws without replacement."""
    weights, inside = [0.0] * len(phi), [0.0] * len(phi)
    for draw in itertools.permutations(range(len(phi)), probes):
        probability, left = 1.0, 1.0
        for j in draw:
            probability *= phi[j] / left
            left -= phi[j]
        for j in draw:
            inside[j] += probability
            weights[j] += probability / math.fsum(mass[i] for i in draw)
    return torch.tensor(weights, dtype=torch.float64), torch.tensor(inside, dtype=torch.float64)


def test_weights_of_sampled_clusters_are_unbiased():
    """Catches a wrong floor for clusters inside or outside the draw, a draw with replacement, and
    the mass of a replaced cluster kept: 4,000 independent draws against all ordered draws.
    """
    phi, mass = [0.5, 0.2, 0.15, 0.1, 0.04, 0.01], [0.3, 0.35, 0.1, 0.05, 0.05, 0.15]
    rows = 4000
    log_phi = torch.tensor(phi, dtype=torch.float64).log().expand(rows, -1)
    masses = torch.tensor(mass, dtype=torch.float64).expand(rows, -1)
    probes = (1, 2, 4, 5, 6, 9)
    generator = torch.Generator().manual_seed(0)
    results = sampled.expected_weights(log_phi, masses, probes, 1, generator)
    for P, (weights, inside) in zip(probes, results, strict=True):
        wanted = exact_mixture(phi, mass, min(P, 6))
        for got, truth in zip((weights, inside), wanted, strict=True):
            assert (got > 0).all()
            stderr = got.std(0) / rows**0.5
            # 60 comparisons: one beyond 4.5 standard errors has probability 4e-4
            assert ((got.mean(0) - truth).abs() <= 4.5 * stderr + 1e-12).all(), P
        assert abs(float((weights.mean(0) * masses[0]).sum()) - 1) < 0.05


def test_sampled_figures_are_those_of_the_token_mixture(case, monkeypatch):
    """Catches the mass of the wrong cluster or of padding, and figures by cluster that are not
    those of the tokens' distribution.
    """
    monkeypatch.setattr(sampled, "expected_weights", fixed := FixedWeights())
    family = sampled.sampled_family(case.head, {"s": case.plain}, PROBES)
    rows = measured(family, case.chunk, monkeypatch)
    truth = capped(case.chunk.exact).double()
    p = truth.softmax(1)
    home = case.plain.cluster_of.long()
    best = home[truth.argmax(1)]
    for k, P in enumerate(PROBES):
        weights, inside = fixed.results[k]
        q = p * weights[:, home]
        figures = rows[f"s-p{P}"][1]
        wanted = (p * (p.log() - q.log())).sum(1)
        assert ((figures["kl"] - wanted).abs() <= 1e-6 * (1 + weights.log().abs().amax(1))).all()
        assert ((figures["tv"] - (p - q).abs().sum(1) / 2).abs() <= 1e-6 * weights.amax()).all()
        assert torch.equal(figures["agree"], inside[torch.arange(5), best])
        scored = ("centroids", "centroid_scale", "centroid_offset", "common")
        count = min(P, case.plain.clusters)
        read = sum(getattr(case.plain, name).nbytes for name in scored) + count * 4 * SIZE
        read += count * V / case.plain.clusters * (2 * D + 4)
        assert figures["bytes_read"].tolist() == pytest.approx([read] * 5)


class FixedWeights:
    """Weights that do not depend on a draw."""

    def __call__(self, log_phi, mass, probes, draws, generator):
        self.results = [
            (torch.rand(mass.shape, generator=generator).double() + 0.5, torch.rand_like(mass))
            for _ in probes
        ]
        return self.results


def test_sampled_draws_are_seeded(case):
    """Catches figures that differ from run to run, or the same noise in every chunk."""
    family = sampled.sampled_family(case.head, {"s": case.plain}, (3,))
    first, again = (dict(family.measure(case.chunk))["s-p3"]["kl"] for _ in range(2))
    assert torch.equal(first, again)
    next_chunk = dataclasses.replace(case.chunk, number=1)
    assert not torch.equal(dict(family.measure(next_chunk))["s-p3"]["kl"], first)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_low_rank_is_the_product_of_its_factors(case, weighted, dtype):
    """Catches factors that do not belong together, a bias lost, and bytes of another rank."""
    weight, bias, hidden = case.head.weight, case.head.bias, case.chunk.hidden
    moment = torch.eye(D).double()
    if weighted:
        moment = lowrank.hidden_second_moment(clustered_head(V, D, seed=3)[1][:300])
    directions = lowrank.screening_directions(weight, moment)
    factor = lowrank.low_rank(weight, directions, moment, 6, dtype, bias)
    if dtype == "bf16":
        rows = factor.rows.double()
    else:
        rows = factor.rows.codes.double() * factor.rows.scales.double()
    assert rows.shape == (V, 6)
    wanted = hidden.double() @ factor.basis.double().T @ rows.T + bias.double()
    latent = hidden.double().abs() @ factor.basis.double().abs().T
    slack = (D + 6 + 4) * 2**-24 * (latent @ rows.abs().T + 2)
    assert ((factor.logits(hidden) - wanted).abs() <= slack).all()
    factor_bytes = V * 6 * 2 if dtype == "bf16" else V * (6 + 4)
    assert factor.bytes_read == factor_bytes + 6 * D * 2 + 2 * V
    whole = lowrank.low_rank(weight, directions, moment, D, "bf16", bias).logits(hidden)
    # full rank: what is left is bf16 rounding of A, 2^-9 of each term
    basis = directions.bfloat16().double()
    inverse = moment @ basis.T @ torch.linalg.inv(basis @ moment @ basis.T)
    terms = (hidden.double() @ basis.T).abs() @ (weight.double() @ inverse).abs().T
    assert ((whole - case.chunk.exact).abs() <= 2**-8 * terms + 1e-3).all()


def test_screening_directions_are_the_best_of_their_rank():
    """Catches directions in ascending order, the rows' in place of the hidden states', or C in
    place of its root: both kinds against the bound of a float64 SVD.
    """
    weight, states = clustered_head(V, D, seed=5)
    weighted = lowrank.hidden_second_moment(states)
    for moment in (torch.eye(D).double(), weighted):
        values, vectors = torch.linalg.eigh(moment)
        moved = weight.double() @ (vectors * values.sqrt())
        spectrum = torch.linalg.svdvals(moved)
        directions = lowrank.screening_directions(weight, moment)
        for rank in (1, 5, D):
            basis = directions[:rank]
            kept = moment @ basis.T @ torch.linalg.inv(basis @ moment @ basis.T)
            rest = weight.double() - weight.double() @ kept @ basis
            left = float(((rest @ moment) * rest).sum())
            best = float(spectrum[rank:].square().sum())
            assert left == pytest.approx(best, rel=1e-6, abs=1e-6 * float(spectrum[0]) ** 2)


def test_low_rank_family_scores_the_best_exactly(case, monkeypatch):
    """Catches K rows chosen by other scores, exact rows not exact, and rows or factors not
    counted.
    """
    monkeypatch.setattr(lowrank, "RESCORED", (100, 10))
    moment = torch.eye(D).double()
    family = lowrank.low_rank_family("svd", case.head, moment)
    rows = measured(family, case.chunk, monkeypatch)
    directions = lowrank.screening_directions(case.head.weight, moment)
    assert len(rows) == 12
    for row, (logits, figures) in rows.items():
        _, dtype, rank, count = row.split("-")
        rank, count = int(rank[1:]), int(count[1:])
        factor = lowrank.low_rank(case.head.weight, directions, moment, rank, dtype, case.head.bias)
        wanted = factor.logits(case.chunk.hidden)
        best = wanted.topk(count, dim=1).indices
        wanted.scatter_(1, best, case.chunk.exact.gather(1, best))
        assert torch.equal(logits, wanted)
        assert (figures["candidates"] == count).all()
        assert (figures["bytes_read"] == factor.bytes_read + count * (2 * D + 4)).all()
        assert_figures(case.chunk, logits, figures)


def test_codes_curve_is_heads_with_those_options(case, monkeypatch):
    """Catches one head measured under several names, or the default's options changed."""
    family = families(case.head, ["codes"], case.chunk.hidden)[0]
    rows = measured(family, case.chunk, monkeypatch)
    for row, (logits, figures) in rows.items():
        budget = float(row.removeprefix("codes-kl"))
        options = dataclasses.replace(case.codes.options, kl_budget=budget)
        index = dataclasses.replace(case.codes, options=options)
        wanted = FlashHead(case.head, index, impl="reference").search(case.chunk.hidden)
        assert torch.equal(logits, wanted.logits)
        assert torch.equal(figures["bytes_read"], wanted.bytes_read)
        assert_figures(case.chunk, logits, figures)
    reads = [
        float(rows[f"codes-kl{x}"][1]["bytes_read"].double().mean()) for x in ("0.01", "5e-05")
    ]
    assert reads[0] < reads[1]


@pytest.mark.parametrize("probability", [1e-6, 0.01, 0.0])
def test_certified_is_the_search_for_the_winner(case, monkeypatch, probability):
    """Catches another failure probability than the one asked for, complete logits paid for, and a
    deterministic bound that is none.
    """
    family = families(case.head, ["certified"], failure_probability=probability)[0]
    assert family.rows == {"certified": ("certified", f"p={probability:g}")}
    _, figures = measured(family, case.chunk, monkeypatch)["certified"]
    codes, plan = case.codes, make_plan(case.codes)
    how = {"failure_probability": probability, "winner_only": True}
    args = (case.chunk.hidden, case.head.weight, case.head.bias.float(), codes, plan)
    wanted = search_codes(*args, "reference", **how)
    truth = capped(case.chunk.exact)
    agree = truth.gather(1, wanted.tokens[:, None])[:, 0] == truth.amax(1)
    assert torch.equal(figures["agree"], agree)
    assert figures["agree"].all()
    for name in ("bytes_read", "candidates", "certified", "fallback"):
        assert torch.equal(figures[name], getattr(wanted, name))
    whole = case.head.search(case.chunk.hidden)
    if probability > 0:
        assert (figures["bytes_read"] <= whole.bytes_read).all()
    assert "kl" not in figures


def test_certified_without_codes_wants_states(case):
    """Catches a codes index built from nothing beside a head of clusters."""
    linear = make_linear(case.head.weight, case.head.bias)
    head = FlashHead(linear, case.plain, impl="reference", sample=case.chunk.hidden)
    with pytest.raises(FlashHeadError, match=r"'certified'.*calibration"):
        families(head, ["certified"])
    with pytest.raises(FlashHeadError, match=r"failure_probability=0\.5"):
        families(case.head, ["certified"], failure_probability=0.5)


@pytest.mark.parametrize("name", ["bf16", "int8", "fp8", "int4", "int4-g128"])
def test_dense_methods(monkeypatch, name):
    """Catches two names for one head, a group that is not the name's, and figures of other
    logits.
    """
    rows, d = 50, 200
    weight, states = clustered_head(rows, d, states=6)
    states, bias = states.bfloat16(), torch.linspace(-1, 1, rows).bfloat16()
    head = FlashHead(make_linear(weight, bias), None)
    exact = baselines.float32_logits(states, weight, bias)
    chunk = Chunk(states, exact, Reference(exact, torch.float32), lambda x: x, 0)
    logits, figures = measured(families(head, [name])[0], chunk, monkeypatch)[name]
    assert_figures(chunk, logits, figures)
    wanted = {
        "bf16": 2 * rows * d,
        "int8": rows * (d + 4),
        "fp8": rows * (d + 4),
        "int4": rows * (d // 2 + 7 * 2),
        "int4-g128": rows * (d // 2 + 2 * 2),
    }
    assert (figures["bytes_read"] == wanted[name] + 2 * rows).all()


def test_everything_on_one_text(tmp_path):
    """Catches a method that breaks on a real run (several chunks, a window's end), a row without a
    place in the plot, a document that is no JSON, or float32 metrics that change a figure.
    """
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    weight = torch.randn(TINY_V, 40, generator=torch.Generator().manual_seed(1)).bfloat16()
    model = TinyModel(nn.Linear(40, TINY_V))
    states = torch.randn(200, 40, generator=torch.Generator().manual_seed(2)).bfloat16()
    codes = build_codes(weight, CodesOptions(bits=1.0), states)
    model.head = FlashHead(make_linear(weight, None), codes, impl="reference", sample=states[:4])
    run = {"methods": METHODS, "calibration": states, "progress": False}
    documents = [
        evaluate_head(model, ByteTokenizer(BOS), path, 40, precision=precision, **run)
        for precision in (torch.float64, torch.float32)
    ]
    json.dumps(documents, allow_nan=False)
    assert set(documents[0]["ms_per_position"]) == {"truth", *METHODS}
    slow, fast = (document["methods"] for document in documents)
    assert slow.keys() == fast.keys()
    for name, row in slow.items():
        assert row["series"]
        assert row["point"]
        assert row["bytes_fraction"] > 0
        assert row["agreement"] == pytest.approx(fast[name]["agreement"], abs=1e-9)
        if name == "certified":
            assert row["kl"] is None
            continue
        assert row["kl"] == pytest.approx(fast[name]["kl"], abs=1e-6 * (1 + row["kl"]))
    certified = documents[0]["methods"]["certified"]
    assert documents[0]["failure_probability"] == 1e-6
    assert documents[0]["certified_agreement"] == certified["agreement"] == 1
    assert documents[0]["certified_bytes_fraction"] == certified["bytes_fraction"]
    assert documents[0]["certified_wrong"] == certified["certified_wrong"] == 0
    assert documents[0]["fallback_fraction"] == certified["fallback_fraction"]
    table = format_table(documents[1])
    assert all(name in table for name in slow if name != "flashhead")
    assert "certified greedy (p=1e-06)" in table


def test_mistakes_are_named(case):
    """Catches a misspelt method that is skipped, and clusters built from no calibration states."""
    with pytest.raises(FlashHeadError, match="methods='int3': wanted flashhead, certified"):
        families(case.head, ["int8", "int3"])
    with pytest.raises(FlashHeadError, match=r"'clusters'.*calibration"):
        families(case.head, [*TABLE_METHODS, "clusters"])
    for build in (
        lambda: sampled.sampled_family(case.head, {"s": case.clusters}),
        lambda: probed.clusters_codes_family(case.head, case.clusters, case.codes, "reference"),
    ):
        with pytest.raises(ValueError, match=r"always=\[5, 7\]"):
            build()


def test_a_method_without_a_distribution(case):
    """Catches a greedy method, which has no KL, that cannot be a row of the table."""

    def greedy(chunk):
        yield "greedy", {"agree": torch.ones(5), "bytes_read": torch.full((5,), 100)}

    family = Family("greedy", {"greedy": ("greedy", "p=1e-6")}, greedy)
    document = measure(case.head, [family], iter([case.chunk.hidden]), 5, capped, progress=False)
    row = document["methods"]["greedy"]
    assert (row["kl"], row["tv"], row["agreement"]) == (None, None, 1.0)
    assert row["bytes_fraction"] == 100 / (2 * (V * D + V))
    assert Totals({"agree": [torch.tensor([0.25])], "bytes_read": [torch.ones(1)]}).row(1)[
        "disagreements"
    ] == round(0.75)
