"""Filters and edits against transformers' processors, and what partial knowledge may decide."""

import dataclasses
import math

import pytest
import torch
from conftest import IMPLS
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import logits_process as theirs

from flashhead.errors import FlashHeadError
from flashhead.nn.candidates import Candidates, complete
from flashhead.nn.edits import (
    allowed_mask,
    banned_mask,
    edited_rows,
    scores_directly,
    sequence_bias,
    unpack_bitmask,
)
from flashhead.nn.sampling import allowed, edited, greedy, sample
from flashhead.options import Sampling

GRID = st.sampled_from([-30.0, -2.5, -1.0, 0.0, 0.25, 0.5, 1.0, 3.0])
LOGITS = st.lists(st.one_of(GRID, st.floats(-12, 12, width=32)), min_size=1, max_size=40)
NO_TOKENS = torch.empty(0, dtype=torch.int64)
FILTERS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.5]),
    top_k=st.one_of(st.none(), st.integers(1, 50)),
    top_p=st.one_of(st.none(), st.floats(0.05, 1)),
    min_p=st.one_of(st.none(), st.floats(0, 1)),
    typical_p=st.one_of(st.none(), st.floats(0.05, 1)),
)


def warpers(sampling: Sampling) -> list:
    """What `generate` would apply, in its order."""
    built: list = [theirs.TemperatureLogitsWarper(float(sampling.temperature))]
    if sampling.top_k is not None:
        built.append(theirs.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None and sampling.top_p < 1:
        built.append(theirs.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p is not None:
        built.append(theirs.MinPLogitsWarper(sampling.min_p))
    if sampling.typical_p is not None and sampling.typical_p < 1:
        built.append(theirs.TypicalLogitsWarper(sampling.typical_p))
    return built


def dense_allowed(logits: Tensor, sampling: Sampling) -> Tensor:
    """Rows that transformers leaves, its processors run in float64."""
    scores = logits.double()[None]
    for warper in warpers(sampling):
        scores = warper(NO_TOKENS[None], scores)
    return (scores[0] > -math.inf).nonzero().flatten()


def same_choice(rows: Tensor, wanted: Tensor, logits: Tensor) -> bool:
    """The same rows but for those that tie at the edge of a nucleus: transformers sorts unstably,
    and whichever of them it keeps, here the lowest must be."""
    if torch.equal(rows, wanted):
        return True
    edge = logits[rows].min()
    tied = (logits == edge).nonzero().flatten()
    kept = rows[logits[rows] == edge]
    return torch.equal(kept, tied[: len(kept)]) and torch.equal(
        logits[rows].sort().values, logits[wanted].sort().values
    )


def assume_no_knife_edge(logits: Tensor, sampling: Sampling) -> None:
    """Leave out cases that the order of a float64 sum decides: another option, another set."""
    for name in ("top_p", "min_p", "typical_p"):
        value = getattr(sampling, name)
        if value is not None and 0 < value < 1:
            for nudged in (value * (1 - 1e-9), min(1.0, value * (1 + 1e-9))):
                other = dataclasses.replace(sampling, **{name: nudged})
                assume(len(dense_allowed(logits, other)) == len(dense_allowed(logits, sampling)))


@settings(max_examples=300, deadline=None)
@given(LOGITS, FILTERS)
def test_filters_of_complete_rows_are_transformers(values: list[float], sampling: Sampling) -> None:
    """Catches another order of filters, another treatment of ties, an off-by-one in the nucleus."""
    logits = torch.tensor(values)
    assume_no_knife_edge(logits, sampling)
    got = allowed(complete(logits), sampling)
    assert got is not None
    assert same_choice(got.rows, dense_allowed(logits, sampling), logits)
    assert torch.equal(got.logits, logits[got.rows])


def known_part(
    logits: Tensor, count: int, seed: int, sampling: Sampling, slack: float
) -> Candidates:
    """Candidates that know the best `count` rows and some others; the rest exactly bounded."""
    generator = torch.Generator().manual_seed(seed)
    known = torch.rand(len(logits), generator=generator) < 0.2
    known[logits.topk(min(count, len(logits))).indices] = True
    others = logits[~known]
    if len(others) == 0:
        return complete(logits)
    rows = known.nonzero().flatten()
    rows = rows[torch.randperm(len(rows), generator=generator)]
    rest = float((others.double() / sampling.temperature).logsumexp(0))
    return Candidates(rows, logits[rows], float(others.max()) + slack, rest)


@settings(max_examples=300, deadline=None)
@given(LOGITS, FILTERS, st.integers(0, 12), st.integers(0, 2**20), st.sampled_from([0.0, 0.5]))
def test_a_decision_from_part_of_the_rows_is_the_dense_one(
    values: list[float], sampling: Sampling, count: int, seed: int, slack: float
) -> None:
    """Catches a filter that decides although an unknown row might be kept."""
    logits = torch.tensor(values)
    assume_no_knife_edge(logits, sampling)
    part = known_part(logits, count, seed, sampling, slack)
    got = allowed(part, sampling)
    if got is not None and sampling.filters:
        assert same_choice(got.rows, dense_allowed(logits, sampling), logits)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-6, 6, width=32), min_size=2, max_size=30),
    st.floats(0.1, 0.95),
    st.integers(1, 12),
    st.floats(-1, 1),
    st.sampled_from([0.001, 0.01, 0.05]),
)
def test_top_p_is_decided_only_if_every_likely_rest_agrees(
    values: list[float], top_p: float, count: int, error: float, stderr: float
) -> None:
    """Catches an interval of the normaliser that is too narrow: a wrong rest within z standard
    errors must lead to the dense nucleus or to no decision.
    """
    logits = torch.tensor(values)
    sampling = Sampling(temperature=1.0, top_p=top_p)
    assume_no_knife_edge(logits, sampling)
    part = known_part(logits, count, 0, sampling, 0.0)
    assume(not part.complete)
    z = 3.2905267314919255  # Phi^-1(1 - 1e-3 / 2)
    known = float(logits[part.rows].double().exp().sum())
    estimate = math.exp(part.log_rest) + 0.999 * error * z * stderr * (
        known + math.exp(part.log_rest)
    ) / (1 + z * stderr)
    assume(estimate > 0)
    wrong = dataclasses.replace(part, log_rest=math.log(estimate), rest_stderr=stderr)
    got = allowed(wrong, sampling, 1e-3)
    if got is not None:
        assert same_choice(got.rows, dense_allowed(logits, sampling), logits)


def test_what_is_decided_and_what_is_not() -> None:
    """Catches a rule that is never certain (all dense, all slow), and one that is too bold."""
    logits = torch.tensor([5.0, 4.0, 3.0, 2.0])
    rest = math.log(1.0)
    part = Candidates(torch.tensor([7, 3, 9, 1]), logits, 2.5, rest, 1e-4)

    def rows(**options: object) -> list[int] | None:
        got = allowed(part, Sampling(temperature=1.0, **options))  # type: ignore[arg-type]
        return None if got is None else got.rows.tolist()

    assert rows(top_k=3) == [3, 7, 9]
    assert rows(top_k=4) is None  # the fourth is below the bound
    assert rows(top_k=5) is None
    assert rows(min_p=0.2) == [3, 7]
    assert rows(min_p=0.05) is None  # exp(2.5 - 5) = 0.08: an unknown row may be kept
    assert rows(top_p=0.8) == [3, 7]
    assert rows(top_p=0.9) == [3, 7, 9]
    assert rows(top_p=0.99) is None  # reaches rows below the bound
    assert rows() is None  # no filter: the search over all rows decides
    assert rows(typical_p=0.5) is None
    assert rows(typical_p=0.5, top_k=3) is not None
    mass = logits.double().exp()
    edge = float(mass[:2].sum() / (mass.sum() + math.exp(rest)))
    assert rows(top_p=edge - 1e-3) == [3, 7]
    assert rows(top_p=edge + 1e-3) == [3, 7, 9]
    assert rows(top_p=edge) is None  # 4.9 standard errors on either side
    assert allowed(part, Sampling(temperature=1.0, top_p=edge - 1e-3), 0) is None
    assert greedy(part) == 7
    assert greedy(dataclasses.replace(part, upper=5.0)) is None
    assert greedy(Candidates(NO_TOKENS, torch.empty(0), 1.0)) is None
    few = Candidates(torch.tensor([1, 2, 3]), torch.zeros(3), -1.0, math.log(2.0))
    assert allowed(few, Sampling(temperature=1.0, top_p=0.9)) is None  # 40 % is unknown


@pytest.mark.parametrize(("failure_probability", "z"), [(1e-3, 3.290527), (1e-6, 4.891638)])
@pytest.mark.parametrize("stderr", [1e-4, 2e-3])
def test_the_interval_of_the_rest_is_z_standard_errors(
    failure_probability: float, z: float, stderr: float
) -> None:
    """Catches half an interval, or a one-sided one: 1 % inside of it is undecided, outside is."""
    logits = torch.tensor([5.0, 4.0, 3.0, 2.0])
    part = Candidates(torch.arange(4), logits, 1.0, math.log(9.0), stderr)
    mass = logits.double().exp()
    edge = float(mass[:2].sum() / (mass.sum() + 9.0))
    for width, wanted in ((0.99, None), (1.01, 2)):
        for share, more in (
            (edge / (1 + width * z * stderr), 0),
            (edge / (1 - width * z * stderr), 1),
        ):
            got = allowed(part, Sampling(temperature=1.0, top_p=share), failure_probability)
            assert (None if got is None else len(got.rows) - more) == wanted


PENALTIES = st.builds(
    Sampling,
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.1, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.4, -1.0]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
)
SEQUENCES = st.dictionaries(
    st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple),
    st.sampled_from([-math.inf, -2.5, 0.1, 3.0]),
    max_size=6,
)


def their_edits(
    logits: Tensor, previous: Tensor, biases: dict, sampling: Sampling, prompt_length: int
) -> Tensor:
    """Processors of transformers, then the two penalties it lacks, one token at a time."""
    scores, ids = logits[None], previous[None]
    if biases:
        scores = theirs.SequenceBiasLogitsProcessor(biases)(ids, scores)
    if len(previous):
        scores = theirs.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, scores)
    scores = scores[0].clone()
    for token in range(len(scores)):
        count = previous[prompt_length:].tolist().count(token)
        scores[token] -= sampling.frequency_penalty * count
        scores[token] -= sampling.presence_penalty * (count > 0)
    return scores


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.floats(-12, 12, width=32), min_size=10, max_size=20),
    st.lists(st.integers(0, 25), max_size=8),
    SEQUENCES,
    PENALTIES,
    st.integers(0, 4),
)
def test_edits_are_transformers_on_all_rows_and_on_few(
    values: list[float], tokens: list[int], biases: dict, sampling: Sampling, prompt_length: int
) -> None:
    """Catches a penalty of the wrong sign, tokens counted twice, a bias after the penalty, a prefix
    matched at the wrong end, and an edited row that the search would not be told of.
    """
    logits, previous = torch.tensor(values), torch.tensor(tokens, dtype=torch.int64)
    wanted = their_edits(logits, previous, biases, sampling, prompt_length)
    bias_rows, bias = sequence_bias(previous, biases)
    got = edited(complete(logits), previous, bias_rows, bias, sampling, prompt_length)
    assert torch.equal(got.logits, wanted)
    rows = edited_rows(previous, bias_rows, sampling, len(logits), prompt_length)
    touched = (wanted != logits).nonzero().flatten()
    assert set(touched.tolist()) <= set(rows.tolist())
    few = edited(
        Candidates(rows.flip(0), logits[rows.flip(0)], 99.0),
        previous,
        bias_rows,
        bias,
        sampling,
        prompt_length,
    )
    assert torch.equal(few.logits, wanted[rows.flip(0)])


def test_bad_words_and_masks_are_transformers() -> None:
    """Catches a bad word that is forbidden before its beginning was said, and inverted masks."""
    logits = torch.linspace(-3, 3, 70)
    words = [[4], [1, 2, 5], [2, 6], [9, 9]]
    previous = torch.tensor([9, 1, 2])
    wanted = theirs.NoBadWordsLogitsProcessor(words)(previous[None], logits[None])[0]
    rows, bias = sequence_bias(previous, {tuple(word): -math.inf for word in words})
    assert rows.tolist() == [4, 5, 6]
    got = edited(complete(logits), previous, rows, bias, Sampling())
    assert torch.equal(got.logits, wanted)
    assert torch.equal(logits + banned_mask(70, rows), wanted)
    few = torch.tensor([0, 33, 64, 69])
    fixed = theirs.PrefixConstrainedLogitsProcessor(lambda *_: few.tolist(), 1)
    wanted = fixed(previous[None], logits[None])[0]
    assert torch.equal(logits + allowed_mask(70, few), wanted)
    bits = torch.zeros(3, dtype=torch.int32)
    for row in few.tolist():
        bits[row // 32] |= (1 << row % 32) - (2**32 if row % 32 == 31 else 0)
    bits[0] |= -(2**31)
    wanted[31] = logits[31]
    assert torch.equal(logits + unpack_bitmask(bits, 70), wanted)
    assert scores_directly(2, 70)
    assert not scores_directly(3, 70)


def test_generate_applies_edits_and_filters_in_this_order(tiny_model) -> None:  # type: ignore[no-untyped-def]
    """Catches a transformers release that changes the order which the filters here follow."""
    config = GenerationConfig(
        do_sample=True,
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        min_p=0.1,
        typical_p=0.9,
        repetition_penalty=1.1,
        sequence_bias={(1,): 1.0},
        bad_words_ids=[[2]],
    )
    config._eos_token_tensor = None
    built = tiny_model._get_logits_processor(config, input_ids_seq_length=1, device="cpu")
    assert [type(processor).__name__ for processor in built] == [
        "SequenceBiasLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "NoBadWordsLogitsProcessor",
        *(type(warper).__name__ for warper in warpers(Sampling(0.5, 3, 0.9, 0.1, 0.9))),
    ]


@pytest.mark.parametrize("impl", IMPLS)
def test_samples_of_a_filter_are_the_unfiltered_ones_inside_it(impl: str) -> None:
    """Catches noise by position in the set instead of by token, and another temperature."""
    torch.manual_seed(0)
    logits, steps = 3 * torch.randn(500), torch.arange(3000)
    sampling = Sampling(temperature=0.8, top_p=0.7, seed=11)
    left = allowed(complete(logits), sampling)
    assert left is not None
    inside = sample(left, sampling, steps, impl=impl)
    free = sample(complete(logits), sampling, steps, impl=impl)
    held = torch.isin(free, left.rows)
    assert torch.equal(inside[held], free[held])
    assert torch.isin(inside, left.rows).all()
    expected = torch.zeros(500).double()
    expected[left.rows] = 3000 * torch.softmax(left.logits.double() / 0.8, 0)
    counts = torch.bincount(inside, minlength=500)
    bins = expected >= 5
    chi2 = float(((counts - expected)[bins].square() / expected[bins]).sum())
    assert chi2 < int(bins.sum()) + 3 * math.sqrt(2 * int(bins.sum()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1: wanted 0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": None}, "temperature=None"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"top_k": 0}, "top_k=0: wanted an integer, 1 or more"),
        ({"top_k": 2.0}, "top_k=2.0"),
        ({"top_p": 0.0}, "top_p=0.0: wanted above 0"),
        ({"top_p": 1.01}, "top_p=1.01"),
        ({"min_p": -0.1}, "min_p=-0.1: wanted 0 to 1"),
        ({"typical_p": 0}, "typical_p=0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: wanted above 0"),
        ({"frequency_penalty": math.inf}, "frequency_penalty=inf"),
        ({"presence_penalty": True}, "presence_penalty=True"),
        ({"seed": -1}, "seed=-1: wanted an integer, 0 to"),
        ({"seed": 2**64}, "seed="),
        ({"seed": None}, "seed=None"),
    ],
)
def test_options_out_of_range_are_named(options: dict, message: str) -> None:
    """Catches a value that some later operation would take for something else."""
    with pytest.raises(FlashHeadError, match=message):
        Sampling(**options)


def test_nothing_to_choose_from_is_an_error() -> None:
    """Catches token 0 returned when a grammar forbids everything."""
    nothing = complete(torch.full((5,), -math.inf))
    for function in (greedy, lambda c: allowed(c, Sampling(temperature=1.0, top_k=2))):
        with pytest.raises(FlashHeadError, match="every token is forbidden"):
            function(nothing)
    with pytest.raises(FlashHeadError, match="temperature=0"):
        allowed(complete(torch.zeros(5)), Sampling())
    with pytest.raises(FlashHeadError, match="failure_probability=1"):
        allowed(complete(torch.zeros(5)), Sampling(temperature=1.0), 1)
    for biases in ({(): 1.0}, {(-1,): 1.0}, {(1,): math.inf}, {(1,): math.nan}):
        with pytest.raises(FlashHeadError, match="bias"):
            sequence_bias(NO_TOKENS, biases)
    with pytest.raises(FlashHeadError, match=r"wanted torch.int32 \[2\]"):
        unpack_bitmask(torch.zeros(1, dtype=torch.int32), 33)
