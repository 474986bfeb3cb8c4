"""What `attach` calibrates on: few tokens, in two passes; and what keeps an index samples more."""

import pytest
import torch

import flashhead
from flashhead.convert.head import convert
from flashhead.integrations import transformers as integration
from flashhead.integrations.calibration import QUICK_TOKENS, quick_hidden_states
from flashhead.models import embedded_folder

TEXT = "The river was higher than anyone had seen it, and the bridge had been closed since noon."


def test_states_are_the_models_own_and_nothing_is_left(tiny_model):
    """Catches states of another token's position, a seed of the user's that moves, a hook that
    stays."""
    before = torch.random.get_rng_state()
    tiny_model.train()
    states = quick_hidden_states(tiny_model, seed=3)
    assert tiny_model.training
    tiny_model.eval()
    assert states.shape == (QUICK_TOKENS, tiny_model.config.hidden_size)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(states, quick_hidden_states(tiny_model, seed=3))
    assert not torch.equal(states, quick_hidden_states(tiny_model, seed=4))
    assert len(tiny_model.get_output_embeddings()._forward_pre_hooks) == 0
    first = states[::64]  # every sequence starts with the same token
    assert torch.equal(first, first[:1].expand_as(first))
    assert len(torch.unique(states, dim=0)) > QUICK_TOKENS // 2


def test_second_pass_reads_what_the_model_said(tiny_model, monkeypatch):
    """Catches a second pass over the random tokens of the first: a model that always says the same
    token must read it."""
    seen = []
    forward = type(tiny_model).forward

    def told(self, *args, **kwargs):
        seen.append(kwargs["input_ids"].clone())
        output = forward(self, *args, **kwargs)
        if len(seen) == 1:
            output.logits = torch.full_like(output.logits, -100.0)
            output.logits[..., 77] = 100.0
        return output

    monkeypatch.setattr(type(tiny_model), "forward", told)
    quick_hidden_states(tiny_model, seed=0)
    assert len(seen) == 2
    assert len(seen[0].unique()) > 100
    assert seen[1][:, 1:].unique().tolist() == [77]
    assert torch.equal(seen[1][:, 0], seen[0][:, 0])


def test_attach_is_quick_unless_told(tiny_model):
    with flashhead.attach(tiny_model, progress=False) as attachment:
        index = attachment.head.index
        assert index.calibration_tokens == index.options.calibration_tokens == QUICK_TOKENS
    with flashhead.attach(tiny_model, progress=False, calibration_tokens=128) as attachment:
        assert attachment.head.index.calibration_tokens == 128


def test_what_is_kept_samples_more(tiny_folder, tmp_path, monkeypatch):
    """Catches the quick way in an index that is built once and served for long."""
    asked = []
    sample = integration.sample_hidden_states

    def fewer(model, tokens, seed, progress=False):
        asked.append(tokens)
        return sample(model, 64, seed, progress)

    monkeypatch.setattr(integration, "sample_hidden_states", fewer)
    convert(tiny_folder, tmp_path / "out", progress=False)
    flashhead.load(tiny_folder, progress=False)
    assert asked == [4096, 4096]


@pytest.mark.model
def test_a_real_head_is_searched_well(monkeypatch):
    """Catches statistics so far from a text's that most of the head is read."""
    model = integration.load_dense(str(embedded_folder("smollm2-135m")))
    ids = integration.load_tokenizer(str(embedded_folder("smollm2-135m")))(
        TEXT, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        hidden = model.base_model(ids).last_hidden_state[0]
    head = flashhead.attach(model, progress=False).head
    found = head.next_token(hidden)
    assert bool(found.certified.all())
    assert torch.equal(found.tokens, (hidden.double() @ head.weight.double().T).argmax(1))
    assert float(found.bytes_read.double().mean()) < 0.2 * head.dense_bytes
