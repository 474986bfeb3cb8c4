"""Two decodes side by side over one model."""

import pytest
import torch
from playground_client import PROMPT, side

from flashhead.cli.session import encode
from flashhead.errors import FlashHeadError
from flashhead.integrations.transformers import load_tokenizer
from flashhead.ops.noise.api import gumbel
from flashhead.options import Sampling
from flashhead.playground.decode import SideBySide
from flashhead.playground.text import PiecewiseText


def test_both_sides_are_what_generate_says(decoder):
    """Catches a cache that the two sides share, a hidden state of another position, and a model
    that keeps the stand-in for its head."""
    ids = decoder.encode(PROMPT, True, 12, 0.0)
    events = list(decoder.events(ids, 12, Sampling()))
    assert decoder.model.get_output_embeddings() is decoder.head
    assert events[0]["event"] == "start"
    assert events[0]["prompt_tokens"] == ids.shape[1] == 4
    head = decoder.head
    rows, head.crossover_rows = head.crossover_rows, 0
    wanted = decoder.model.generate(
        ids, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0
    )
    head.crossover_rows = rows
    for name in ("dense", "flash"):
        tokens = side(events, name)
        assert [token["token"] for token in tokens] == wanted[0, 4:].tolist()
        assert [token["step"] for token in tokens] == list(range(12))
        assert [token["seconds"] is None for token in tokens] == [True] + [False] * 11
    flash = side(events, "flash")
    assert all(token["certified"] and 1 <= token["candidates"] <= 515 for token in flash)
    assert all(token["candidates"] == 515 for token in side(events, "dense"))
    assert all(token["bytes_read"] == head.dense_bytes for token in side(events, "dense"))
    texts = ["".join(token["text"] for token in side(events, name)) for name in ("dense", "flash")]
    decoded = decoder._tokenizer.decode(wanted[0, 4:], skip_special_tokens=True)
    assert texts == [decoded, decoded]


def test_latent_caches_are_copied(tiny_folder, tmp_path):
    """Catches two sides that append to the same store of latents."""
    from flashhead.convert.head import convert
    from flashhead.integrations.transformers import load
    from flashhead.options_latent import LatentOptions

    words = torch.randint(3, 515, (700,), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "words.txt").write_text(" ".join(f"w{word}" for word in words))
    options = LatentOptions(kv_ratio=1.0, kv_dtype="int8", calibration=(tmp_path / "words.txt",))
    out = tmp_path / "out"
    convert(tiny_folder, out, attention=options, progress=False, calibration_tokens=64)
    model = load(str(out), dtype=torch.float32, crossover=1, progress=False)
    made = SideBySide(model, load_tokenizer(str(out)), encode)
    made.ends = frozenset()
    ids = made.encode(PROMPT, True, 12, 0.0)
    events = list(made.events(ids, 12, Sampling()))
    made.head.crossover_rows = 0
    wanted = model.generate(
        ids, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0
    )
    for name in ("dense", "flash"):
        assert [token["token"] for token in side(events, name)] == wanted[0, 4:].tolist()


def test_with_a_temperature_both_draw_by_the_same_noise(decoder):
    """Catches sides that part by chance, a seed that is not used, and steps that repeat a draw."""
    ids = decoder.encode(PROMPT, True, 24, 5.0)

    def texts(seed):
        events = list(decoder.events(ids, 24, Sampling(temperature=5.0, seed=seed)))
        return [[token["token"] for token in side(events, name)] for name in ("dense", "flash")]

    dense, flash = texts(1)
    assert dense == flash
    assert len(set(dense)) > 12
    assert texts(1) == [dense, flash]
    assert texts(2)[0] != dense


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_where_the_sides_part_both_tokens_are_scored(temperature, decoder, monkeypatch):
    """Catches scores of another step or side, and a parting that is told twice."""
    dense, seen = decoder._dense, []

    def second_best(hidden, sampling, step):
        choice = dense(hidden, sampling, step)
        if step < 2:
            return choice
        seen.append(hidden)
        return type(choice)((choice.token + 1) % 515, 515, False, 1)

    monkeypatch.setitem(decoder._choosers, "dense", second_best)
    ids = decoder.encode(PROMPT, True, 6, temperature)
    events = list(decoder.events(ids, 6, Sampling(temperature=temperature, seed=5)))
    (parts,) = [event for event in events if event["event"] == "parts"]
    assert parts["step"] == 2
    logits = (seen[0].double() @ decoder.head.weight.detach().double().T)[0]
    noise = gumbel(5, torch.tensor([2]), 515, impl="reference")[0].double()
    for name in ("dense", "flash"):
        token = side(events, name)[2]["token"]
        wanted = float(logits[token] + temperature * noise[token])
        assert parts["float32"][name] == pytest.approx(wanted, rel=1e-5, abs=1e-5)
        assert parts["dense_dtype"][name] == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    assert parts["float32"]["flash"] > parts["float32"]["dense"]


def test_an_end_token_ends_its_side_and_dense_runs_where_it_is_faster(decoder, monkeypatch):
    """Catches tokens after the end, and a search that deployment would not run."""
    ids = decoder.encode(PROMPT, True, 12, 0.0)
    second = side(list(decoder.events(ids, 2, Sampling())), "dense")[1]["token"]
    monkeypatch.setattr(decoder, "ends", frozenset([second]))
    monkeypatch.setattr(decoder.head, "token_crossover_rows", 0)
    events = list(decoder.events(ids, 12, Sampling()))
    for name in ("dense", "flash"):
        tokens = side(events, name)
        assert [token["ends"] for token in tokens] == [False] * (len(tokens) - 1) + [True]
        assert tokens[-1]["token"] == second
        assert not any(token["certified"] for token in tokens)
    assert len(events) < 25


def test_half_characters_wait(decoder):
    """Catches replacement characters in the text of a token that is a part of a character."""
    data = "aé€".encode()
    text = PiecewiseText(lambda tokens: bytes(tokens).decode(errors="replace"))
    pieces = [text.piece(byte, last=False) for byte in data]
    assert pieces == ["a", "", "é", "", "", "€"]
    assert text.piece(0xC3, last=True) == "\ufffd"


def test_heads_that_certify_nothing_are_refused(decoder, monkeypatch):
    """Catches a page that colours what is not known."""
    monkeypatch.setattr(decoder.head, "index", None)
    with pytest.raises(FlashHeadError, match="wanted an index of codes"):
        SideBySide(decoder.model, decoder._tokenizer, encode)


@pytest.mark.model
def test_smollm2():
    """Catches figures that do not hold for a real head: in float32, where nothing ties, the same
    text on both sides, every token certified, a few rows scored and a fraction of the bytes read.
    """
    from flashhead.integrations import transformers

    model = transformers.load(
        "smollm2-135m",
        dtype=torch.float32,
        crossover=1,
        progress=False,
        calibration_tokens=1024,
    )
    made = SideBySide(model, transformers.load_tokenizer("smollm2-135m"), encode)
    ids = made.encode("The capital of France is", True, 16, 0.0)
    events = list(made.events(ids, 16, Sampling()))
    dense, flash = side(events, "dense"), side(events, "flash")
    assert len(flash) == 16
    assert [token["token"] for token in flash] == [token["token"] for token in dense]
    assert "Paris" in "".join(token["text"] for token in flash)
    for token in flash:
        assert token["certified"]
        assert token["candidates"] < 0.05 * made.head.out_features
    assert sum(token["bytes_read"] for token in flash) / 16 < 0.3 * made.head.dense_bytes
