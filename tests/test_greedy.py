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
    """Catches any wrong token: each difference must be one that float32 logits decide for FlashHead."""
    folder = str(embedded_folder(name, progress=False))
    model, tokenizer = load_dense(folder), load_tokenizer(folder)
    prompts = [tokenizer(text, return_tensors="pt").input_ids for text in PROMPTS]
    attachment = attach(model, "codes", progress=False)
    attachment.head.crossover_rows = max(
        1, attachment.head.crossover_rows
    )  # a busy machine must not skip it
    attachment.head.stats.reset()
    found = differences(model, attachment, prompts, TOKENS)
    searched = attachment.head.stats.rows - attachment.head.stats.dense_rows
    with capsys.disabled():
        print(
            f"\n{name}: {len(found)} of {len(PROMPTS) * TOKENS} greedy tokens differ from bf16 dense"
        )
        for place in found:
            print("  ", place)
    assert searched >= len(PROMPTS) * TOKENS
    assert [place for place in found if not place.rounded_away] == []
    assert all(torch.isfinite(torch.tensor(place.dense_gap)) for place in found)
