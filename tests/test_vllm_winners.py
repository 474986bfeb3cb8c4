"""Greedy rows of vLLM's head on a GPU: the winner's exact score, -inf elsewhere.

Without a GPU the kernels run in Triton's interpreter; nothing of vLLM is needed.
"""

import pytest
import torch
from conftest import clustered_head
from torch import nn

pytest.importorskip("triton")

from flashhead.index.build_codes import build_codes
from flashhead.integrations.vllm.winners import gives_winners, searched_winners, winner_logits
from flashhead.nn.head import FlashHead
from flashhead.nn.tuning import Crossover
from flashhead.options import CodesOptions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, PADDED = 333, 384


@pytest.fixture(scope="module")
def problem():  # type: ignore[no-untyped-def]
    weight, hidden = clustered_head(ROWS, 48)
    linear = nn.Linear(48, ROWS, bias=False, device=DEVICE)
    linear.weight = nn.Parameter(weight.float().to(DEVICE), requires_grad=False)
    options = CodesOptions(bits=1.5, planes=2, kl_budget=1e-3)
    index = build_codes(linear.weight, options, hidden.to(DEVICE))
    return linear.eval(), index, hidden.to(DEVICE)


def test_the_winner_scattered():
    """A winner in another row's logits, or in a column of the padding."""
    logits = winner_logits(torch.tensor([4, 0]), torch.tensor([2.5, -7.0]), 6)
    assert logits.dtype == torch.float32
    assert logits.argmax(1).tolist() == [4, 0]
    assert logits.amax(1).tolist() == [2.5, -7.0]
    assert int(torch.isinf(logits).sum()) == 10


@pytest.mark.parametrize("n", [1, 9])
def test_winners_are_the_float32_heads(problem, n):
    """A token or a score that is not the dense head's; a search counted twice or not at all."""
    linear, index, hidden = problem
    head = FlashHead(linear, index, impl="triton", crossover=Crossover(64, 64))
    assert gives_winners(head)
    logits = searched_winners(head, hidden[:n], PADDED)
    truth = hidden[:n].double() @ linear.weight.double().T
    assert logits.shape == (n, PADDED)
    assert torch.equal(logits.argmax(1), truth.argmax(1))
    torch.testing.assert_close(logits.amax(1).double(), truth.amax(1), rtol=1e-5, atol=1e-4)
    assert int(torch.isfinite(logits).sum()) == n
    assert (head.stats.rows, head.stats.certified) == (n, n)


def test_the_option_decides_the_certificate(problem, monkeypatch):
    """The failure probability that a user chose for the index, replaced by the default."""
    linear, index, hidden = problem
    head = FlashHead(linear, index, impl="triton", crossover=Crossover(64, 64))
    asked = []
    search = head.device_search.next_token

    def next_token(states, probability, *rest):  # type: ignore[no-untyped-def]
        asked.append(probability)
        return search(states, probability, *rest)

    monkeypatch.setattr(head.device_search, "next_token", next_token)
    searched_winners(head, hidden[:2], ROWS)
    assert asked == [index.options.failure_probability]


def test_hosts_search_otherwise(problem):
    """A head of the CPU asked for scores that only the kernels give."""
    linear, index, _ = problem
    if DEVICE == "cpu":
        head = FlashHead(linear, index, impl="reference", crossover=Crossover(64, 64))
        assert not gives_winners(head)


def test_inference_mode(problem):
    """Counters that are made while an engine infers, and read when it does not."""
    linear, index, hidden = problem
    head = FlashHead(linear, index, impl="triton", crossover=Crossover(64, 64))
    with torch.inference_mode():
        first = searched_winners(head, hidden[:3], ROWS)
        again = searched_winners(head, hidden[:3].clone(), ROWS)
    assert torch.equal(first, again)
    assert head.stats.rows == 6
