"""Noise against published vectors, float64 formulas and the Gumbel distribution."""

import math

import numpy as np
import pytest
import torch
from conftest import IMPLS
from hypothesis import given, settings
from hypothesis import strategies as st

from flashhead.errors import FlashHeadError
from flashhead.ops.noise import reference
from flashhead.ops.noise.api import (
    LARGEST_GUMBEL,
    SMALLEST_GUMBEL,
    add_gumbel,
    draw,
    gumbel,
    gumbel_at,
)

EULER = 0.5772156649015329
KNOWN_ANSWERS = (  # Random123, kat_vectors: philox4x32, 10 rounds: counter, key, words
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def exact_gumbel(high: int, low: int) -> float:
    """The formula in float64, from the smaller of x and 1 - x."""
    integer = (high << 32) + low
    if high < 2**31:
        return -math.log(-math.log1p(-(integer + 0.5) * 2.0**-64))
    return -math.log(-math.log((2**64 - 1 - integer + 0.5) * 2.0**-64))


def exact_noise(seed: int, step: int, rows: range) -> torch.Tensor:
    """Noise in float64, from Philox in Python integers."""
    values = []
    for row in rows:
        words = philox((row >> 1, 0, step & 0xFFFFFFFF, step >> 32), seed)
        values.append(exact_gumbel(*words[2 * (row & 1) :][:2]))
    return torch.tensor(values, dtype=torch.float64)


def philox(counter: tuple[int, int, int, int], seed: int) -> tuple[int, int, int, int]:
    """The paper's rounds in Python integers."""
    (a, b, c, d), key0, key1 = counter, seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (
            (right >> 32) ^ b ^ key0,
            right & 0xFFFFFFFF,
            (left >> 32) ^ d ^ key1,
            left & 0xFFFFFFFF,
        )
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return a, b, c, d


def ulps(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error in units of the last float32 place of max(|g|, 1)."""
    return float(((got.double() - exact).abs() / exact.abs().clamp(min=1)).max() * 2.0**23)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple, key: tuple, words: tuple) -> None:
    """Catches another round count, swapped halves, a wrong multiplier, a sign in int64 products."""
    seed = key[0] + (key[1] << 32)
    assert philox(counter, seed) == words
    got = reference.philox(seed, tuple(torch.tensor([part]) for part in counter))
    assert tuple(int(word) for word in got) == words


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_take_the_published_words(impl: str) -> None:
    """Catches words given to the wrong row: the zero vector is rows 0 and 1 of seed 0, step 0."""
    words = KNOWN_ANSWERS[0][2]
    wanted = torch.tensor([exact_gumbel(*words[:2]), exact_gumbel(*words[2:])])
    assert ulps(gumbel(0, torch.tensor([0]), 2, impl=impl)[0], wanted.double()) <= 2


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**63 - 1), st.integers(0, 300))
def test_implementations_have_the_same_bits(seed: int, step: int, vocab_size: int) -> None:
    """Catches a lost high half of seed or step, a fused multiply-add, a tail row of the kernel."""
    steps = torch.tensor([step])
    got = gumbel(seed, steps, vocab_size, impl="cpu")
    assert torch.equal(got, gumbel(seed, steps, vocab_size, impl="reference"))
    if vocab_size:
        exact = exact_noise(seed, step, range(vocab_size))
        assert ulps(got[0], exact) <= 2


@pytest.mark.parametrize("impl", IMPLS)
def test_noise_does_not_depend_on_the_batch(impl: str) -> None:
    """Catches state between rows, steps taken by position, and a strip that starts at row 0."""
    steps = torch.tensor([9, 3, 2**40 + 5, 3])
    together = gumbel(17, steps, 20_001, impl=impl)
    assert torch.equal(together[1], together[3])
    for n, step in enumerate(steps.tolist()):
        alone = gumbel(17, torch.tensor([step]), 20_001, impl=impl)
        assert torch.equal(alone[0], together[n])
        shorter = gumbel(17, torch.tensor([step]), 777, impl=impl)
        assert torch.equal(shorter[0], together[n, :777])
        rows = torch.randperm(20_001, generator=torch.Generator().manual_seed(n))[:5001]
        assert torch.equal(gumbel_at(17, step, rows, impl=impl), together[n, rows])


@pytest.mark.parametrize("impl", IMPLS)
def test_large_rows_and_no_rows(impl: str) -> None:
    """Catches 32-bit row arithmetic beyond 2^31, and a crash on nothing."""
    rows = torch.tensor([2**33 - 1, 2**32, 0])
    exact = torch.cat([exact_noise(1, 2, range(row, row + 1)) for row in rows.tolist()])
    assert ulps(gumbel_at(1, 2, rows, impl=impl), exact) <= 2
    assert gumbel_at(1, 2, rows[:0], impl=impl).shape == (0,)
    assert gumbel(1, rows[:0], 5, impl=impl).shape == (0, 5)


def test_extreme_words_are_finite_and_accurate() -> None:
    """Catches log(0), a 1 - x without digits, and bounds that noise can cross."""
    edges = [0, 1, 2, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, 0x4AFB0CCC, 0x4AFB0CCD]
    pairs = [(high, low) for high in edges for low in edges]
    high, low = (torch.tensor(part) for part in zip(*pairs, strict=True))
    exact = torch.tensor([exact_gumbel(*pair) for pair in pairs], dtype=torch.float64)
    got = reference.to_gumbel(high, low)
    assert ulps(got, exact) <= 2
    assert SMALLEST_GUMBEL < float(got.min()) < SMALLEST_GUMBEL + 0.01
    assert LARGEST_GUMBEL - 0.01 < float(got.max()) < LARGEST_GUMBEL


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("vocab_size", [1, 2, 2047, 2049, 8193])
def test_add_gumbel_is_in_place(impl: str, vocab_size: int) -> None:
    """Catches a temperature of another row, a row added twice, and noise at temperature 0."""
    torch.manual_seed(vocab_size)
    estimates = torch.randn(3, vocab_size)
    steps, temperatures = torch.tensor([4, 0, 4]), torch.tensor([0.7, 0.0, 2.5])
    noise = gumbel(5, steps, vocab_size, impl="reference")
    wanted = estimates + temperatures[:, None] * noise
    before = estimates[1].clone()
    assert add_gumbel(estimates, 5, steps, temperatures, impl=impl) is estimates
    assert torch.equal(estimates, wanted)
    assert torch.equal(estimates[1], before)


def test_noise_is_gumbel() -> None:
    """Catches a wrong transform: Kolmogorov-Smirnov, moments and both tails of 2^21 numbers."""
    g = gumbel(3, torch.arange(8), 2**18, impl="cpu").double().flatten()
    n = g.numel()
    uniform = torch.exp(-torch.exp(-g)).sort().values
    ranks = torch.arange(1, n + 1, dtype=torch.float64) / n
    distance = max(float((ranks - uniform).max()), float((uniform - ranks + 1 / n).max()))
    assert distance * math.sqrt(n) < 1.63  # one seed in a hundred exceeds it
    assert abs(float(g.mean()) - EULER) < 3 * math.sqrt(math.pi**2 / 6 / n)
    variance_stderr = math.sqrt((5.4 - 1) / n) * math.pi**2 / 6  # kurtosis 5.4
    assert abs(float(g.var()) - math.pi**2 / 6) < 3 * variance_stderr
    for edge in (-2.5, -2.2, -1.5, 0.0, 4.0, 8.0, 11.0):
        below = math.exp(-math.exp(-edge))
        probability = below if edge < 0.5 else -math.expm1(-math.exp(-edge))
        count = int((g <= edge).sum() if edge < 0.5 else (g > edge).sum())
        assert abs(count - n * probability) < 3.5 * math.sqrt(n * probability) + 1, edge


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda: gumbel(7, torch.arange(1, 9), 65536, impl="cpu"), id="next step"),
        pytest.param(lambda: gumbel(8, torch.arange(8), 65536, impl="cpu"), id="next seed"),
        pytest.param(lambda: gumbel(7 + 2**32, torch.arange(8), 65536, impl="cpu"), id="high seed"),
        pytest.param(lambda: gumbel(7, torch.arange(8) + 2**32, 65536, impl="cpu"), id="high step"),
        pytest.param(lambda: gumbel(7, torch.arange(8), 65537, impl="cpu")[:, 1:], id="next row"),
        pytest.param(
            lambda: gumbel(7, torch.arange(8), 65538, impl="cpu")[:, 2:], id="next counter"
        ),
    ],
)
def test_neighbours_are_independent(other: object) -> None:
    """Catches a counter or key that two streams share: a 16 x 16 contingency table each."""
    a = gumbel(7, torch.arange(8), 65536, impl="cpu")
    table = np.zeros((16, 16))
    bins = [
        (torch.exp(-torch.exp(-g.double().flatten())) * 16).long().clamp(max=15).numpy()
        for g in (a, other())  # type: ignore[operator]
    ]
    np.add.at(table, (bins[0], bins[1]), 1)
    expected = a.numel() / 256
    chi2 = float(((table - expected) ** 2 / expected).sum())
    assert abs(chi2 - 255) < 3.3 * math.sqrt(2 * 255)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_the_perturbed_argmax_samples_the_softmax(temperature: float) -> None:
    """Catches noise divided by the temperature, or added with the wrong sign."""
    draws = 200_000
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0, 1.5])
    scores = logits.repeat(draws, 1)
    add_gumbel(scores, 1, torch.arange(draws), torch.full((draws,), temperature), impl="cpu")
    counts = torch.bincount(scores.argmax(1), minlength=7).double()
    expected = draws * torch.softmax(logits.double() / temperature, 0)
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert chi2 < 16.8  # 6 degrees of freedom: one seed in a hundred exceeds it


def perturbed_argmax(
    logits: torch.Tensor, seed: int, steps: torch.Tensor, t: float, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The long way: all noise of all steps, then a maximum with the lowest position."""
    noise = gumbel(seed, steps, int(rows.max()) + 1, impl="reference")[:, rows]
    scores = logits + torch.tensor(t, dtype=torch.float32) * noise
    values = scores.max(1).values
    return torch.stack(
        [(row == top).nonzero()[0, 0] for row, top in zip(scores, values, strict=True)]
    ), values


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 1200),
    spread=st.sampled_from([0.0, 1.0, 8.0, 200.0]),
    offset=st.sampled_from([0.0, -3000.0]),
    t=st.sampled_from([0.05, 0.7, 1.0, 20.0]),
    seed=st.integers(0, 2**64 - 1),
)
def test_draw_is_the_perturbed_argmax(
    count: int, spread: float, offset: float, t: float, seed: int
) -> None:
    """Catches a strip that is passed over although a row of it wins, ties, and forbidden rows."""
    generator = torch.Generator().manual_seed(seed & 0xFFFF)
    logits = offset + spread * torch.randn(count, generator=generator)
    logits[torch.rand(count, generator=generator) < 0.2] = -math.inf
    logits[count // 2] = offset + spread
    steps = torch.randint(0, 2**62, (50,), generator=generator)
    places = torch.arange(count)
    scattered = torch.randperm(3 * count, generator=generator)[:count]
    for rows, given_rows in ((places, None), (scattered, scattered)):
        winners, values = perturbed_argmax(logits, seed, steps, t, rows)
        for impl in IMPLS:
            got = draw(logits, seed, steps, t, given_rows, impl=impl)
            assert torch.equal(got[0], winners)
            assert torch.equal(got[1], values)


def test_draw_of_equals_takes_the_lowest() -> None:
    """Catches a winner that depends on the order of strips: noise is lost beside 1e30."""
    logits = torch.zeros(2000)
    logits[[700, 1999]] = 1e30
    for impl in IMPLS:
        assert draw(logits, 0, torch.arange(9), 1.0, impl=impl)[0].eq(700).all()


def test_wrong_arguments_are_named() -> None:
    """Catches a seed or step that wraps around in silence, and in-place work on a copy."""
    steps, one = torch.tensor([0]), torch.ones(1)
    for seed in (-1, 2**64):
        with pytest.raises(FlashHeadError, match="seed="):
            gumbel(seed, steps, 4, impl="reference")
    with pytest.raises(FlashHeadError, match="steps="):
        gumbel(0, steps - 1, 4, impl="reference")
    with pytest.raises(FlashHeadError, match="steps is"):
        gumbel(0, steps.int(), 4, impl="reference")
    with pytest.raises(FlashHeadError, match="vocab_size"):
        gumbel(0, steps, -1, impl="reference")
    with pytest.raises(FlashHeadError, match="rows from -1"):
        gumbel_at(0, 0, torch.tensor([-1]), impl="reference")
    with pytest.raises(FlashHeadError, match="rows is"):
        gumbel_at(0, 0, torch.tensor([[1]]), impl="reference")
    with pytest.raises(FlashHeadError, match="contiguous"):
        add_gumbel(torch.zeros(4, 2).T[:1], 0, steps, one, impl="reference")
    with pytest.raises(FlashHeadError, match="contiguous"):
        add_gumbel(torch.zeros(1, 4).double(), 0, steps, one, impl="reference")
    with pytest.raises(FlashHeadError, match="temperatures="):
        add_gumbel(torch.zeros(1, 4), 0, steps, -one, impl="reference")
    for logits in (torch.zeros(0), torch.tensor([math.nan, 1]), torch.tensor([-math.inf])):
        with pytest.raises(FlashHeadError, match="logits: wanted one that is finite"):
            draw(logits, 0, steps, 1.0, impl="reference")
    with pytest.raises(FlashHeadError, match="logits is"):
        draw(torch.zeros(2).double(), 0, steps, 1.0, impl="reference")
    with pytest.raises(FlashHeadError, match="rows is 1 rows"):
        draw(torch.zeros(2), 0, steps, 1.0, torch.tensor([1]), impl="reference")
    with pytest.raises(FlashHeadError, match="temperature=0"):
        draw(torch.zeros(2), 0, steps, 0, impl="reference")
