"""The CPU kernels against the reference, with and without the dot-product instruction."""

import pytest
import torch
from conftest import clustered_head

from flashhead.errors import FlashHeadError
from flashhead.index.build_codes import build_codes
from flashhead.ops import simd
from flashhead.ops.dispatch import resolve_impl
from flashhead.ops.refine.api import refine
from flashhead.ops.rescore.api import rescore
from flashhead.ops.scan.api import scan
from flashhead.ops.scan.query import make_plan, make_query
from flashhead.ops.select.api import select
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
@pytest.mark.parametrize("biased", [False, True])
def test_scan_and_refine_equal_the_reference(
    shape: tuple[int, int], biased: bool, vnni: bool
) -> None:
    """Catches a wrong field order, a lost run, a tail block read or written past its end."""
    weight, hidden = clustered_head(*shape)
    index = build_codes(weight, CodesOptions(bits=1.5), hidden)
    bias = torch.randn(shape[0]) if biased else None
    plan = make_plan(index)
    query = make_query(hidden[:5], index, plan, impl="reference")
    for name, tensor in vars(make_query(hidden[:5], index, plan, impl="cpu")).items():
        assert torch.allclose(tensor.float(), getattr(query, name).float(), rtol=1e-5), name
    wanted = scan(query, index, plan, bias, impl="reference")
    got = scan(query, index, plan, bias, impl="cpu")
    assert (got - wanted).abs().max() <= 4e-6 * wanted.abs().max()
    rows = torch.randperm(shape[0])[: shape[0] // 2 + 1]
    for n in range(5):
        estimates = wanted[n, rows].contiguous()
        a = refine(query, n, index, rows, estimates, impl="reference")
        b = refine(query, n, index, rows, estimates, impl="cpu")
        assert (a - b).abs().max() <= 4e-6 * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rescore_is_as_exact_as_float32(dtype: torch.dtype) -> None:
    """Catches accumulation in a narrower type: the error is bounded by that of eager float32."""
    torch.manual_seed(0)
    weight, hidden = torch.randn(500, 333).to(dtype), torch.randn(333)
    rows, bias = torch.randperm(500)[:123], torch.randn(500)
    truth = weight[rows].double() @ hidden.double() + bias[rows].double()
    eager = (rescore(hidden, weight, bias, rows, impl="reference") - truth).abs().max()
    ours = (rescore(hidden, weight, bias, rows, impl="cpu") - truth).abs().max()
    assert ours <= 4 * max(float(eager), 1e-6)


@pytest.mark.parametrize("count", [1, 2, 100, 8192, 20001])
@pytest.mark.parametrize("budget", [1e-6, 1e-3, 0.5])
def test_select_equals_the_reference(count: int, budget: float) -> None:
    """Catches a bin lost between chunks, an unsorted result, a bound that forgets a row."""
    torch.manual_seed(count)
    estimates = 3 * torch.randn(count)
    error, scale = (torch.rand(count) + 0.1).bfloat16(), torch.rand(count).bfloat16()
    factors = torch.tensor([0.05, 0.01])
    a, upper_a = select(estimates, error, scale, factors, 4.0, budget, impl="reference")
    b, upper_b = select(estimates, error, scale, factors, 4.0, budget, impl="cpu")
    assert torch.equal(a, b)
    assert upper_a == pytest.approx(upper_b, rel=1e-6)


def test_select_meets_the_budget_by_brute_force() -> None:
    """Catches a histogram that undercounts: the cost of the rows left is summed here row by row."""
    torch.manual_seed(1)
    estimates, ones = 2 * torch.randn(5000), torch.ones(5000).bfloat16()
    factors = torch.tensor([0.3, 0.0])
    chosen, upper = select(estimates, ones, ones, factors, 1e-3, 1e-2, impl="cpu")
    left = torch.ones(5000, dtype=torch.bool)
    left[chosen] = False
    mass = torch.softmax(estimates.double(), 0)
    assert (mass[left] * 0.15).sum() <= 1.1e-2
    assert (mass[left] * 0.15).sum() >= 0.8e-2
    assert upper >= float(estimates[left].max())


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
