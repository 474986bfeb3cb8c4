"""`generate` with FlashHead says what the dense model says, on the real models."""

import pytest
import torch
from greedy import differences

from flashhead.evaluate.features import PROMPTS
from flashhead.integrations.transformers import attach, load_dense, load_tokenizer
from flashhead.models import embedded_folder

TOKENS = 64


@pytest.mark.model
@pytest.mark.parametrize("name", ["gemma-3-270m", "smollm2-135m"])
def test_greedy_tokens_equal_dense(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches any wrong token: float32 logits must decide each difference for FlashHead."""
    folder = str(embedded_folder(name, progress=False))
    model, tokenizer = load_dense(folder), load_tokenizer(folder)
    prompts = [tokenizer(text, return_tensors="pt").input_ids for text in PROMPTS]
    attachment = attach(model, "codes", progress=False)
    head = attachment.head
    head.crossover_rows = max(1, head.crossover_rows)  # a busy machine must not skip it
    head.stats.reset()
    found = differences(model, attachment, prompts, TOKENS)
    total = len(PROMPTS) * TOKENS
    with capsys.disabled():
        print(f"\n{name}: {len(found)} of {total} tokens differ from the bf16 dense head's")
        for place in found:
            print("  ", place)
    assert head.stats.dense_rows == 0, "the search did not run"
    assert head.stats.rows > 0.8 * total  # some texts end early
    assert [place for place in found if not place.rounded_away] == []
    assert all(torch.isfinite(torch.tensor(place.dense_gap)) for place in found)
