"""The check of the standard errors: right ones pass, wrong ones do not, real models are right."""

import dataclasses
import json
import math

import pytest
import torch
from conftest import IMPLS, clustered_head

from flashhead.errors import FlashHeadError
from flashhead.evaluate import estimates
from flashhead.evaluate.crossed import CrossedMean, grouped_mean
from flashhead.evaluate.error_model import (
    DEVIATIONS,
    STD_RANGE,
    SURE,
    WINNER_MEAN,
    error_model,
    gaussian_tail,
    poisson_tail,
)
from flashhead.evaluate.estimates import estimate_chunks, index_z, stage_names
from flashhead.index.build_codes import build_codes
from flashhead.options import CodesOptions


@pytest.fixture(scope="module")
def head():
    """Weight, index and unseen hidden states."""
    weight, hidden = clustered_head(4096, 192, states=1216)
    options = CodesOptions(bits=1.0, planes=1)
    return weight, build_codes(weight, options, hidden[:1024]), hidden[1024:]


@pytest.fixture(scope="module")
def deep(head):
    """The same with two planes and segments of three widths."""
    weight, _, unseen = head
    hidden = clustered_head(4096, 192, states=1216)[1]
    return weight, build_codes(weight, CodesOptions(bits=2.0, planes=2), hidden[:1024]), unseen


def with_sigma(index, factor):
    """The same codes with standard errors that are too small or too large."""
    segments = tuple(
        dataclasses.replace(
            segment,
            error=tuple(error * factor**2 for error in segment.error),
            energy=segment.energy * factor**2,
        )
        for segment in index.segments
    )
    return dataclasses.replace(index, segments=segments)


@pytest.mark.parametrize("impl", IMPLS)
def test_right_sigma_passes(head, impl):
    """A check that cries wolf, or one that only works with one implementation."""
    weight, index, hidden = head
    found = error_model(index, weight, None, hidden, impl=impl)
    assert found.too_small == []
    assert tuple(found.stages) == ("base", "plane 1")
    assert not any(stage.too_large for stage in found.stages.values())
    assert (found.positions, found.rows) == (192, 4096)


@pytest.mark.parametrize("bits", [1.0, 1.5, 4.0])
def test_winners_are_not_biased(bits):
    """A code that is short along its row: the winner, whose parts all point along the query, is
    then estimated too low by a sigma, where all rows together look Gaussian.
    """
    weight, hidden = clustered_head(4096, 192, states=3072)
    index = build_codes(weight, CodesOptions(bits=bits, planes=2), hidden[:1024])
    found = error_model(index, weight, None, hidden[1024:])
    for stage in found.stages.values():
        assert abs(stage.winner_mean.value) < -WINNER_MEAN + SURE * stage.winner_mean.stderr
        assert stage.winner_rms.value < STD_RANGE[1] + SURE * stage.winner_rms.stderr


def test_right_sigma_of_two_planes(deep):
    """Tails of 2e-3 beyond 4 sigma, where the certificate assumes 6e-5: here in segments of 32."""
    weight, index, hidden = deep
    assert error_model(index, weight, None, hidden).too_small == []


def test_short_codes_are_noticed(deep):
    """A bias of the winners alone that the figures of all rows cannot show."""
    weight, index, hidden = deep
    short = dataclasses.replace(index, scale=(index.scale.float() * 0.9).bfloat16())
    found = error_model(short, weight, None, hidden)
    assert any("mean of winners is -" in finding for finding in found.too_small)


def test_sigma_too_small_by_a_fifth_is_noticed(head):
    """A check that lets a bound pass which is a fifth too tight, at either stage."""
    weight, index, hidden = head
    found = error_model(with_sigma(index, 0.8), weight, None, hidden)
    for stage in stage_names(2):
        assert any(finding.startswith(f"{stage}: std is 1.2") for finding in found.too_small)
        for deviation in DEVIATIONS:
            name = f"{stage}: share beyond {deviation} sigma"
            assert any(finding.startswith(name) for finding in found.too_small)


def test_sigma_too_large_is_no_danger(head):
    """A sigma a fifth too wide taken for a broken certificate, or not noticed at all."""
    weight, index, hidden = head
    found = error_model(with_sigma(index, 1.2), weight, None, hidden)
    assert found.too_small == []
    assert all(stage.too_large for stage in found.stages.values())


def test_lost_winner_is_a_finding(head):
    """A winner out of the candidates' reach that no mean over rows can show, or a finding where a
    failure probability allows for as many.
    """
    weight, index, hidden = head
    options = dataclasses.replace(index.options, failure_probability=0.3)
    loose = dataclasses.replace(index, options=options)
    found = error_model(loose, weight, None, hidden)
    assert found.stages["base"].lost > 0
    assert found.stages["base"].expected_lost == pytest.approx(0.15 * 192)  # 0.3 in two stages
    assert found.too_small == []
    far = dataclasses.replace(found.stages["base"], lost=2, expected_lost=0.01)
    assert [finding for finding in far.too_small if "2 winners lost, expected 0.01" in finding]


def test_poisson_tail():
    """A tail that leaves out the count itself."""
    assert poisson_tail(0, 0.1) == 1
    assert poisson_tail(1, 0.1) == pytest.approx(1 - math.exp(-0.1))
    assert poisson_tail(2, 3.0) == pytest.approx(1 - 4 * math.exp(-3))


def test_figures_are_the_definitions(deep, monkeypatch):
    """Stages mixed up, a lost chunk, a sign turned round, or a percentile of something else."""
    weight, index, hidden = deep
    bias = torch.linspace(-2, 2, 4096)
    whole = error_model(index, weight, bias, hidden)
    monkeypatch.setattr(estimates, "CHUNK_LOGITS", 7 * 4096)
    chunked = error_model(index, weight, bias, hidden)
    chunks = list(estimate_chunks(index, weight, bias, hidden))
    assert len(chunks) == math.ceil(192 / 7)
    truth = hidden.double() @ weight.double().T + bias.double()
    for number, name in enumerate(stage_names(3)):
        estimate, sigma = (
            torch.cat([getattr(chunk, part)[number] for chunk in chunks]).double()
            for part in ("estimate", "sigma")
        )
        x = (estimate - truth) / sigma
        rounding = torch.cat([chunk.rounding for chunk in chunks])
        slack = float((rounding / sigma).mean())  # what float32 logits may be off by
        rows = torch.arange(192), truth.argmax(1)
        needed = (truth[rows] - estimate[rows]) / sigma[rows]
        for found in (whole.stages[name], chunked.stages[name]):
            assert found.mean.value == pytest.approx(x.mean().item(), abs=slack)
            assert found.std.value == pytest.approx(x.std().item(), rel=1e-4)
            for deviation, share in zip(DEVIATIONS, found.beyond, strict=True):
                wanted = (x.abs() > deviation).double().mean().item()
                assert share.value == pytest.approx(wanted, abs=3 / x.numel())  # float32 edges
            assert found.winner_mean.value == pytest.approx(x[rows].mean().item(), abs=slack)
            wanted = x[rows].square().mean().sqrt().item()
            assert found.winner_rms.value == pytest.approx(wanted, abs=slack)
            assert found.lost == (needed > index_z(index)).sum()
            assert found.needed_z[1] == pytest.approx(needed.max().item(), abs=9 * slack)
            assert found.needed_z[0] == pytest.approx(needed.quantile(0.99).item(), abs=9 * slack)


def test_standard_error_knows_rows_and_positions():
    """Standard errors of n * V independent entries: too small by a factor of ten here."""
    positions, rows, repeats = 60, 90, 200
    generator = torch.Generator().manual_seed(0)
    means, stated = [], []
    for _ in range(repeats):
        of_rows = torch.randn(1, rows, generator=generator, dtype=torch.float64)
        of_positions = torch.randn(positions, 1, generator=generator, dtype=torch.float64)
        noise = torch.randn(positions, rows, generator=generator, dtype=torch.float64)
        mean = CrossedMean(rows)
        for chunk in (of_rows + of_positions + noise).split(17):
            mean.add(chunk)
        figure = mean.figure()
        means.append(figure.value)
        stated.append(figure.stderr)
    spread = torch.tensor(means).std().item()
    typical = torch.tensor(stated).square().mean().sqrt().item()
    assert typical == pytest.approx(math.sqrt(1 / 60 + 1 / 90 + 1 / 5400), rel=0.05)
    # the spread of so many means is itself known to 1 / sqrt(2 * repeats), five times over
    assert typical == pytest.approx(spread, rel=5 / math.sqrt(2 * repeats))


def test_standard_error_knows_equal_rows():
    """A winner met a hundred times taken for a hundred winners."""
    values = torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64)
    apart = grouped_mean(values, torch.arange(4))
    assert apart.value == 4
    assert apart.stderr == pytest.approx(values.std().item() / 2)
    repeated = grouped_mean(values.repeat(100), torch.arange(4).repeat(100))
    assert repeated.stderr == pytest.approx(apart.stderr)
    assert grouped_mean(values, torch.zeros(4).long()).stderr == apart.stderr


@pytest.mark.parametrize("kind", ["zero", "duplicate", "one"])
def test_rows_that_codes_hold_exactly(kind):
    """0 / 0 where there is no coding error: NaN in the document, or a false alarm."""
    weight, hidden = clustered_head(64, 24)
    if kind == "zero":
        weight[::2] = 0
    elif kind == "duplicate":
        weight[:] = weight[0]
    else:
        weight = weight[:1]
    found = error_model(build_codes(weight, CodesOptions(), hidden), weight, None, hidden[:40])
    json.dumps(found.document(), allow_nan=False)
    assert all(stage.lost == 0 for stage in found.stages.values())


def test_unusable_states_are_named(head):
    """A figure of one position without a standard error, or NaN logits in the means."""
    weight, index, hidden = head
    with pytest.raises(FlashHeadError, match="1 hidden states: wanted 2"):
        error_model(index, weight, None, hidden[:1])
    with pytest.raises(FlashHeadError, match="NaN"):
        error_model(index, weight, None, hidden[:2] / 0)
    with pytest.raises(FlashHeadError, match=r"\[192, 5\].*\[n, 192\]"):
        error_model(index, weight, None, hidden[:, :5])
    with pytest.raises(FlashHeadError, match="index is of a head"):
        error_model(index, weight[:9], None, hidden)


@pytest.mark.model
@pytest.mark.parametrize("name", ["gemma-3-270m", "smollm2-135m"])
def test_sigma_of_real_models(name, capsys):
    """A sigma that is none on real hidden states of nine languages and scripts.

    The std must lie within [0.95, 1.1] with three standard errors to spare, and the shares beyond 3
    and 4 sigma, again with three to spare, within those of a normal variable of std 0.95 and 1.1:
    no tail heavier or lighter than the permitted std explains.
    """
    from flashhead.evaluate import inspection
    from flashhead.integrations import transformers
    from flashhead.models import embedded_folder

    folder = str(embedded_folder(name, progress=False))
    model, tokenizer = transformers.load_dense(folder), transformers.load_tokenizer(folder)
    windows = inspection.text_windows(tokenizer, None, 2, 512)
    states = inspection.text_states(model, windows, tokenizer.bos_token_id, lambda logits: logits)
    head = transformers.attach(model, progress=False).head
    found = error_model(head.index, head.weight, None, torch.cat([*states.values()]))
    with capsys.disabled():
        print(f"\n{name}: {found}")
    assert found.too_small == []
    low, high = STD_RANGE
    for stage in found.stages.values():
        slack = SURE * stage.std.stderr
        assert low <= stage.std.value - slack
        assert stage.std.value + slack <= high
        for deviation, share in zip(DEVIATIONS, stage.beyond, strict=True):
            slack = SURE * share.stderr
            assert gaussian_tail(deviation, low) <= share.value - slack
            assert share.value + slack <= gaussian_tail(deviation, high)
