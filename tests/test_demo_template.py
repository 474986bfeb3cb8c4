"""The template for production: both clients are answered, and one that leaves stops its answer."""

import asyncio
import subprocess
import sys
import time

import pytest

import flashhead
from flashhead import demo


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    """The tiny model with an index, and its tokenizer."""
    settings = {"calibration_tokens": 64, "bits": 2, "planes": 1, "crossover": 8}
    model = flashhead.load(tiny_folder, progress=False, **settings)
    model.generation_config.eos_token_id = None  # answers are as long as they may be
    return model, flashhead.load_tokenizer(tiny_folder)


def greedy(loaded, prompt: str, tokens: int) -> str:
    """What the model answers without any of this."""
    model, tokenizer = loaded
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=tokens)[0, inputs.input_ids.shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True)


async def collect(loaded, prompt: str, tokens: int) -> str:
    return "".join([piece async for piece in demo.answer(*loaded, prompt, tokens)])


def test_two_clients_get_their_own_text(loaded):
    """Pieces of one client in the answer of another, or the first piece lost."""

    async def both() -> list[str]:
        return await asyncio.gather(*(collect(loaded, prompt, 12) for prompt in ("w5 w9", "w300")))

    assert asyncio.run(both()) == [greedy(loaded, prompt, 12) for prompt in ("w5 w9", "w300")]


def test_a_client_that_leaves_stops_its_answer(loaded, monkeypatch):
    """A model that goes on for a client who is gone, and keeps the next one waiting."""
    model, steps = loaded[0], []
    forward = model.forward

    def counted(*args, **kwargs):
        steps.append(time.perf_counter())
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counted)

    async def leave() -> str:
        pieces = demo.answer(*loaded, "w5 w9", 200)
        await anext(pieces)
        await pieces.aclose()
        return await collect(loaded, "w300", 4)  # waits until the worker is free

    text = asyncio.run(leave())
    assert len(steps) < 150
    assert text == greedy(loaded, "w300", 4)


def test_an_error_reaches_the_client(loaded):
    """A client that waits for ever because the worker died."""
    with pytest.raises(ValueError, match="max_new_tokens"):
        asyncio.run(asyncio.wait_for(collect(loaded, "w5", 0), timeout=60))


def test_the_command(tiny_folder):
    """A template that was never run as its users run it."""
    command = [sys.executable, "-m", "flashhead.demo", "--max-new-tokens", "4", "--model"]
    prompts = ["--prompt", "w5 w9", "--prompt", "w300"]
    done = subprocess.run(
        [*command, tiny_folder, *prompts], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    names = {line.partition(":")[0] for line in done.stdout.splitlines()}
    assert names == {"client 1", "client 2"}
    done = subprocess.run([*command, "./nowhere", *prompts], capture_output=True, text=True)
    assert done.returncode == 2
    assert "model './nowhere': no such file or folder" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_nothing_happens_on_import():
    """A template that loads a library or starts a thread before it is asked to."""
    code = "import sys, threading; import flashhead.demo; "
    code += (
        "print(threading.active_count(), 'transformers' in sys.modules); import flashhead.cli.demo"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "1 False\n"), done.stderr
