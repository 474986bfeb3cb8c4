"""Tests of the sampler: statistics against closed forms, power against wrong samplers."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import clustered_head
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flashhead.errors import FlashHeadError
from flashhead.evaluate import fit
from flashhead.evaluate.baselines import float32_logits
from flashhead.evaluate.sampling import evaluate_draws, evaluate_sampling, format_table
from flashhead.nn.candidates import Candidates, complete
from flashhead.nn.sampling import allowed, sample
from flashhead.options import Sampling

V, D = 600, 24


class Exact(nn.Linear):
    """A head that draws by the contract, from dense logits; wrong ones change them."""

    def __init__(self) -> None:
        weight, hidden = clustered_head(V, D, states=60)
        super().__init__(D, V, bias=False)
        self.weight = nn.Parameter(weight / 4, requires_grad=False)
        self.hidden = hidden

    def forward(self, hidden: Tensor) -> Tensor:
        return float32_logits(hidden.reshape(-1, D), self.weight).view(*hidden.shape[:-1], V)

    def draws(
        self,
        hidden: Tensor,
        count: int,
        sampling: Sampling,
        first_step: int = 0,
        failure_probability: float = 1e-6,
    ) -> Tensor:
        known: Candidates | None = complete(self.changed(self(hidden)[0]))
        if sampling.filters:
            known = allowed(known, sampling)
        assert known is not None
        return sample(known, sampling, first_step + torch.arange(count), impl="cpu")

    def changed(self, logits: Tensor) -> Tensor:
        return logits


class Hot(Exact):
    """Its temperature is off by 5 %."""

    def changed(self, logits: Tensor) -> Tensor:
        return logits / 1.05


class Truncated(Exact):
    """As published for clusters: rows outside the best clusters of 16 are never drawn."""

    def changed(self, logits: Tensor) -> Tensor:
        clusters = logits[: V // 16 * 16].view(-1, 16)
        best = clusters.logsumexp(1).topk(20).indices
        kept = torch.full_like(logits, -math.inf)
        kept[: clusters.numel()].view(-1, 16)[best] = clusters[best]
        return kept


class Leaky(Exact):
    """Its nucleus is that of top_p + 0.02."""

    def draws(self, hidden: Tensor, count: int, sampling: Sampling, *rest: object) -> Tensor:
        if sampling.top_p is not None:
            sampling = Sampling(temperature=1.0, top_p=sampling.top_p + 0.02, seed=sampling.seed)
        return super().draws(hidden, count, sampling, *rest)  # type: ignore[arg-type]


def verdicts(
    head: Exact, temperatures: tuple = (1.0,), states: int = 10, each: int = 20_000
) -> tuple[list, dict]:
    return evaluate_draws(head, head.hidden[:states], each, temperatures, 0.9)


def test_an_exact_sampler_passes() -> None:
    """Catches expected counts of another temperature, a bin that is lost, noise used twice."""
    rows, nucleus = verdicts(Exact(), (0.5, 1.0, 1.5))
    assert not any(row["rejected"] for row in rows)
    assert all(row["p_value"] > 0.01 for row in rows)
    assert nucleus["outside"] == 0
    assert nucleus["equivalent"]
    assert 0 < nucleus["tv_limit"] < 0.01


def test_p_values_of_an_exact_sampler_are_uniform() -> None:
    """Catches a test that rejects nothing, or too much: bins too small, a missing correction."""
    head = Exact()
    rows, _ = evaluate_draws(head, head.hidden, 2000, (0.7, 1.0, 1.5), 0.9, seed=5)
    p = torch.tensor([p for row in rows for p in row["p_values"]]).double().sort().values
    n = len(p)
    ranks = torch.arange(1, n + 1).double() / n
    distance = max(float((ranks - p).max()), float((p - ranks + 1 / n).max()))
    assert n == 180
    assert distance * math.sqrt(n) < 1.63  # Kolmogorov-Smirnov: one seed in a hundred exceeds it


@pytest.mark.parametrize("head", [Hot, Truncated], ids=lambda head: head.__name__)
def test_a_wrong_sampler_is_rejected(head: type) -> None:
    """Catches a test without power: temperature off by 5 %, a tail that clusters cut off."""
    rows, nucleus = verdicts(head())
    assert all(row["rejected"] for row in rows)
    assert not nucleus["equivalent"]


def test_a_wrong_nucleus_is_not_equivalent() -> None:
    """Catches an equivalence test that looks inside the nucleus only."""
    rows, nucleus = verdicts(Leaky())
    assert not any(row["rejected"] for row in rows)
    assert nucleus["outside"] > 0
    assert not nucleus["equivalent"]


def test_too_few_draws_show_no_equivalence() -> None:
    """Catches "not rejected" taken for "equivalent"."""
    _, nucleus = verdicts(Exact(), each=150)
    assert nucleus["outside"] == 0
    assert not nucleus["equivalent"]


def test_every_draw_has_its_own_step() -> None:
    """Catches states that share noise: their p-values would not be independent."""
    head = Exact()
    used: list[int] = []

    def draws(hidden: Tensor, count: int, sampling: Sampling, first: int, _: float) -> Tensor:
        used.extend(range(first, first + count))
        return torch.zeros(count, dtype=torch.int64)

    head.draws = draws  # type: ignore[method-assign,assignment]
    verdicts(head, (0.5, 1.0, 1.5), states=3, each=100)
    assert len(set(used)) == len(used) == 4 * 3 * 100


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 60), min_size=1, max_size=200))
def test_bins_are_large_enough_and_lose_nothing(values: list[float]) -> None:
    """Catches a bin below ten, and a token in no bin."""
    expected = torch.tensor(values, dtype=torch.float64)
    bins = fit.pooled(expected)
    sums = fit.binned(expected, bins)
    assert bins.min() >= 0
    assert float(sums.sum()) == pytest.approx(float(expected.sum()))
    if float(expected.sum()) >= 10:
        assert float(sums.min()) >= 10
    alone = expected >= 20
    assert len(set(bins[alone].tolist())) == int(alone.sum())


def test_distributions_are_the_closed_forms() -> None:
    """Catches swapped arguments and upper for lower tails."""
    for dof, x in ((2, 3.0), (10, 4.0), (200, 260.0)):
        terms = (math.exp(k * math.log(x / 2) - math.lgamma(k + 1)) for k in range(dof // 2))
        assert fit.chi2_sf(x, dof) == pytest.approx(math.exp(-x / 2) * math.fsum(terms), rel=1e-9)
    assert fit.chi2_sf(3.841458820694124, 1) == pytest.approx(0.05)
    assert fit.fisher([0.5]) == pytest.approx(0.5)
    assert fit.fisher([0.05, 0.05]) == pytest.approx(0.0025 * (1 - math.log(0.0025)))
    assert fit.poisson_limit(0, 0.025) == pytest.approx(-math.log(0.025))
    assert fit.poisson_limit(5, 0.025) == pytest.approx(11.66833, rel=1e-5)
    assert fit.noncentral_cdf(12.0, 10, 0.0) == pytest.approx(1 - fit.chi2_sf(12.0, 10))
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(200_000, 6, generator=generator, dtype=torch.float64)
    normal[:, 0] += math.sqrt(9)
    share = float((normal.square().sum(1) <= 14).double().mean())
    assert fit.noncentral_cdf(14.0, 6, 9.0) == pytest.approx(share, abs=0.004)
    limit = fit.noncentrality_limit(2000.0, 2000, 0.025)
    assert fit.noncentral_cdf(2000.0, 2000, limit) == pytest.approx(0.025, rel=1e-6)
    assert fit.noncentrality_limit(1.0, 2000, 0.025) == 0


def test_a_g_test_by_hand() -> None:
    """Catches a missing factor of two and a wrong correction."""
    g, dof = fit.g_test(torch.tensor([30.0, 70.0]), torch.tensor([50.0, 50.0]))
    plain = 2 * (30 * math.log(0.6) + 70 * math.log(1.4))
    assert dof == 1
    assert g == pytest.approx(plain / (1 + 3 / 600))


class Words:
    """Characters as tokens."""

    bos_token_id = 1

    def __call__(self, text: str, **_: object) -> dict:
        return {"input_ids": [2 + ord(character) % (V - 2) for character in text]}


class Model(nn.Module):
    """Hidden states that depend on the token, then the head."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head, self.device, self.name_or_path = head, torch.device("cpu"), "tiny"
        self.config = SimpleNamespace()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.head.hidden[input_ids % 60]))


def test_from_a_text_to_the_document(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Catches a document that is not JSON, and states of one window only."""
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(97 + i * i % 23) for i in range(900)))
    arguments = (Words(), path, 40_000, (1.0, 1.5))
    document = evaluate_sampling(Model(Exact()), *arguments, states=8, progress=False)  # type: ignore[arg-type]
    assert document["passed"] in (True, False)
    assert document["draws"] == 40_000
    assert len(document["temperatures"][0]["p_values"]) == 8
    assert len(set(document["temperatures"][0]["p_values"])) > 1
    json.dumps(document, allow_nan=False)
    assert "T = 1.5" in format_table(document)
    assert "top_p = 0.9" in format_table(document)
    with pytest.raises(FlashHeadError, match="draws=700: wanted 100 or more for each of 8"):
        evaluate_sampling(Model(Exact()), Words(), path, 700, (1.0,), states=8)  # type: ignore[arg-type]
    with pytest.raises(FlashHeadError, match="Linear as its head"):
        evaluate_sampling(Model(nn.Linear(2, 3)), *arguments)  # type: ignore[arg-type]
