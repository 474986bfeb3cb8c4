"""next_token, log_probs and draws against the dense float32 distribution."""

import math

import pytest
import torch
from conftest import clustered_head
from torch import nn

from flashhead.errors import FlashHeadError
from flashhead.index.build_clusters import build_clusters
from flashhead.index.build_codes import build_codes
from flashhead.nn.edits import allowed_mask, banned_mask
from flashhead.nn.head import FlashHead
from flashhead.nn.next_token import Context
from flashhead.ops.noise.api import gumbel
from flashhead.options import ClustersOptions, CodesOptions, Sampling

V, D = 3001, 64
MAKERS = ("codes", "dense", "clusters")


def head_of(kind: str, biased: bool = False) -> tuple[FlashHead, torch.Tensor]:
    """A head with broad distributions, and 64 hidden states."""
    weight, hidden = clustered_head(V, D)
    hidden = hidden / 8
    linear = nn.Linear(D, V, bias=biased).to(torch.bfloat16)
    with torch.no_grad():
        linear.weight.copy_(weight)
    linear.weight.requires_grad_(False)
    if biased:
        linear.bias.requires_grad_(False)
    if kind == "codes":
        index = build_codes(linear.weight, CodesOptions(bits=2.0), hidden[:256])
    elif kind == "clusters":
        index = build_clusters(linear.weight, ClustersOptions(iterations=2), hidden[:256], False)
    else:
        index = None
    return FlashHead(linear, index, sample=hidden[:8]), hidden[256:320]


def dense(head: FlashHead, hidden: torch.Tensor) -> torch.Tensor:
    """Float32 logits, in float64."""
    logits = hidden.double() @ head.weight.double().T
    return logits if head.bias is None else logits + head.bias.double()


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("biased", [False, True])
def test_greedy_is_the_dense_argmax(kind: str, biased: bool) -> None:
    """Catches a bias that is forgotten, and a kind of head that cannot answer."""
    head, hidden = head_of(kind, biased)
    found = head.next_token(hidden)
    assert torch.equal(found.tokens, dense(head, hidden).argmax(1))
    assert found.certified.all()
    assert found.fallback.all() == (kind != "codes")
    if kind == "codes":
        assert (found.bytes_read < head.dense_bytes).all()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.5])
def test_sampling_is_the_perturbed_argmax(temperature: float) -> None:
    """Catches noise that depends on the batch, and a search that loses a perturbed winner."""
    head, hidden = head_of("codes")
    sampling = Sampling(temperature=temperature, seed=5)
    steps = torch.arange(100, 164)
    noise = gumbel(5, steps, V, impl="reference").double()
    wanted = (dense(head, hidden) + temperature * noise).argmax(1)
    assert torch.equal(head.next_token(hidden, sampling, steps=steps).tokens, wanted)
    order = torch.randperm(64)
    again = head.next_token(hidden[order], sampling, steps=steps[order])
    assert torch.equal(again.tokens, wanted[order])
    plain = FlashHead(nn.Linear(D, V), None)
    plain.weight = head.weight
    plain.bias = None
    assert torch.equal(plain.next_token(hidden, sampling, steps=steps).tokens, wanted)


FILTERS = [
    {"top_k": 5},
    {"top_p": 0.9},
    {"min_p": 0.1},
    {"typical_p": 0.7},
    {"top_k": 9, "top_p": 0.8},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_filtered_sampling_equals_the_dense_head(
    filters: dict[str, float], temperature: float
) -> None:
    """Catches a filter that is decided on incomplete knowledge."""
    head, hidden = head_of("codes")
    plain = FlashHead(nn.Linear(D, V), None)
    plain.weight, plain.bias = head.weight, None
    sampling = Sampling(temperature=temperature, seed=1, **filters)  # type: ignore[arg-type]
    ours, truth = head.next_token(hidden, sampling), plain.next_token(hidden, sampling)
    assert torch.equal(ours.tokens, truth.tokens)
    assert ours.certified.all()
    if "top_k" in filters or "min_p" in filters:
        assert ours.fallback.double().mean() < 0.5  # decided by the search, mostly


def test_contexts_edit_the_logits() -> None:
    """Catches penalties, biases and masks that the search overrules, in greedy and in sampling."""
    head, hidden = head_of("codes")
    hidden = hidden[:16]
    logits = dense(head, hidden).float()
    best = logits.argsort(1, descending=True)
    contexts = []
    for n in range(16):
        mask = banned_mask(V, best[n, 1:2]) if n % 2 else None
        biases = {(int(best[n, 2]),): -math.inf, (7, int(best[n, 3])): 50.0}
        previous = torch.tensor([int(best[n, 0]), 7])
        contexts.append(Context(previous=previous, biases=biases, mask=mask))
    edited = logits.clone()
    for n in range(16):
        row = edited[n]
        row[best[n, 2]] = -math.inf
        row[best[n, 3]] += 50.0
        for token in {int(best[n, 0]), 7}:
            row[token] = row[token] / 3 if row[token] > 0 else row[token] * 3
        if n % 2:
            row[best[n, 1]] = -math.inf
    for temperature in (0.0, 1.0):
        sampling = Sampling(temperature=temperature, repetition_penalty=3.0)
        found = head.next_token(hidden, sampling, contexts=contexts)
        noise = temperature * gumbel(0, torch.arange(16), V, impl="reference")
        assert torch.equal(found.tokens, (edited + noise).argmax(1))
        filtered = head.next_token(
            hidden, Sampling(temperature=0.5, top_k=1, repetition_penalty=3.0), contexts=contexts
        )
        assert torch.equal(filtered.tokens, edited.argmax(1))


def test_masks_that_forbid_nearly_or_fully_everything() -> None:
    """Catches a forbidden token where only one is allowed, and a crash where none is."""
    head, hidden = head_of("codes")
    only = Context(mask=allowed_mask(V, torch.tensor([17])))
    assert head.next_token(hidden[:1], contexts=[only]).tokens.tolist() == [17]
    drawn = head.next_token(hidden[:1], Sampling(temperature=1.0, top_p=0.9), contexts=[only])
    assert drawn.tokens.tolist() == [17]
    none = Context(mask=torch.full((V,), -math.inf))
    with pytest.raises(FlashHeadError, match="every token is forbidden"):
        head.next_token(hidden[:1], contexts=[none])


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}])
@pytest.mark.parametrize("kind", ["codes", "dense"])
def test_draws_are_those_of_next_token(kind: str, filters: dict[str, float]) -> None:
    """Catches a draw decided by a bound instead of an exact logit."""
    head, hidden = head_of(kind)
    sampling = Sampling(temperature=0.8, seed=3, **filters)  # type: ignore[arg-type]
    steps = torch.arange(40, 140)
    one_by_one = head.next_token(hidden[:1].expand(100, D), sampling, steps=steps)
    assert torch.equal(head.draws(hidden[:1], 100, sampling, 40), one_by_one.tokens)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probs_lie_within_their_error(kind: str, temperature: float) -> None:
    """Catches a rest that is biased, and a standard error that is not."""
    head, hidden = head_of(kind)
    tokens = torch.randint(0, V, (64,), generator=torch.Generator().manual_seed(0))
    truth = (dense(head, hidden) / temperature).log_softmax(1)
    truth = truth.gather(1, tokens[:, None])[:, 0]
    found = head.log_probs(hidden, tokens, temperature)
    error = found.values - truth
    if kind == "codes":
        standardised = error / found.stderr.clamp_min(1e-6)
        assert standardised.abs().max() < 5
        assert standardised.mean().abs() < 0.6
        assert error.abs().mean() < 0.005
    else:
        assert error.abs().max() < 1e-4


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probs_without_draws(temperature: float) -> None:
    """Catches an estimate where the exact logit is due: a token that is no candidate must be off by
    the normaliser alone, as every other token of the same state."""
    head, hidden = head_of("codes", True)
    logits = head.search(hidden).logits.double() / temperature
    truth = dense(head, hidden) / temperature
    shift = logits.logsumexp(1) - truth.logsumexp(1)
    for tokens in (truth.argmax(1), (logits - truth).abs().argmax(1)):
        found = head.log_probs(hidden, tokens, temperature, draws=0)
        wanted = truth.log_softmax(1).gather(1, tokens[:, None])[:, 0]
        assert torch.allclose(wanted - found.values, shift, atol=2e-5)
        assert found.stderr.isnan().all()
    worst = (logits - truth).abs().max(1).values
    assert (worst > 20 * shift.abs()).double().mean() > 0.9  # the complete logits are off by more
    assert head.log_probs(hidden[:0], tokens[:0], draws=0).values.shape == (0,)


def test_draws_make_the_error_smaller() -> None:
    """Catches a number of draws that is not heeded."""
    head, hidden = head_of("codes")
    tokens = torch.zeros(64, dtype=torch.int64)
    few, many = (head.log_probs(hidden, tokens, draws=n).stderr.mean() for n in (16, 1024))
    assert 4 < few / many < 16  # the root of 64 is 8


def test_wrong_arguments_are_named() -> None:
    """Catches a wrong token where an error is due: NaN, infinity, shapes, ranges."""
    head, hidden = head_of("codes")
    for bad in (math.nan, math.inf, -math.inf):
        broken = hidden.clone()
        broken[3, 3] = bad
        for call in (head.next_token, head.search):
            with pytest.raises(FlashHeadError, match="NaN or infinity"):
                call(broken)
    with pytest.raises(FlashHeadError, match="wanted"):
        head.next_token(hidden[:, :5])
    with pytest.raises(FlashHeadError, match="failure_probability"):
        head.next_token(hidden, failure_probability=0.6)
    with pytest.raises(FlashHeadError, match="steps"):
        head.next_token(hidden, steps=torch.arange(3))
    with pytest.raises(FlashHeadError, match="contexts"):
        head.next_token(hidden, contexts=[Context()])
    with pytest.raises(FlashHeadError, match="tokens"):
        head.log_probs(hidden, torch.full((64,), V))
    with pytest.raises(FlashHeadError, match="temperature"):
        head.log_probs(hidden, torch.zeros(64, dtype=torch.int64), 0.0)
    for draws in (-1, 1):
        with pytest.raises(FlashHeadError, match="draws"):
            head.log_probs(hidden, torch.zeros(64, dtype=torch.int64), draws=draws)
    with pytest.raises(FlashHeadError, match="draws"):
        head.draws(hidden[:1], 5, Sampling())
    assert head.next_token(hidden[:0]).tokens.shape == (0,)


def test_the_deterministic_mode_is_right() -> None:
    """Catches a bound of the wrong sign: failure_probability=0 must give the dense argmax."""
    head, hidden = head_of("codes")
    found = head.next_token(hidden, failure_probability=0)
    assert torch.equal(found.tokens, dense(head, hidden).argmax(1))
    assert (found.candidates >= head.next_token(hidden).candidates).all()
