"""What engine tests compare: the searched head's tokens and the dense head's."""

import math
import os

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "1, 2, 3, 4, 5, 6, 7, 8,",
    "The quick brown fox jumps over the lazy dog. The quick brown fox",
]
TOKENS = 24
UNSET = ("TRITON_INTERPRET", "OMP_WAIT_POLICY")
"""Set by tests/conftest.py for kernels in this process."""


def inherited():
    """The environment without what tests/conftest.py sets for kernels in this process."""
    return {name: value for name, value in os.environ.items() if name not in UNSET}


def options(**values):
    """What `--hf-overrides` takes; every batch of these tests is searched."""
    return {"hf_overrides": {"flashhead_options": {"crossover": 16, **values}}}


def require_equal(flash, dense):
    """The same tokens, or the dense head's logits tie where they part."""
    for ours, theirs in zip(flash["answers"], dense["answers"], strict=True):
        pairs = list(zip(ours["tokens"], theirs["tokens"], strict=False))
        apart = next((place for place, (a, b) in enumerate(pairs) if a != b), None)
        if apart is None:
            assert len(ours["tokens"]) == len(theirs["tokens"])
            continue
        logits = theirs["logprobs"][apart]
        a, b = (str(token) for token in pairs[apart])
        assert a in logits, f"{a} is not among the best of the dense head at {apart}"
        step = 2.0 ** (math.floor(math.log2(abs(logits[b]))) - 7)
        assert logits[b] - logits[a] <= step, (apart, logits)


def require_searched(answer):
    """The fast path ran and proved what it said."""
    (head,) = (head for head in answer["heads"] if not head["draft"])
    assert head["searched_rows"] >= TOKENS
    assert head["dense_rows"] == 0
    assert head["certified_fraction"] == 1
    assert head["bytes_fraction"] < 0.25
