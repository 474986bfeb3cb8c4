"""`bench decode --context`: all lines start from the same tokens, and a wrong one fails the run."""

import json

import pytest
import torch
from latent_models import ids, tiny, windows

from flashhead.bench import context, context_lines
from flashhead.bench.attention_shapes import parse_shape
from flashhead.bench.context_table import format_context_table
from flashhead.bench.random_latent import random_models
from flashhead.cli.main import main
from flashhead.convert.latent import make_latent
from flashhead.convert.latent_folder import mark_latent
from flashhead.errors import FlashHeadError
from flashhead.integrations.latent_cache import LatentCache
from flashhead.integrations.latent_model import latent_modules, serve_latents
from flashhead.nn.token_store import StoreOptions
from flashhead.options_latent import LatentOptions

SHAPE = "heads=4,head_dim=16,kv_heads=2,rank=32,rope=8"


@pytest.fixture(scope="module", params=["gqa", "gemma3"])
def pair(request):
    base, model = tiny(request.param), tiny(request.param)
    make_latent(model, LatentOptions(kv_ratio=1.5), windows(4), progress=False)
    serve_latents(model, StoreOptions())
    return model, base


@torch.no_grad()
def test_lines_start_where_the_text_ends(pair):
    """A cache filled with another layer's tokens, or one more token; a rewind that loses some."""
    model, base = pair
    tokens = ids(1, 30)
    wanted = base(tokens, use_cache=False).logits[0, 29:]
    text = context_lines.read_text(base, tokens[:, :29], latent=False)
    made = context_lines.full_lines("full", base, text, 3, 40)
    line = made["full"]()
    for _ in range(2):
        found = line.step(tokens[:, 29:].expand(3, 1))
        torch.testing.assert_close(found, wanted.expand(3, -1), rtol=1e-3, atol=1e-3)
        for _ in range(4):
            line.step(torch.full((3, 1), 7))
        line.rewind(5)
    wanted = model(tokens, past_key_values=LatentCache(model)).logits[0, 29:]
    text = context_lines.read_text(model, tokens[:, :29], latent=True)
    lines = context_lines.latent_lines(model, (StoreOptions(),), text, 2, 40)
    for make in lines.values():
        line = make()
        for _ in range(2):
            found = line.step(tokens[:, 29:].expand(2, 1))
            torch.testing.assert_close(found, wanted.expand(2, -1), rtol=1e-3, atol=1e-3)
            line.step(torch.full((2, 1), 7))
            line.rewind(2)


def test_the_document(pair):
    model, base = pair
    kinds = (StoreOptions(), StoreOptions("int8", 16))
    arguments = {"contexts": (12, 20), "batches": (1, 2), "kinds": kinds, "steps": 2, "rounds": 2}
    document = context.bench_context(model, {"full": base}, ids(1, 21)[0], **arguments)
    assert [(p["context"], p["batch"]) for p in document["points"]] == [
        (12, 1), (12, 2), (20, 1), (20, 2),
    ]  # fmt: skip
    for point in document["points"]:
        assert list(point["lines"]) == [
            "full", "full fp8", "full products", "latent bf16", "latent bf16 static", "latent int8",
            "latent int8 static",
        ]  # fmt: skip
        assert not point["skipped"]
        assert {row["equal_tokens"] for row in point["verified"].values()} == {1.0}
        assert list(point["verified"]) == [
            "full products", "latent bf16 static", "latent int8 static",
        ]  # fmt: skip
        assert point["lines"]["full"]["ratio"] == 1
        latents = sum(m.shape.width for m in latent_modules(model).values())
        room = -(-(point["context"] + 5) // 64) * 64
        held = point["lines"]["latent bf16 static"]["cache_bytes"]
        assert held == 4 * latents * room * point["batch"]
    assert "latent int8 static" in format_context_table(document)
    with pytest.raises(FlashHeadError, match="wanted more than 21"):
        context.bench_context(model, {}, ids(1, 21)[0], contexts=(21,), batches=(1,))
    with pytest.raises(FlashHeadError, match="latent attention"):
        context.bench_context(base, {}, ids(1, 21)[0], contexts=(20,), batches=(1,))


def test_a_wrong_line_fails_the_run(pair, monkeypatch):
    """A static cache that is faster because it forgets a token."""
    model, _ = pair
    monkeypatch.setattr(context_lines.StaticLatentCache, "end_step", lambda _: None)
    with pytest.raises(RuntimeError, match="static: logits are off"):
        context.bench_context(model, {}, ids(1, 21)[0], contexts=(20,), batches=(1,), rounds=1)


@torch.no_grad()
def test_products_are_what_is_timed(pair, monkeypatch):
    """A line of plain products that runs torch's attention, or leaves the model with products."""
    _, base = pair
    calls, products = [], context_lines._attend_products
    monkeypatch.setattr(
        context_lines, "_attend_products", lambda *a, **k: calls.append(1) or products(*a, **k)
    )
    tokens = ids(1, 13)
    text = context_lines.read_text(base, tokens[:, :12], latent=False)
    line = context_lines.full_lines("full", base, text, 1, 20)["full products"]()
    line.step(tokens[:, 12:])
    assert len(calls) == 2
    base(tokens, use_cache=False)
    assert len(calls) == 2


@torch.no_grad()
@pytest.mark.parametrize("shape", [SHAPE, SHAPE.replace("rope=8", "rope=0")])
def test_random_models_share_all_but_attention(shape):
    model, bases = random_models(parse_shape(shape), 2, 64, "cpu", torch.float32)
    assert list(bases) == ["full", "gqa"]
    for base in bases.values():
        assert base.lm_head.weight is model.lm_head.weight
        for own, other in zip(model.model.layers, base.model.layers, strict=True):
            assert own.mlp is other.mlp
        assert torch.isfinite(base(ids(1, 9)).logits).all()
    widths = [base.model.layers[1].self_attn.k_proj.out_features for base in bases.values()]
    assert widths == [64, 32]
    module = model.model.layers[1].self_attn
    assert module.shape.width == parse_shape(shape).rank + parse_shape(shape).rope
    assert torch.isfinite(model(ids(1, 9)).logits).all()


def test_from_the_command_line(capsys, tmp_path):
    out = tmp_path / "context.json"
    arguments = ["--context", "16", "--steps", "1", "--repeats", "1", "--layers", "1"]
    arguments += ["--lines", "gqa,latent bf16 static"]
    assert main(["bench", "decode", "--shape", SHAPE, *arguments, "--out", str(out)]) == 0
    assert "context 16, batch 1, float32 on cpu" in capsys.readouterr().out
    document = json.loads(out.read_text())
    assert document["shape"] == SHAPE
    point = document["points"][0]
    assert list(point["lines"]) == ["gqa", "latent bf16 static"]
    assert point["baseline"] == "gqa"
    assert point["lines"]["gqa"]["step_ms"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "x", "--batch", "2"], "--batch: wanted --context"),
        ([], "wanted --model MODEL"),
        (["--context", "8"], "wanted --model MODEL or --shape SHAPE"),
        (["--context", "8", "--model", "x", "--compile"], "--compile is of the other"),
        (["--context", "8", "--shape", SHAPE, "--against", "x"], "wanted --model with it"),
        (["--context", "8", "--model", "x", "--layers", "2"], "wanted --shape with it"),
        (["--context", "8", "--shape", "x"], "shape 'x'"),
        (
            ["--context", "8", "--shape", SHAPE, "--layers", "1", "--lines", "x"],
            "line 'x': wanted some of full, ",
        ),
    ],
)
def test_arguments_that_do_not_belong_together(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        raise SystemExit(main(["bench", "decode", *arguments]))
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_more_tokens_than_the_model_reads(pair, tmp_path, capsys):
    model, _ = pair
    folder = tmp_path / "latent"
    model.save_pretrained(folder)
    mark_latent(model, folder)
    most = model.config.max_position_embeddings
    assert main(["bench", "decode", "--model", str(folder), "--context", str(most)]) == 2
    assert f"wanted less than the model's {most:,} tokens" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_of_full_caches_on_a_gpu():
    """A graph of transformers' static cache that repeats one step, or starts one token late."""
    model, bases = random_models(parse_shape(SHAPE), 2, 256, "cuda", torch.bfloat16)
    arguments = {"contexts": (100,), "batches": (1, 3), "steps": 4, "rounds": 2}
    document = context.bench_context(model, bases, ids(1, 101)[0], **arguments)
    for point in document["points"]:
        assert {"full graph", "gqa graph", "latent bf16 static"} <= set(point["verified"])
        assert not point["skipped"]
