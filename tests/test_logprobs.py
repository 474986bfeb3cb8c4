"""Log-probabilities of a text against float32."""

import pytest
import torch

import flashhead
from flashhead.errors import FlashHeadError
from flashhead.evaluate.logprobs import _labelled, evaluate_logprobs, format_logprobs
from flashhead.integrations.transformers import load_tokenizer


@pytest.fixture
def text(tmp_path):  # type: ignore[no-untyped-def]
    """A text of the tiny model's words."""
    path = tmp_path / "text.txt"
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, 515, (700,), generator=generator).tolist()
    path.write_text(" ".join(f"w{word}" for word in words))
    return path


@pytest.mark.parametrize("head", ["codes", "clusters"])
def test_figures_of_a_tiny_model(tiny_folder, text, head: str) -> None:  # type: ignore[no-untyped-def]
    """Catches labels that are off by one (the perplexity of a random model is its vocabulary) and a
    normaliser that is biased.
    """
    model = flashhead.load(tiny_folder, head, progress=False, calibration_tokens=256)
    document = evaluate_logprobs(model, load_tokenizer(tiny_folder), text, 600, progress=False)
    assert document["positions"] == 600 - 2  # of two windows or three, the last has no next one
    assert document["mean_abs_error"] < 5e-3
    assert abs(document["perplexity_change"]) < 1e-3
    assert 300 < document["perplexity_float32"] < 900
    assert "perplexity" in format_logprobs(document)
    for way in ("without_draws", "complete_logits"):  # all of 515 rows are candidates here
        assert document[way]["perplexity"] == pytest.approx(document["perplexity_float32"], 1e-5)
        assert document[way]["max_abs_error"] < 1e-5


def test_a_dense_head_is_refused(tiny_folder, text) -> None:  # type: ignore[no-untyped-def]
    """Catches a comparison of the dense head with itself."""
    model = flashhead.load(tiny_folder, "dense", progress=False)
    with pytest.raises(FlashHeadError, match="dense head"):
        evaluate_logprobs(model, load_tokenizer(tiny_folder), text, 600, progress=False)


def test_tokens_follow_their_states() -> None:
    """Catches the token of a position in place of the next one, and BOS that is counted."""
    window = torch.tensor([1, 7, 8, 9])
    states = torch.tensor([[7.0], [8.0], [9.0]])
    ((hidden, tokens),) = _labelled(iter([states]), [window], 1)
    assert hidden[:, 0].tolist() == [7.0, 8.0]
    assert tokens.tolist() == [8, 9]
