"""`generate_certified`: greedy `generate`, by winners only."""

import pytest
import torch
from transformers import StoppingCriteria

from flashhead.errors import FlashHeadError
from flashhead.integrations.greedy import generate_certified
from flashhead.integrations.transformers import attach

PROMPTS = torch.tensor([[1, 5, 9, 30, 7], [1, 8, 100, 400, 3]])
PADDED = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
GREEDY = {"max_new_tokens": 12, "pad_token_id": 0, "do_sample": False}


@pytest.fixture
def searching(tiny_model):
    """The model in float32, whose dense argmax has no ties of rounding, and its FlashHead."""
    dtype = tiny_model.dtype
    tiny_model.float()
    with attach(tiny_model, "codes", progress=False, calibration_tokens=256) as attachment:
        attachment.head.crossover_rows = attachment.head.token_crossover_rows = 64
        attachment.head.stats.reset()
        yield attachment
    tiny_model.to(dtype)


def dense_text(attachment, *args, **settings):
    model, head = attachment.model, attachment.head
    attachment.detach()
    text = model.generate(*args, **{**GREEDY, **settings})
    model.set_output_embeddings(head)
    return text


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"attention_mask": PADDED},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"eos_token_id": list(range(0, 515, 5))},
    ],
    ids=["batch", "left padding", "static cache", "no cache", "end tokens"],
)
def test_it_equals_greedy_generate(searching, settings):
    """Catches a wrong position of a padded batch, an end token that does not stop, and a head that
    answers by complete logits after all."""
    wanted = dense_text(searching, PROMPTS, **settings)
    got = generate_certified(searching.model, PROMPTS, **{**GREEDY, **settings})
    assert torch.equal(got, wanted)
    stats = searching.head.stats
    assert (stats.dense_rows, stats.certified) == (0, stats.rows)
    assert stats.rows >= 2
    assert searching.model.get_output_embeddings() is searching.head


def test_rows_beyond_the_crossover_are_dense(searching):
    searching.head.token_crossover_rows = 1
    wanted = dense_text(searching, PROMPTS)
    assert torch.equal(generate_certified(searching.model, PROMPTS, **GREEDY), wanted)
    stats = searching.head.stats
    assert stats.rows == stats.dense_rows == 2 * (wanted.shape[1] - PROMPTS.shape[1])


def test_streamers_and_criteria_are_asked(searching):
    """Catches a loop of our own that forgets them."""

    class Third(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 8)

    class Seen:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.reshape(-1).tolist()

        def end(self):
            self.tokens.append(None)

    seen = Seen()
    text = generate_certified(
        searching.model, PROMPTS[:1], **GREEDY, stopping_criteria=[Third()], streamer=seen
    )
    assert text.shape == (1, 8)
    assert seen.tokens == [*text[0].tolist(), None]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"repetition_penalty": 1.3}, "RepetitionPenaltyLogitsProcessor would edit them"),
        ({"do_sample": True}, "wanted do_sample=False"),
        ({"num_beams": 2}, "wanted do_sample=False and num_beams=1"),
        ({"return_dict_in_generate": True, "output_logits": True}, "output_logits"),
        ({"return_dict_in_generate": True, "output_scores": True}, "output_scores"),
    ],
)
def test_what_needs_logits_is_refused(searching, settings, said):
    """Catches penalties that would silently edit zeros and ones."""
    with pytest.raises(FlashHeadError, match=said):
        generate_certified(searching.model, PROMPTS, **{**GREEDY, **settings})
    assert searching.model.get_output_embeddings() is searching.head


def test_heads_that_certify_nothing_are_refused(tiny_model):
    with pytest.raises(FlashHeadError, match="wanted a FlashHead of codes"):
        generate_certified(tiny_model, PROMPTS, **GREEDY)
    with (
        attach(tiny_model, "dense", progress=False),
        pytest.raises(FlashHeadError, match="is dense, wanted a FlashHead of codes"),
    ):
        generate_certified(tiny_model, PROMPTS, **GREEDY)
