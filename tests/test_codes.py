"""The codes index: what is stored stands for the rows, and its error is what it says."""

import dataclasses

import pytest
import torch
from conftest import clustered_head
from hypothesis import given, settings
from hypothesis import strategies as st

from flashhead.errors import FlashHeadError
from flashhead.index.build_codes import build_codes
from flashhead.index.codes import CodesIndex
from flashhead.nn.search import search_codes
from flashhead.ops.refine.api import refine
from flashhead.ops.scan.api import scan
from flashhead.ops.scan.query import make_plan, make_query
from flashhead.options import CodesOptions

BF16_EPS = 2.0**-8


def estimate(weight, hidden, index):  # type: ignore[no-untyped-def]
    """Base estimates and their standard errors."""
    plan = make_plan(index)
    query = make_query(hidden, index, plan, impl="reference")
    factors = query.base_variance
    variance = (
        factors[:, :1] * index.error[0].float() ** 2 + factors[:, 1:] * index.scale.float() ** 2
    )
    return scan(query, index, plan, None, impl="reference"), variance.sqrt()


@pytest.mark.parametrize("bits", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("calibrated", [True, False])
def test_error_model_is_calibrated(bits: float, calibrated: bool) -> None:
    """Catches a wrong share, a missing rounding term or a rotation that is none:
    sigma must be the real error.
    """
    weight, hidden = clustered_head(4096, 192, states=4352)
    index = build_codes(weight, CodesOptions(bits=bits), hidden[:4096] if calibrated else None)
    approximate, sigma = estimate(weight, hidden[4096:], index)
    standardised = (hidden[4096:].double() @ weight.double().T - approximate) / sigma
    assert 0.95 <= standardised.std() <= 1.1
    assert (standardised.abs() > 4).double().mean() < 3e-4  # Gaussian: 6.3e-5


def test_more_bits_mean_less_error() -> None:
    """Catches planes that are read in the wrong order:
    the refinement must take off two thirds of the error.
    """
    weight, hidden = clustered_head(1000, 100)
    index = build_codes(weight, CodesOptions(bits=2.0), hidden)
    plan = make_plan(index)
    query = make_query(hidden[:8], index, plan, impl="reference")
    base = scan(query, index, plan, None, impl="reference")
    rows = torch.arange(1000)
    truth = hidden[:8].double() @ weight.double().T
    for n in range(8):
        refined = refine(query, n, index, rows, base[n], impl="reference")
        before, after = (base[n] - truth[n]).square().mean(), (refined - truth[n]).square().mean()
        assert after < before / 3
        factors = query.refined_variance[n]
        predicted = (
            factors[0] * index.error[1].double() ** 2 + factors[1] * index.scale.double() ** 2
        )
        assert 0.7 < after / predicted.mean() < 1.4


def test_calibration_buys_accuracy() -> None:
    """Catches a transform that ignores the hidden states:
    on a steep spectrum it must more than halve the error.
    """
    weight, hidden = clustered_head(4096, 192)
    errors = []
    for states in (hidden[:256], None):
        index = build_codes(weight, CodesOptions(bits=1.0), states)
        approximate, _ = estimate(weight, hidden[256:], index)
        errors.append((hidden[256:].double() @ weight.double().T - approximate).square().mean())
    assert errors[0] < errors[1] / 1.5


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([0.25, 1.0, 3.0]), st.integers(0, 5))
def test_any_shape_round_trips(rows: int, d: int, bits: float, seed: int) -> None:
    """Catches padding mistakes: any V and d, V not divisible by 16, d = 1;
    both kernels agree, bounds hold.
    """
    weight, hidden = clustered_head(rows, d, seed)
    index = build_codes(weight, CodesOptions(bits=bits), hidden[:64])
    again = CodesIndex.from_tensors(index.tensors(), index.metadata())
    assert again.segments == index.segments
    assert again.options == index.options
    plan = make_plan(again)
    outputs = {
        impl: search_codes(hidden[:3], weight, None, again, plan, impl)
        for impl in ("reference", "cpu")
    }
    truth = hidden[:3].double() @ weight.double().T
    spread = truth.abs().max() + 1e-6
    for output in outputs.values():
        best = output.logits.argmax(1)
        assert torch.isfinite(output.logits).all()
        exact = truth.gather(1, best[:, None])[:, 0]
        assert ((truth.amax(1) - exact) <= 1e-5 * spread).all()
    assert torch.allclose(
        outputs["cpu"].logits, outputs["reference"].logits, atol=float(1e-5 * spread)
    )


@pytest.mark.parametrize("kind", ["zero", "duplicate", "one"])
def test_degenerate_rows(kind: str) -> None:
    """Catches a division by a zero norm and a covariance of rank zero."""
    weight, hidden = clustered_head(64, 24)
    if kind == "zero":
        weight[::2] = 0
    elif kind == "duplicate":
        weight[:] = weight[0]
    else:
        weight = weight[:1]
    index = build_codes(weight, CodesOptions(), hidden)
    output = search_codes(hidden[:4], weight, None, index, make_plan(index), "cpu")
    truth = hidden[:4].float() @ weight.float().T
    rows = torch.arange(4), truth.argmax(1)
    assert torch.allclose(output.logits[rows], truth[rows], atol=1e-3)
    assert torch.isfinite(output.logits).all()


def test_estimates_of_the_rest_spend_at_most_the_budget() -> None:
    """Catches a selection that drops rows the distribution needs:
    mean KL stays near the budget or below.
    """
    weight, hidden = clustered_head(8192, 96)
    index = build_codes(weight, CodesOptions(kl_budget=1e-3), hidden[:256])
    output = search_codes(hidden[256:], weight, None, index, make_plan(index), "cpu")
    assert (output.candidates < 8192).any()
    dense = torch.log_softmax(hidden[256:].double() @ weight.double().T, 1)
    ours = torch.log_softmax(output.logits.double(), 1)
    assert (dense.exp() * (dense - ours)).sum(1).mean() < 1.5e-3


def test_certificate_needs_the_whole_bound() -> None:
    """Catches a bound with half the z:
    with it, argmax misses must appear that the full z does not have.
    """
    weight, hidden = clustered_head(8192, 96)
    index = build_codes(weight, CodesOptions(bits=0.5, kl_budget=1.0), hidden[:64])
    truth = (hidden.double() @ weight.double().T).argmax(1)
    missed = {}
    for z in (4.0, 0.25):
        searched = dataclasses.replace(index, options=CodesOptions(bits=0.5, kl_budget=1.0, z=z))
        output = search_codes(hidden, weight, None, searched, make_plan(index), "cpu")
        missed[z] = int((output.logits.argmax(1) != truth).sum())
    assert missed[4.0] == 0
    assert missed[0.25] > 0


def test_bytes_are_counted() -> None:
    """Catches an estimate in place of a count:
    every tensor that is read appears with its own size.
    """
    weight, hidden = clustered_head(1000, 64)
    index = build_codes(weight, CodesOptions(), hidden)
    output = search_codes(hidden[:2], weight, None, index, make_plan(index), "cpu")
    scanned = (
        index.base.nbytes + index.scale.nbytes + index.error[0].nbytes + index.direction.nbytes
    )
    fixed = scanned + index.transform.nbytes + index.exact.nbytes
    assert index.scan_bytes == fixed
    assert (output.bytes_read >= fixed + output.candidates * 128).all()


@pytest.mark.parametrize(
    "name", ["base", "refine", "scale", "error", "direction", "exact", "transform"]
)
def test_wrong_tensors_are_refused(name: str) -> None:
    """Catches a kernel that would read beyond a tensor a stranger cut short."""
    weight, hidden = clustered_head(64, 24)
    index = build_codes(weight, CodesOptions(), hidden)
    tensors = index.tensors()
    tensors[name] = tensors[name][..., :-1]
    with pytest.raises(FlashHeadError, match=name):
        CodesIndex.from_tensors(tensors, index.metadata())
    del tensors[name]
    with pytest.raises(FlashHeadError, match=name):
        CodesIndex.from_tensors(tensors, index.metadata())


def test_bad_inputs_are_named() -> None:
    """Catches NaN weights that would become an index, and options nobody knows."""
    weight, hidden = clustered_head(64, 24)
    broken = weight.clone()
    broken[3, 3] = float("nan")
    with pytest.raises(FlashHeadError, match="NaN"):
        build_codes(broken, CodesOptions(), hidden)
    with pytest.raises(FlashHeadError, match=r"\[tokens, 24\]"):
        build_codes(weight, CodesOptions(), hidden[:, :5])
    with pytest.raises(FlashHeadError, match="bits=9"):
        CodesOptions(bits=9)
