"""`generate` with FlashHead says what the dense model says, on the real models."""

import pytest
import torch
from greedy import differences

from flashhead.integrations.transformers import attach, load_dense, load_tokenizer
from flashhead.models import embedded_folder

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "The three laws of thermodynamics say that",
    "To bake a loaf of bread, first",
    "In 1969, Neil Armstrong",
    "SELECT name, count(*) FROM",
    "Photosynthesis is the process by which",
    "Dear Sir or Madam,\n\nI am writing to",
    "The quick brown fox",
    "La ville de Paris est",
    "Die wichtigste Erfindung des Menschen ist",
    "1, 1, 2, 3, 5, 8, 13,",
    "A good password should",
    "The mitochondria of a cell",
    "import numpy as np\n\nx = np.",
    "Shakespeare's most famous play",
    "Water boils at",
    "The stock market fell today because",
    "Question: What is 17 times 3?\nAnswer:",
]
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
