"""The codes index: what is stored stands for the rows, and its error is what it says."""

import dataclasses

import pytest
import torch
from conftest import clustered_head
from hypothesis import given, settings
from hypothesis import strategies as st

from flashhead.errors import FlashHeadError
from flashhead.index.bound import z_score
from flashhead.index.build_codes import build_codes, build_codes_expecting
from flashhead.index.choose import allocate
from flashhead.index.codes import CodesIndex
from flashhead.nn.search import search_codes
from flashhead.ops.cascade.api import cascade
from flashhead.ops.refine.api import refine
from flashhead.ops.scan.api import scan, variances
from flashhead.ops.scan.query import make_plan, make_query
from flashhead.options import CodesOptions

DELTA = 1e-6


def stages_of(weight, hidden, index):  # type: ignore[no-untyped-def]
    """Estimates and standard errors of all rows at each stage."""
    plan = make_plan(index)
    query = make_query(hidden, index, plan, DELTA)
    estimates = scan(query, index, plan, None, impl="reference")
    rows = torch.arange(index.vocab_size)
    yield estimates, variances(query, index, 0).sqrt()
    for plane in range(1, plan.stages):
        finer = [
            refine(query, n, index, plan, plane, rows, row, impl="reference")
            for n, row in enumerate(estimates)
        ]
        estimates = torch.stack(finer)
        yield estimates, variances(query, index, plane).sqrt()


@pytest.mark.parametrize("bits", [1.0, 1.5, 4.0])
@pytest.mark.parametrize("calibrated", [True, False])
def test_error_model_is_calibrated(bits: float, calibrated: bool) -> None:
    """Catches a wrong error table, a missing rounding term, a rotation that is none, a biased
    plane: sigma must be the real error at every stage, for the winning rows too.

    An index without calibration takes all directions for equally likely, so it is asked about such
    hidden states. Those of the head share most of their direction, 256 of them are a sample of one:
    the standard error of the deviation is then 3 % at the last stage, instead of 0.2 %.
    """
    weight, hidden = clustered_head(4096, 192, states=4352)
    options = CodesOptions(bits=bits, planes=2)
    index = build_codes(weight, options, hidden[:4096] if calibrated else None)
    hidden = hidden[4096:]
    if not calibrated:
        hidden = 4 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    truth = hidden.double() @ weight.double().T
    winners = truth.argmax(1, keepdim=True)
    for estimates, sigma in stages_of(weight, hidden, index):
        standardised = (estimates - truth) / sigma
        assert 0.95 <= standardised.std() <= 1.1
        assert (standardised.abs() > 4).double().mean() < 3e-4  # Gaussian: 6.3e-5
        best = standardised.gather(1, winners)
        assert best.abs().max() < z_score(DELTA, 3)
        assert best.mean().abs() < 0.5  # biased codes: -1.6 to -2.3


def test_more_planes_mean_less_error() -> None:
    """Catches planes that are read in the wrong order: each must take off two thirds of the
    error's variance.
    """
    weight, hidden = clustered_head(1000, 100)
    index = build_codes(weight, CodesOptions(bits=2.0, planes=2), hidden)
    truth = hidden[:8].double() @ weight.double().T
    errors = [
        (estimates - truth).square().mean() for estimates, _ in stages_of(weight, hidden[:8], index)
    ]
    assert errors[1] < errors[0] / 3
    assert errors[2] < errors[1] / 3


def test_codes_are_unbiased() -> None:
    """Catches a code that is shorter than its row: along the row itself, where a winning hidden
    state points, the estimate must not shrink.
    """
    weight, _ = clustered_head(2000, 128)
    index = build_codes(weight, CodesOptions(bits=1.0, planes=2), None)
    centred = weight.double() - weight.double().mean(0)
    along = torch.nn.functional.normalize(centred[:64], dim=1).float()
    own = (along.double() * centred[:64]).sum(1)
    mean = along.double() @ weight.double().mean(0)
    for estimates, _ in stages_of(weight, along, index):
        ratio = ((estimates.diagonal().double() - mean) / own).mean()
        assert ratio == pytest.approx(1, abs=0.01)


def test_calibration_buys_accuracy() -> None:
    """Catches a transform that ignores the hidden states:
    on a steep spectrum it must cut the error by a third.
    """
    weight, hidden = clustered_head(4096, 192)
    errors = []
    for states in (hidden[:256], None):
        index = build_codes(weight, CodesOptions(bits=1.5), states)
        estimates, _ = next(stages_of(weight, hidden[256:], index))
        errors.append((hidden[256:].double() @ weight.double().T - estimates).square().mean())
    assert errors[0] < errors[1] / 1.5


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from([1.0, 1.7, 3.0]),
    st.sampled_from([1, 2]),
    st.integers(0, 5),
)
def test_any_shape_round_trips(rows: int, d: int, bits: float, planes: int, seed: int) -> None:
    """Catches padding mistakes: any V and d, V not divisible by 16, d = 1;
    both kernels agree, the winner is right.
    """
    weight, hidden = clustered_head(rows, d, seed)
    index = build_codes(weight, CodesOptions(bits=bits, planes=planes), hidden[:64])
    again = CodesIndex.from_tensors(index.tensors(), index.metadata())
    assert again.segments == index.segments
    assert again.options == index.options
    plan = make_plan(again)
    truth = hidden[:3].double() @ weight.double().T
    slack = 1e-5 * (truth.abs().max() + 1e-6)
    for winner_only in (True, False):
        outputs = [
            search_codes(hidden[:3], weight, None, again, plan, impl, winner_only=winner_only)
            for impl in ("reference", "cpu")
        ]
        for output in outputs:
            chosen = truth.gather(1, output.tokens[:, None])[:, 0]
            assert torch.isfinite(output.logits).all()
            assert (truth.amax(1) - chosen <= slack).all()
            assert torch.equal(output.logits.argmax(1), output.tokens)
        assert torch.equal(outputs[0].tokens, outputs[1].tokens)


@pytest.mark.parametrize("kind", ["zero", "duplicate", "one", "all zero"])
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_degenerate_rows(kind: str, impl: str) -> None:
    """Catches a division by a zero norm, a covariance of rank zero, ties that move the winner."""
    weight, hidden = clustered_head(64, 24)
    if kind == "zero":
        weight[::2] = 0
    elif kind == "duplicate":
        weight[:] = weight[0]
    elif kind == "all zero":
        weight[:] = 0
    else:
        weight = weight[:1]
    index = build_codes(weight, CodesOptions(), hidden)
    output = search_codes(hidden[:4], weight, None, index, make_plan(index), impl)
    truth = hidden[:4].float() @ weight.float().T
    assert torch.isfinite(output.logits).all()
    if kind in ("duplicate", "all zero", "one"):
        assert output.tokens.tolist() == [0] * 4
    chosen = truth.gather(1, output.tokens[:, None])[:, 0]
    assert torch.allclose(chosen, truth.amax(1), atol=1e-3)


def test_an_empty_batch() -> None:
    """Catches a reduction over nothing."""
    weight, hidden = clustered_head(100, 24)
    index = build_codes(weight, CodesOptions(), hidden)
    for impl in ("cpu", "reference"):
        output = search_codes(hidden[:0], weight, None, index, make_plan(index), impl)
        assert output.logits.shape == (0, 100)
        assert output.tokens.shape == (0,)


def test_estimates_of_the_rest_spend_at_most_the_budget() -> None:
    """Catches a selection that drops rows the distribution needs:
    mean KL stays near the budget or below.
    """
    weight, hidden = clustered_head(8192, 96)
    hidden = hidden / 4  # broad distributions: the mass lies on hundreds of rows
    index = build_codes(weight, CodesOptions(bits=2.0, kl_budget=1e-3), hidden[:256])
    for impl in ("cpu", "reference"):
        states = hidden[256:] if impl == "cpu" else hidden[256:272]
        output = search_codes(states, weight, None, index, make_plan(index), impl)
        assert (output.candidates < 8192).any()
        dense = torch.log_softmax(states.double() @ weight.double().T, 1)
        ours = torch.log_softmax(output.logits.double(), 1)
        kl = (dense.exp() * (dense - ours)).sum(1).mean()
        assert 1e-5 < kl < 1.5e-3


def misses(index: CodesIndex, weight: torch.Tensor, hidden: torch.Tensor, scale: float) -> int:
    """Wrong winners when the half-width of the interval is scaled."""
    plan, wrong = make_plan(index), 0
    truth = (hidden.double() @ weight.double().T).amax(1)
    probability = 1e-6
    if scale != 1:
        import statistics

        z = scale * z_score(probability, plan.stages)
        probability = plan.stages * (1 - statistics.NormalDist().cdf(z))
    for states, best in zip(hidden.split(256), truth.split(256), strict=True):
        found = cascade(states, weight, None, index, plan, probability, None, impl="cpu")
        wrong += int((found.best.double() < best - 1e-4).sum())
    return wrong


def test_certificate_needs_the_whole_bound() -> None:
    """Catches a bound with half the z: with it, wrong winners must appear among 20,000 that the
    full z does not have.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4096, 96, generator=generator).bfloat16()
    hidden = torch.randn(20_000, 96, generator=generator)
    index = build_codes(weight, CodesOptions(bits=1.0, planes=1), None)
    assert misses(index, weight, hidden, 1.0) == 0
    assert misses(index, weight, hidden, 0.5) > 0


def test_z_follows_from_the_failure_probability() -> None:
    """Catches a two-sided quantile and a forgotten union over the stages."""
    assert z_score(1e-6, 1) == pytest.approx(4.7534, abs=1e-4)
    assert z_score(1e-6, 2) == pytest.approx(4.8916, abs=1e-4)
    assert z_score(0.0, 3) == 1


def test_the_deterministic_bound_holds_for_every_row() -> None:
    """Catches a bound that only holds on average: no estimate may leave it, at any stage."""
    weight, hidden = clustered_head(2000, 100)
    index = build_codes(weight, CodesOptions(bits=1.5, planes=2), hidden)
    plan = make_plan(index)
    states = torch.cat([hidden[:16], weight[:16].float()])
    query = make_query(states, index, plan, 0.0)
    truth = states.double() @ weight.double().T
    squared = index.scale.double().square()
    for stage, (estimates, _) in enumerate(stages_of(weight, states, index)):
        bound = (query.spread[:, stage].double() @ squared + query.floor[:, None]).sqrt()
        assert ((estimates - truth).abs() <= bound).all()
    found = cascade(states, weight, None, index, plan, 0.0, None, impl="cpu")
    assert (truth.amax(1) - found.best).abs().max() < 1e-4


def test_margin_makes_the_best_rows_exact() -> None:
    """Catches a margin that is ignored: every row that close to the winner is read exactly."""
    weight, hidden = clustered_head(4096, 96)
    index = build_codes(weight, CodesOptions(bits=1.5), hidden)
    plan = make_plan(index)
    truth = hidden[:8].double() @ weight.double().T
    for impl in ("cpu", "reference"):
        found = cascade(hidden[:8], weight, None, index, plan, DELTA, 1e-3, impl=impl, margin=8.0)
        for n in range(8):
            wanted = (truth[n] >= truth[n].max() - 8.0).nonzero()[:, 0]
            assert torch.isin(wanted, found.exact[n].long()).all()
            others = torch.ones(4096, dtype=torch.bool)
            others[found.exact[n].long()] = False
            assert float(truth[n][others].max()) <= float(found.upper[n])


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_where_most_rows_are_needed_all_are_read_once(impl: str) -> None:
    """Catches a search that is worse than the dense product: it must end in exact scores of all
    rows, and say so.
    """
    weight, hidden = clustered_head(300, 64)
    index = build_codes(weight, CodesOptions(bits=1.0, planes=1), None)
    found = cascade(
        hidden[:4], weight, None, index, make_plan(index), DELTA, None, impl=impl, margin=1e9
    )
    assert found.dense.all()
    assert found.read[:, -1].tolist() == [300] * 4
    assert torch.isneginf(found.upper).all()
    truth = hidden[:4].double() @ weight.double().T
    assert (found.scores - truth).abs().max() < 1e-4
    assert torch.equal(found.tokens, truth.argmax(1))


def test_bits_are_allocated_where_the_variance_is() -> None:
    """Catches a water-filling that exceeds its budget or feeds the tail."""
    variances = torch.arange(1, 257).double().pow(-2)
    assert allocate(variances, 1.0) == [1] * 8
    assert sum(allocate(variances, 1.5)) == 12
    assert allocate(variances, 1.5) == sorted(allocate(variances, 1.5), reverse=True)
    assert allocate(variances, 4.0) == [4] * 8


def test_the_choice_is_the_cheapest_expected() -> None:
    """Catches a choice that ignores its own table, and an expectation that is far off."""
    weight, hidden = clustered_head(8192, 96, states=1024)
    index, expected = build_codes_expecting(weight, CodesOptions(), hidden[:512])
    assert expected.chosen is not None
    assert expected.chosen["cost"] == min(row["cost"] for row in expected.table)
    assert index.options.bits == expected.chosen["bits"]
    assert index.planes == expected.chosen["planes"]
    output = search_codes(
        hidden[512:], weight, None, index, make_plan(index), "cpu", winner_only=True
    )
    read = output.bytes_read.double().mean() / weight.nbytes
    assert 0.7 < expected.chosen["certified_bytes_fraction"] / read < 1.4


def test_bytes_are_counted() -> None:
    """Catches an estimate in place of a count:
    every tensor that is read appears with its own size.
    """
    weight, hidden = clustered_head(1000, 64)
    index = build_codes(weight, CodesOptions(), hidden)
    plan = make_plan(index)
    read = (index.base, index.scale, index.direction, index.transform, index.exact)
    assert index.scan_bytes == sum(tensor.nbytes for tensor in read)
    found = cascade(hidden[:2], weight, None, index, plan, DELTA, 1e-3, impl="cpu")
    output = search_codes(
        hidden[:2],
        weight,
        None,
        dataclasses.replace(index, options=dataclasses.replace(index.options, kl_budget=1e-3)),
        plan,
        "cpu",
    )
    planes = found.read[:, :-1].sum(1) * index.refine_row_bytes
    assert torch.equal(output.bytes_read, index.scan_bytes + planes + found.read[:, -1] * 128)


@pytest.mark.parametrize("name", ["base", "refine", "scale", "direction", "exact", "transform"])
def test_wrong_tensors_are_refused(name: str) -> None:
    """Catches a kernel that would read beyond a tensor a stranger cut short."""
    weight, hidden = clustered_head(64, 24)
    index = build_codes(weight, CodesOptions(), hidden)
    tensors = index.tensors()
    tensors[name] = tensors[name][..., :-1]
    with pytest.raises(FlashHeadError, match=name):
        CodesIndex.from_tensors(tensors, index.metadata())
    if index.tensors()[name].is_floating_point():
        tensors[name] = index.tensors()[name] * float("nan")
        with pytest.raises(FlashHeadError, match=f"{name}.*NaN"):
            CodesIndex.from_tensors(tensors, index.metadata())
    del tensors[name]
    with pytest.raises(FlashHeadError, match=name):
        CodesIndex.from_tensors(tensors, index.metadata())


@pytest.mark.parametrize(
    "change",
    [
        {"planes": 7},
        {"segments": []},
        {"segments": [{"dims": 32}]},
        {"segments": [{"dims": 33, "base_bits": 1}]},
    ],
)
def test_wrong_metadata_is_refused(change: dict[str, object]) -> None:
    """Catches a layout that points outside the tensors."""
    weight, hidden = clustered_head(64, 24)
    index = build_codes(weight, CodesOptions(), hidden)
    with pytest.raises(FlashHeadError):
        CodesIndex.from_tensors(index.tensors(), index.metadata() | change)


def test_bad_inputs_are_named() -> None:
    """Catches NaN weights that would become an index, and options nobody knows."""
    weight, hidden = clustered_head(64, 24)
    broken = weight.clone()
    broken[3, 3] = float("nan")
    with pytest.raises(FlashHeadError, match="NaN"):
        build_codes(broken, CodesOptions(), hidden)
    with pytest.raises(FlashHeadError, match=r"\[tokens, 24\]"):
        build_codes(weight, CodesOptions(), hidden[:, :5])
    for name, value in (("bits", 9), ("planes", 3), ("failure_probability", 0.7)):
        with pytest.raises(FlashHeadError, match=f"{name}={value}"):
            CodesOptions(**{name: value})
