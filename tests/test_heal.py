"""Healing: it learns, it stops and goes on as if it had not, it touches only what it may."""

import itertools
import json

import pytest
import torch
from latent_models import ids, tiny, windows
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flashhead.cli import main
from flashhead.convert import heal as heal_module
from flashhead.convert.heal import Healing, heal, schedule
from flashhead.convert.heal_text import healing_rows, pack, read_sampled
from flashhead.convert.latent import make_latent
from flashhead.convert.latent_folder import mark_latent
from flashhead.errors import FlashHeadError
from flashhead.integrations.latent_model import serve_latents
from flashhead.integrations.transformers import load_dense
from flashhead.nn.token_store import StoreOptions
from flashhead.options_heal import HealOptions
from flashhead.options_latent import LatentOptions

SMALL = {"tokens": 4096, "batch_tokens": 256, "row_tokens": 64}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder with a tokenizer of 131 words."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny("gqa").bfloat16().save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 131)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    return folder


@pytest.fixture
def out(teacher, tmp_path):
    model = load_dense(str(teacher))
    make_latent(model, LatentOptions(kv_ratio=4.0), windows(), progress=False)
    serve_latents(model, StoreOptions())
    folder = tmp_path / "out"
    model.save_pretrained(folder)
    mark_latent(model, folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_text(" ".join(f"w{i}" for i in ids(1, 3000, seed=4)[0].tolist()))
    return path


def test_it_learns_and_keeps_the_head(out, teacher, text):
    """Both stages lower their own held-out loss; embeddings are what they were."""
    before = load_file(out / "model.safetensors")
    fast = {**SMALL, "tokens": 16384, "rate_a": 3e-3, "rate_b": 1e-3}
    first = heal(out, str(teacher), HealOptions(**fast, stage="a"), files=(text,), progress=False)
    held = first["held_out"]
    assert held["after"]["regression"] < 0.9 * held["before"]["regression"]
    second = heal(out, str(teacher), HealOptions(**fast, stage="b"), files=(text,), progress=False)
    assert second["held_out"]["after"]["kl"] < 0.8 * held["before"]["kl"]
    after = load_file(out / "model.safetensors")
    assert after.keys() == before.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {"model.embed_tokens.weight", "lm_head.weight"} & before.keys() == same
    assert {t.dtype for t in after.values()} == {torch.bfloat16}
    assert not (out / ".heal").exists()
    assert json.loads((out / "heal.json").read_text())["finished"]
    assert second["peak_memory_bytes"] > 0
    load_dense(str(out))


@pytest.mark.parametrize("stage", ["a", "b"])
def test_a_step_in_parts_is_the_same_step(stage, out, teacher):
    """Loss and gradients of four rows, at once and one by one; and the held-out losses."""

    class Kept(torch.optim.SGD):
        def zero_grad(self, set_to_none=True):
            pass

    rows, found = ids(24, 64, seed=5), []
    for micro in (256, 64):
        options = HealOptions(**SMALL, stage=stage, micro_tokens=micro)
        student, taught = (load_dense(str(f), dtype=torch.float32) for f in (out, teacher))
        healing = Healing(out, student, taught, rows, options)
        trained = healing._trained(stage)
        loss = healing._step(stage, 0, trained, Kept(trained.values(), lr=0.0))
        grads = {name: p.grad for name, p in trained.items() if p.grad is not None}
        found.append(({"loss": loss, **healing._held_out()}, grads))
    (losses, grads), (losses_parts, grads_parts) = found
    assert losses_parts == pytest.approx(losses, rel=1e-4)
    assert grads.keys() == grads_parts.keys()
    assert grads
    for name, grad in grads.items():
        torch.testing.assert_close(grads_parts[name], grad, rtol=1e-3, atol=1e-5)


def test_a_worse_model_is_not_written(out, teacher, text, capsys):
    """A rate that is far too high."""
    before = (out / "model.safetensors").read_bytes()
    arguments = ["heal", str(out), "--teacher", str(teacher), "--data", str(text), "--json"]
    arguments += ["--tokens", "4096", "--batch-tokens", "256", "--row-tokens", "64"]
    assert main([*arguments, "--stage", "b", "--rate-b", "0.3"]) == 1
    output = capsys.readouterr()
    report = json.loads(output.out.splitlines()[-1])
    assert report["finished"]
    assert not report["written"]
    assert report["held_out"]["after"]["kl"] > report["held_out"]["before"]["kl"]
    assert "stays as it was; lower --rate-a or --rate-b" in output.err
    assert (out / "model.safetensors").read_bytes() == before
    assert not (out / ".heal").exists()


def interrupted(monkeypatch, after):
    """KeyboardInterrupt in the given training step of the process."""
    real, calls = Healing._step, []

    def step(self, *args):
        calls.append(0)
        if len(calls) == after:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(Healing, "_step", step)


@pytest.mark.parametrize("after", [3, 5, 9])
def test_an_interrupted_run_goes_on_as_one(after, out, teacher, text, tmp_path, monkeypatch):
    """Stage a is 4 steps: interrupted inside it, at the first step of b, and inside b."""
    import shutil

    whole = tmp_path / "whole"
    shutil.copytree(out, whole)
    options = HealOptions(**SMALL)
    heal(whole, str(teacher), options, files=(text,), progress=False)
    with monkeypatch.context() as patch:
        interrupted(patch, after)
        with pytest.raises(KeyboardInterrupt):
            heal(out, str(teacher), options, files=(text,), progress=False)
    assert (out / ".heal" / "state.json").is_file()
    changed = HealOptions(**SMALL, rate_b=1e-3)
    with pytest.raises(FlashHeadError, match=r"rate_b=0\.0001 was interrupted"):
        heal(out, str(teacher), changed, files=(text,), progress=False)
    report = heal(out, str(teacher), options, files=(text,), progress=False)
    assert report["finished"]
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, out))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0.01, atol=1e-4)


def test_a_time_limit_leaves_a_checkpoint(out, teacher, text, capsys, monkeypatch):
    monkeypatch.setattr(heal_module.time, "perf_counter", iter(range(0, 10**9, 40)).__next__)
    arguments = ["heal", str(out), "--teacher", str(teacher), "--data", str(text), "--json"]
    arguments += ["--tokens", "4096", "--batch-tokens", "256", "--row-tokens", "64"]
    assert main([*arguments, "--minutes", "5"]) == 0
    output = capsys.readouterr()
    assert "the time is over" in output.err
    assert not json.loads(output.out.splitlines()[-1])["finished"]
    assert (out / ".heal" / "state.json").is_file()
    monkeypatch.undo()
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["finished"]


def test_sampled_text_is_kept(teacher, tmp_path):
    """Sampled once; a second run reads the file, and a damaged one is told."""
    model, kept = load_dense(str(teacher), dtype=torch.float32), tmp_path / "text.safetensors"
    settings = {"tokens": 600, "row_tokens": 32, "seed": 0, "seconds": None, "progress": False}
    rows = healing_rows(model, None, (), kept, **settings)
    assert rows.shape[1] == 32
    assert len(rows) >= 16
    stream = read_sampled(kept, 131)
    assert int((stream == 1).sum()) > 1  # texts begin with BOS
    assert torch.equal(healing_rows(model, None, (), kept, **settings), rows)
    with pytest.raises(FlashHeadError, match="no text of this model"):
        read_sampled(kept, 50)
    kept.write_bytes(b"x" * 100)
    with pytest.raises(FlashHeadError, match="not readable"):
        read_sampled(kept, 131)


def test_mistakes(out, teacher, text, tmp_path):
    options = HealOptions(**SMALL)
    other = tmp_path / "other"
    torch.manual_seed(3)
    changed = tiny("gqa")
    torch.nn.init.normal_(changed.get_output_embeddings().weight)
    changed.save_pretrained(other)
    with pytest.raises(FlashHeadError, match="its head differs"):
        heal(out, str(other), options, files=(text,), progress=False)
    tiny("gqa", num_hidden_layers=1).save_pretrained(other)
    with pytest.raises(FlashHeadError, match="num_hidden_layers is 1, the folder's is 2"):
        heal(out, str(other), options, files=(text,), progress=False)
    with pytest.raises(FlashHeadError, match="has latent attention itself"):
        heal(out, str(out), options, files=(text,), progress=False)
    with pytest.raises(FlashHeadError, match="has no latent attention"):
        heal(teacher, str(teacher), options, files=(text,), progress=False)
    with pytest.raises(FlashHeadError, match="wanted 128 or more"):
        pack([torch.arange(100)], 64)
    with pytest.raises(FlashHeadError, match="rate_a"):
        HealOptions(tokens=99, rate_a=2.0)


def test_the_rate_warms_up_and_falls():
    rates = [schedule(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == 1
    assert rates[-1] < 0.11
    assert all(a >= b for a, b in itertools.pairwise(rates[5:]))
