"""Batched rows with a shared beginning against the same model, row by row."""

import pytest
import torch

pytest.importorskip("transformers")

from latent_models import ids, tiny, windows

from flashhead.convert.latent import make_latent
from flashhead.evaluate.suite import rows as rows_module
from flashhead.evaluate.suite.rows import LEAST_SHARED, Body, generate, groups
from flashhead.integrations.latent_model import serve_latents
from flashhead.nn.token_store import StoreOptions
from flashhead.options_latent import LatentOptions

KEPT = 7
"""Hidden states of a row that are asked for: of more than one part."""


def _model(sliding: bool):
    """A tiny model in float32; with sliding windows of 16 tokens, or without."""
    from transformers import (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        LlamaConfig,
        LlamaForCausalLM,
    )

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
    }
    if not sliding:
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**sizes, head_dim=8, sliding_window=16, layer_types=kinds)
    return Gemma3ForCausalLM(config).eval()


def _rows(seed: int = 0) -> list[list[int]]:
    """Rows of unlike length: two families that begin alike, and loners."""
    rng = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(3, 300, (count,), generator=rng).tolist()

    families = [draw(LEAST_SHARED + 6), draw(2 * LEAST_SHARED)]
    rows = [family + draw(n) for family in families for n in (1, 4, 9, 30)]
    rows += [draw(n) for n in (1, 5, 70)]
    return [rows[i] for i in torch.randperm(len(rows), generator=rng).tolist()]


@pytest.fixture(params=[None, 5], ids=["whole", "parts"])
def parts(request, monkeypatch):
    """Rows are read at once, or five tokens at a time; the lengths of all that is read."""
    if request.param:
        monkeypatch.setattr(rows_module, "SCORE_BYTES", 0)
        monkeypatch.setattr(rows_module, "LEAST_PART", request.param)
    read: list[int] = []
    hidden = Body._hidden
    monkeypatch.setattr(
        Body,
        "_hidden",
        lambda self, ids, *a, **k: read.append(ids.shape[1]) or hidden(self, ids, *a, **k),
    )
    yield read
    assert max(read) == request.param if request.param else max(read) > LEAST_SHARED


@pytest.mark.parametrize("sliding", [False, True])
def test_hidden_states_of_batches_are_those_of_single_rows(sliding, parts):
    """Catches a copy of keys and values that is shifted wrongly, a padding that is seen, a wrong
    position, a sliding window that counts the padding, and a part that is lost or read twice."""
    model = _model(sliding)
    rows = _rows()
    wanted = []
    with torch.no_grad():
        for row in rows:
            states = model.model(torch.tensor([row])).last_hidden_state[0]
            wanted.append(states[-min(KEPT, len(row)) :])
    body = Body(model)
    got: dict[int, torch.Tensor] = {}
    shared = 0
    for group in groups(rows):
        shared += group.shared > 0
        prefix = body.prefix(rows[group.members[0]][: group.shared])
        hidden, _ = body.prefill([rows[i] for i in group.members], prefix, KEPT)
        got |= dict(zip(group.members, hidden, strict=True))
    assert shared == 2
    assert sorted(got) == list(range(len(rows)))
    for i, truth in enumerate(wanted):
        # a row that shares all but its last token with its group has one state of its own
        states = got[i][-min(len(truth), len(got[i])) :]
        error = (states - truth[-len(states) :]).abs().max()
        assert error <= 1e-4 * truth.abs().max()


@pytest.mark.parametrize("rotary", ["rebuilt", "decoupled"])
def test_latents_are_read_in_parts(rotary, parts):
    """Rows of unlike length through a cache of latents: nothing is shared, parts follow parts."""
    model = tiny("gqa")
    make_latent(model, LatentOptions(kv_ratio=2.0, rotary=rotary), windows(), progress=False)
    serve_latents(model, StoreOptions())
    rows = [ids(1, n, seed=n)[0].tolist() for n in (3, 12, 40, 90)]
    with torch.no_grad():
        wanted = [model.model(torch.tensor([row])).last_hidden_state[0, -2:] for row in rows]
    body = Body(model)
    assert not body.sharing
    got, _ = body.prefill(rows, [], 2)
    for states, truth in zip(got, wanted, strict=True):
        assert (states - truth).abs().max() <= 1e-4 * truth.abs().max()


@pytest.mark.parametrize("sliding", [False, True])
def test_greedy_generations_are_those_of_generate(sliding, parts):
    """Catches rows that are mixed up when some of them end early, and a wrong position of the
    tokens that are generated."""
    model = _model(sliding)
    rows = _rows(1)
    lengths = [1 + 2 * (i % 5) for i in range(len(rows))]
    wanted = []
    for row, length in zip(rows, lengths, strict=True):
        out = model.generate(
            torch.tensor([row]), max_new_tokens=length, do_sample=False, eos_token_id=None
        )
        wanted.append(out[0, len(row) :].tolist())
    head = model.get_output_embeddings()
    body = Body(model)
    for group in groups(rows):
        prefix = body.prefix(rows[group.members[0]][: group.shared])
        members = list(group.members)
        got = generate(
            body,
            [rows[i] for i in members],
            lambda hidden: head(hidden).argmax(1).tolist(),
            lambda place, new, members=members: len(new) == lengths[members[place]],
            max(lengths),
            prefix,
        )
        assert got == [wanted[i] for i in members]


def test_groups_cover_every_row_once_and_share_what_is_alike():
    """Catches a row that is lost, asked twice, or said to share what it does not."""
    rows = _rows(2)
    found = groups(rows)
    assert sorted(i for group in found for i in group.members) == list(range(len(rows)))
    for group in found:
        first = rows[group.members[0]][: group.shared]
        assert all(rows[i][: group.shared] == first for i in group.members)
        assert all(len(rows[i]) > group.shared for i in group.members)
    assert all(group.shared == 0 for group in groups(rows, sharing=False))
