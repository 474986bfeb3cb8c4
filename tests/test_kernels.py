"""The CPU kernels against the reference, with and without the dot-product instruction."""

import math

import numpy as np
import pytest
import torch
from conftest import clustered_head

from flashhead.errors import FlashHeadError
from flashhead.index.build_codes import build_codes
from flashhead.ops import simd
from flashhead.ops.cascade.api import cascade
from flashhead.ops.cascade.reference import mass_rule
from flashhead.ops.dispatch import resolve_impl
from flashhead.ops.refine.api import refine
from flashhead.ops.rescore.api import rescore
from flashhead.ops.scan.api import scan
from flashhead.ops.scan.query import make_plan, make_query
from flashhead.options import CodesOptions

SHAPES = [(1024, 64), (1003, 65), (77, 200), (5, 17), (2049, 576)]


@pytest.fixture(params=[True, False], ids=["vnni", "portable"])
def vnni(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run with the instruction, if this processor has it, and without."""
    if request.param and not simd.has_vnni():
        pytest.skip("this processor has no AVX-512 VNNI")
    monkeypatch.setattr(simd, "has_vnni", lambda: request.param)
    return bool(request.param)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biases", [0, 1, 6])
def test_scan_and_refine_equal_the_reference(
    shape: tuple[int, int], biases: int, vnni: bool
) -> None:
    """Catches a wrong field order, a lost run, a tail block read or written past its end, a bias of
    another query; 6 queries take the loop of four and that of one.
    """
    weight, hidden = clustered_head(*shape)
    index = build_codes(weight, CodesOptions(bits=1.8, planes=2), hidden)
    bias = torch.randn(biases, shape[0]) if biases else None
    plan = make_plan(index)
    query = make_query(hidden[:6], index, plan, 1e-6)
    wanted = scan(query, index, plan, bias, impl="reference")
    got = scan(query, index, plan, bias, impl="cpu")
    assert (got - wanted).abs().max() <= 4e-6 * wanted.abs().max()
    rows = torch.randperm(shape[0])[: shape[0] // 2 + 1]
    for n in range(6):
        estimates = wanted[n, rows].contiguous()
        for plane in (1, 2):
            a = refine(query, n, index, plan, plane, rows, estimates, impl="reference")
            b = refine(query, n, index, plan, plane, rows, estimates, impl="cpu")
            assert (a - b).abs().max() <= 4e-6 * wanted.abs().max()


@pytest.mark.parametrize("shape", [(3000, 64), (1003, 65), (40_000, 48), (77, 200)])
@pytest.mark.parametrize("budget", [None, 1e-3, 1e-6])
@pytest.mark.parametrize("planes", [1, 2])
def test_cascade_equals_the_reference(
    shape: tuple[int, int], budget: float | None, planes: int, vnni: bool
) -> None:
    """Catches a rule that differs, a bin lost between tasks, a row that is dropped or doubled, a
    sample of blocks with other weights (40,000 rows).
    """
    weight, hidden = clustered_head(*shape)
    index = build_codes(weight, CodesOptions(bits=2.0, planes=planes), hidden)
    plan, states = make_plan(index), hidden[:6] / 4
    a = cascade(states, weight, None, index, plan, 1e-6, budget, impl="reference")
    b = cascade(states, weight, None, index, plan, 1e-6, budget, impl="cpu")
    assert torch.equal(a.tokens, b.tokens)
    assert (a.best - b.best).abs().max() <= 4e-6 * a.best.abs().max()
    # float32 sums in another order move a row at the edge of a rule to its other side
    assert (a.read - b.read).abs().max() <= 2 + a.read.max() // 500
    for n in range(6):
        for found in (a, b):
            assert torch.equal(found.exact[n].long(), found.exact[n].long().unique())
            assert len(found.exact[n]) == found.read[n, -1]
        same = torch.isin(a.exact[n].long(), b.exact[n].long())
        assert (~same).sum() <= 2 + len(same) // 500
    # a query coordinate between two integers may be rounded to the other one: 1e-3 nats
    assert (b.upper >= a.upper - 1e-2).all()


def test_cascade_with_a_bias_of_each_row() -> None:
    """Catches a bias that the exact scores forget, and rows at -inf that are chosen."""
    weight, hidden = clustered_head(3000, 64)
    index = build_codes(weight, CodesOptions(bits=2.0), hidden)
    bias = 4 * torch.randn(5, 3000)
    bias[:, ::3] = -math.inf
    truth = hidden[:5].double() @ weight.double().T + bias.double()
    for impl in ("cpu", "reference"):
        found = cascade(hidden[:5], weight, bias, index, make_plan(index), 1e-6, None, impl=impl)
        assert torch.equal(found.tokens, truth.argmax(1))
        assert (found.best - truth.amax(1)).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rescore_is_as_exact_as_float32(dtype: torch.dtype) -> None:
    """Catches accumulation in a narrower type: the error is bounded by that of eager float32."""
    torch.manual_seed(0)
    weight, hidden = torch.randn(500, 333).to(dtype), torch.randn(333)
    weight[:5] *= 1e-4  # float16: below its normal numbers
    rows, bias = torch.randperm(500)[:123], torch.randn(500)
    truth = weight[rows].double() @ hidden.double() + bias[rows].double()
    eager = (rescore(hidden, weight, bias, rows, impl="reference") - truth).abs().max()
    ours = (rescore(hidden, weight, bias, rows, impl="cpu") - truth).abs().max()
    assert ours <= 4 * max(float(eager), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_cascade_takes_other_weights(dtype: torch.dtype) -> None:
    """Catches a kernel that reads float16 or float32 weights as bfloat16."""
    weight, hidden = clustered_head(2000, 64)
    weight = weight.to(dtype)
    index = build_codes(weight, CodesOptions(bits=2.0), hidden)
    found = cascade(hidden[:5], weight, None, index, make_plan(index), 1e-6, 1e-3, impl="cpu")
    truth = hidden[:5].double() @ weight.double().T
    assert torch.equal(found.tokens, truth.argmax(1))
    assert (found.best - truth.amax(1)).abs().max() < 1e-3


def test_the_fast_exponential() -> None:
    """Catches a wrong coefficient, and what happens below the range of float32."""
    import numba

    @numba.njit(fastmath=simd.FASTMATH)
    def apply(x, out):  # type: ignore[no-untyped-def]
        for i in range(x.shape[0]):
            out[i] = simd.fast_exp(x[i])

    x = np.linspace(-84, 80, 100_001).astype(np.float32)
    out = np.empty_like(x)
    apply(x, out)
    assert np.abs(out / np.exp(x.astype(np.float64)) - 1).max() < 4e-6
    apply(np.full(1, -1e30, np.float32), out)
    assert 0 < out[0] < 1e-36


def test_the_mass_rule_by_brute_force() -> None:
    """Catches a histogram that undercounts: what is left is summed here row by row."""
    torch.manual_seed(1)
    gap, loss = 12 * torch.rand(5000), torch.rand(5000).double()
    needed = mass_rule(gap, loss, 100.0)
    assert loss[~needed].sum() <= 100
    # one bin more would be too much
    edge = gap[needed].max()
    assert loss[gap >= (edge * 16).floor() / 16].sum() > 100
    assert mass_rule(gap, loss, -1.0).all()
    assert not mass_rule(gap, loss, 1e9).any()


def test_an_explicit_choice_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a silent fallback, and a search of CPU tensors for a head elsewhere."""
    for impl in ("auto", "cpu", "reference"):
        with pytest.raises(FlashHeadError, match="'meta'"):
            resolve_impl(impl, torch.device("meta"))
    with pytest.raises(FlashHeadError, match="wanted one of"):
        resolve_impl("fast", torch.device("cpu"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(FlashHeadError, match="pip install"):
        resolve_impl("cpu", torch.device("cpu"))
