"""A rank's rows of an index, and everything under another default dtype."""

import pytest
import torch

from flashhead.errors import FlashHeadError
from flashhead.index.build_codes import build_codes
from flashhead.index.codes import BLOCK_ROWS
from flashhead.index.shard import require_rows, shard_codes
from flashhead.index.store import load_index, save_index
from flashhead.nn.head import FlashHead
from flashhead.nn.tuning import Crossover
from flashhead.options import CodesOptions, Sampling

V, D = 1000, 96
CUTS = [(0, 500), (500, 1000), (8, 264), (993, 1000), (0, 1)]


def head(seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(V, D, generator=generator).bfloat16()
    hidden = torch.randn(400, D, generator=generator).bfloat16()
    return weight, hidden


def searched(weight, index, hidden, impl="reference"):
    linear = torch.nn.Linear(D, len(weight), bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return FlashHead(linear.eval(), index, impl=impl, crossover=Crossover(64, 64))


@pytest.mark.parametrize(("start", "stop"), CUTS)
def test_cut(start, stop):
    """Rows that get their neighbours' codes, where a cut is no multiple of a block."""
    weight, hidden = head()
    index = build_codes(weight, CodesOptions(bits=2, planes=2), hidden)
    part = shard_codes(index, start, stop)
    rows = weight[start:stop]
    assert part.vocab_size == stop - start
    assert len(part.base) == -(-(stop - start) // BLOCK_ROWS)
    require_rows(part, rows)
    exact = hidden[:8].float() @ rows.float().T
    found = searched(rows, part, hidden).search(hidden[:8])
    torch.testing.assert_close(found.logits.amax(1), exact.amax(1), rtol=1e-5, atol=1e-4)
    assert torch.equal(found.tokens, exact.argmax(1))
    error = (found.logits - exact).square().mean().sqrt()
    assert error < 0.35 * exact.square().mean().sqrt()  # of a row's own codes; of others': 1.4


def test_ranks_together():
    """Ranks whose best rows, compared, are not the head's."""
    weight, hidden = head()
    index = build_codes(weight, CodesOptions(bits=2, planes=2), hidden)
    parts = []
    for start, stop in ((0, 333), (333, 1000)):
        own = searched(weight[start:stop], shard_codes(index, start, stop), hidden)
        parts.append(own.search_rows(hidden[:32], None, winner_only=True).logits)
    exact = hidden[:32].float() @ weight.float().T
    assert torch.equal(torch.cat(parts, 1).argmax(1), exact.argmax(1))


def test_whole_is_itself():
    """A copy of an index that is not cut at all."""
    weight, hidden = head()
    index = build_codes(weight, CodesOptions(bits=1, planes=1), hidden)
    assert shard_codes(index, 0, V) is index


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (5, 5), (6, 5), (0, V + 1)])
def test_no_such_rows(start, stop):
    """A range beyond the index that gives fewer rows than asked for."""
    weight, hidden = head()
    index = build_codes(weight, CodesOptions(bits=1, planes=1), hidden)
    with pytest.raises(FlashHeadError, match="wanted a range"):
        shard_codes(index, start, stop)


def test_other_rows(tmp_path):
    """An index that serves rows it was not built from."""
    weight, hidden = head()
    index = build_codes(weight, CodesOptions(bits=2, planes=1), hidden)
    section = save_index(index, weight, hidden[:4], tmp_path)
    part, sample = load_index(tmp_path, section, weight[496:], 496)
    assert (part.vocab_size, len(sample)) == (V - 496, 4)
    with pytest.raises(FlashHeadError, match="other rows"):
        load_index(tmp_path, section, weight[496:], 488)
    changed = weight.clone()
    changed[700, 3] += 1
    with pytest.raises(FlashHeadError, match="other rows"):
        load_index(tmp_path, section, changed[496:], 496)
    for rows, first in ((weight[500:], 501), (weight[:10, :64], 0)):
        with pytest.raises(FlashHeadError, match="wanted rows"):
            load_index(tmp_path, section, rows, first)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_default_dtype(impl):
    """Constants rounded to bf16, or a crash: engines change the default dtype while they load."""
    if impl == "cpu":
        pytest.importorskip("numba")
    weight, hidden = head()
    sampling = Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.2, seed=3)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            index = build_codes(weight, CodesOptions(bits=1.5, planes=2), hidden)
            own = searched(weight, index, hidden, impl)
            logits = own.search(hidden[:8]).logits
            greedy, drawn = own.next_token(hidden[:8]), own.next_token(hidden[:8], sampling)
            values = own.log_probs(hidden[:8], greedy.tokens).values
        finally:
            torch.set_default_dtype(torch.float32)
        assert logits.dtype == values.dtype == torch.float32
        found.append((logits, greedy.tokens, drawn.tokens, values))
    for plain, other in zip(*found, strict=True):
        assert torch.equal(plain, other)
