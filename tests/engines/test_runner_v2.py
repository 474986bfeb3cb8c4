"""Model runner V2 on the CPU: vLLM's kernels in Triton's interpreter, the rest as on a GPU."""

import os

import interpreted_triton
import pytest
from compare import PROMPTS, TOKENS, options, require_equal, require_searched

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def v2(tmp_path_factory):
    """Environment of an engine with this runner."""
    path = interpreted_triton.install(tmp_path_factory.mktemp("triton"))
    given = os.environ.get("PYTHONPATH")
    return interpreted_triton.ENVIRONMENT | {
        "PYTHONPATH": os.pathsep.join(filter(None, [path, given]))
    }


def test_greedy(converted_folder, generate, v2):
    """A runner that loads no processor, or another way to learn what requests need."""
    engine = {"model": str(converted_folder)}
    flash = generate({**engine, **options()}, **v2)
    assert "Using V2 Model Runner" in flash["log"]
    require_searched(flash)
    require_equal(flash, generate(engine, dense=True))


def test_most_demanding_slot(converted_folder, generate, v2):
    """Rows that need every logit and get the winner alone: V2 tells slots, not rows."""
    greedy = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
    params = [greedy | {"logprobs": 5}, greedy, greedy | {"min_tokens": 4}, greedy]
    engine = {"model": str(converted_folder), "logprobs_mode": "raw_logits"}
    flash = generate({**engine, **options()}, params=params, **v2)
    (head,) = flash["heads"]
    assert (head["searched_rows"], head["dense_rows"] >= len(PROMPTS) * TOKENS) == (0, True)
    require_equal(flash, generate(engine, dense=True, params=[greedy | {"logprobs": 5}] * 4))
