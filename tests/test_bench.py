"""The benchmark must refuse wrong results, measure ratios, and leave the model as it was."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flashhead import environment
from flashhead.bench import decode, timing
from flashhead.bench.decode import ConstantHead, bench_decode
from flashhead.bench.decode_table import format_decode_table
from flashhead.bench.head import COMPLETE, GREEDY, bench_head, format_head_table, verify_head
from flashhead.bench.products import check_product, pack_int4, pack_int8
from flashhead.errors import FlashHeadError
from flashhead.integrations.transformers import attach
from flashhead.nn.head import FlashHead

V, D = 211, 64


class SearchedLinear(nn.Linear):
    """A head with FlashHead's interface: exact for the best 20, off by `noise` elsewhere."""

    kind, impl, crossover_rows, candidates, noise = "codes", "reference", 2, 20, 1.0
    shift = 0

    def __init__(self, weight):
        super().__init__(weight.shape[1], weight.shape[0], bias=False)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.index = SimpleNamespace(options=None)

    def forward(self, hidden):
        return hidden.float() @ self.weight.float().T

    def search(self, hidden):
        exact = SearchedLinear.forward(self, hidden)
        best = exact.topk(self.candidates, dim=1).indices
        logits = (exact - self.noise).scatter(1, best, exact.gather(1, best))
        n = len(hidden)
        return SimpleNamespace(
            logits=logits,
            candidates=torch.full((n,), self.candidates),
            certified=torch.ones(n, dtype=torch.bool),
            bytes_read=torch.full((n,), 1000),
        )

    def next_token(self, hidden):
        tokens = SearchedLinear.forward(self, hidden).argmax(1) + self.shift
        n = len(hidden)
        certified = torch.ones(n, dtype=torch.bool)
        return SimpleNamespace(tokens=tokens, certified=certified, bytes_read=torch.full((n,), 500))


def weight(rows=V, d=D):
    return torch.randn(rows, d, generator=torch.Generator().manual_seed(1)).bfloat16()


def states(n=6):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(2)).bfloat16()


class Clock:
    """time.perf_counter that calls advance by what they claim to take."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def taking(self, seconds):
        def call(number):
            self.now += seconds * (1 + number)  # a machine that gets slower round by round

        return call


def test_ratios_are_taken_round_by_round(monkeypatch):
    """Catches a ratio of medians, one turned upside down, and warm-up rounds that count."""
    clock = Clock(monkeypatch)
    methods = {"base": clock.taking(2.0), "fast": clock.taking(0.5)}
    rows = timing.interleave(methods, "base", rounds=5, warmup=2)
    assert rows["fast"]["ratio"] == rows["fast"]["ratio_p10"] == 4
    assert rows["base"]["ratio"] == 1
    assert rows["base"]["median_ms"] == pytest.approx(2000 * 5)


def test_every_round_runs_all_methods_in_another_order():
    """Catches a method that always runs on the caches its neighbour left."""
    seen = []
    methods = {name: lambda number, name=name: seen.append((number, name)) for name in "abc"}
    timing.interleave(methods, "a", rounds=3, warmup=0)
    assert [name for _, name in seen] == list("abcbcacab")


def test_verify_accepts_a_right_head():
    """Catches a check that no head can pass, and counts that are not the head's."""
    counted = verify_head(SearchedLinear(weight()), states())
    assert counted["agreement"] == counted["certified_fraction"] == 1
    assert counted["candidates_mean"] == 20
    assert counted["bytes_read_mean"] == 1000


def test_verify_finds_candidates_that_are_not_exact():
    """Catches a rescoring in bf16: fewer exact logits than the head claims candidates."""
    head = SearchedLinear(weight())
    search = head.search

    def rounded(hidden):
        output = search(hidden)
        output.logits = output.logits.bfloat16().float()
        return output

    head.search = rounded
    with pytest.raises(RuntimeError, match="20 candidates but only"):
        verify_head(head, states())


def test_verify_finds_a_wrong_certificate():
    """Catches a certified token that is not the argmax, its own logit being exact."""
    head = SearchedLinear(weight())
    search = head.search

    def second_best(hidden):
        output = search(hidden)
        output.candidates -= 1
        best = output.logits.argmax(1, keepdim=True)
        output.logits.scatter_(1, best, -100.0)
        return output

    head.search = second_best
    with pytest.raises(RuntimeError, match="certified token"):
        verify_head(head, states())
    head.search = lambda hidden: _uncertified(second_best(hidden))
    assert verify_head(head, states())["agreement"] == 0


def test_verify_finds_a_wrong_next_token():
    """Catches a greedy mode that is timed although its token is another."""
    head = SearchedLinear(weight())
    head.shift = -1
    with pytest.raises(RuntimeError, match="next_token is certified"):
        verify_head(head, states())


def _uncertified(output):
    output.certified = torch.zeros_like(output.certified)
    return output


def test_bench_head_document():
    """Catches a batch or a method left out, and ratios or floors that are not numbers."""
    document = bench_head(SearchedLinear(weight()), states(), batches=(1, 3), repeats=2)
    json.dumps(document, allow_nan=False)
    names = [(row["batch"], row["method"].split(",")[0]) for row in document["rows"]]
    wanted = ["bf16 F.linear", "bf16 F.linear + argmax", "int8 weight-only", "int4 weight-only"]
    wanted += [COMPLETE, f"{COMPLETE} + argmax", GREEDY]
    assert names == [(batch, name) for batch in (1, 3) for name in wanted]
    searched, dense = (row for row in document["rows"] if row["method"] == COMPLETE)
    assert (searched["bytes_read"], dense["bytes_read"]) == (1000, 2 * V * D)
    table = format_head_table(document)
    assert table.count(f"{COMPLETE} (dense)") == 1  # above the crossover, at batch 3 only
    assert "x F.linear" in table


def test_bench_head_refuses():
    """Catches timings of a wrong head, and tracebacks for values that cannot work."""
    head = SearchedLinear(weight())
    for options in ({"batches": (9,)}, {"batches": ()}, {"batches": (0,)}, {"repeats": 0}):
        with pytest.raises(FlashHeadError, match="wanted"):
            bench_head(head, states(), **options)
    head.noise, head.candidates = 0.01, 200
    search = head.search
    head.search = lambda hidden: _shifted(search(hidden))
    with pytest.raises(RuntimeError, match="candidates"):
        bench_head(head, states(8))
    head.index = None
    with pytest.raises(FlashHeadError, match="dense head"):
        bench_head(head, states(8))


def _shifted(output):
    output.logits = output.logits + 0.01
    return output


@pytest.mark.parametrize(("rows", "d"), [(128, 64), (1001, 96), (70, 128)])
def test_quantised_products_are_close_to_bf16(rows, d):
    """Catches padding rows in the result, a wrong group, and a zero row that divides by zero."""
    head = weight(rows, d)
    head[3] = 0
    hidden = torch.randn(3, d, generator=torch.Generator().manual_seed(3)).bfloat16()
    truth = hidden.float() @ head.float().T
    int8, int8_bytes = pack_int8(head)
    int4, int4_bytes, group = pack_int4(head)
    scale = truth.std()
    assert int8(hidden).shape == int4(hidden).shape == truth.shape
    assert (int8(hidden).float() - truth).std() < 0.02 * scale
    assert (int4(hidden).float() - truth).std() < 0.2 * scale
    assert int8_bytes == rows * d + 2 * rows
    padded = -(-rows // 64) * 64
    assert int4_bytes == padded * d // 2 + padded * (d // group) * 4


def test_no_group_divides():
    """Catches an int4 product of the wrong group where d fits none."""
    assert pack_int4(weight(64, 40)) is None


def test_wrong_product_is_not_timed():
    """Catches a check that compares a product with itself."""
    head = weight()
    rows = head.float()
    check_product("right", lambda hidden: nn.functional.linear(hidden, head), rows, head)
    with pytest.raises(RuntimeError, match="wrong product is off"):
        check_product("wrong", lambda h: nn.functional.linear(h, head).roll(1, 1), rows, head)


def test_git_sha_is_of_flashheads_own_checkout(monkeypatch, tmp_path):
    """Catches the commit of whatever repository a virtual environment happens to lie in."""
    package = tmp_path / "src" / "flashhead"
    answers = {"rev-parse --show-toplevel": str(tmp_path), "rev-parse HEAD": "abc"}
    monkeypatch.setattr(environment, "__file__", str(package / "environment.py"))
    monkeypatch.setattr(environment, "_git", lambda _folder, *args: answers.get(" ".join(args)))
    assert environment.git_sha() == "abc"
    answers["status --porcelain --untracked-files=no"] = " M file"
    assert environment.git_sha() == "abc-dirty"
    answers["rev-parse --show-toplevel"] = str(tmp_path / "src")
    assert environment.git_sha() is None


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_answers_none_outside_a_repository(tmp_path):
    """Catches a traceback for a package that was installed from a wheel."""
    assert environment._git(tmp_path, "rev-parse", "HEAD") is None


def test_driver_of_a_gpu_is_named(monkeypatch):
    """Catches a traceback where there is no NVIDIA tool, and the lines of several cards."""
    monkeypatch.setattr(environment.Path, "exists", lambda path: False)
    monkeypatch.setattr(environment, "_output", lambda *command: None)
    assert environment._gpu_driver() is None
    monkeypatch.setattr(environment, "_output", lambda *command: "580.159.04\n580.159.04\n")
    assert environment._gpu_driver() == "580.159.04"


def test_provenance_is_json():
    """Catches values that only Python can read, and a missing field."""
    found = json.loads(json.dumps(environment.provenance(), allow_nan=False))
    assert set(found) == {"hardware", "versions", "git_sha", "argv"}
    assert found["versions"]["torch"] == torch.__version__
    assert found["hardware"]["threads"] == torch.get_num_threads()


transformers = pytest.importorskip("transformers")


class Tokenizer:
    def __call__(self, text, return_tensors):
        ids = torch.tensor([[5 + byte % 40 for byte in text.encode()]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def tiny_model():
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        sliding_window=12,
        layer_types=["sliding_attention", "full_attention"],
        eos_token_id=[3],
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.set_output_embeddings(SearchedLinear(model.get_output_embeddings().weight.detach()))
    return model


def run_decode(model, dense=None, **options):
    prompts = ["first", "another prompt"]
    options = {"new_tokens": 9, "repeats": 2} | options
    return bench_decode(dense or model, model, Tokenizer(), prompts, **options)


def test_bench_decode_document():
    """Catches a side that is missing, runs that stop at an end token, and a changed model."""
    model = tiny_model()
    head, settings = model.get_output_embeddings(), model.generation_config
    ids = Tokenizer()("first", "pt")["input_ids"]
    second = model.generate(ids, max_new_tokens=2, do_sample=False)[0, -1].item()
    settings.eos_token_id = [second]  # what the model says next would end the run
    document = run_decode(model)
    json.dumps(document, allow_nan=False)
    assert document["agreement"] == 1
    assert document["eager"]["identical_prompts"] == 2
    assert set(document["eager"]["sides"]) == {"dense", "flash", "body"}
    assert document["compiled"] is None
    assert model.get_output_embeddings() is head
    assert model.generation_config is settings
    assert settings.eos_token_id == [second]
    assert "eager" in format_decode_table(document)


def test_bench_decode_asks_for_the_winner_too():
    """Catches a side that takes complete logits after all, or says something else."""
    model = tiny_model()
    model.set_output_embeddings(decode.linear_twin(model.get_output_embeddings()))
    with attach(model, progress=False, calibration_tokens=64, crossover=16) as attachment:
        calls = []
        attachment.head.next_token = lambda *a, **k: (
            calls.append(1) or FlashHead.next_token(attachment.head, *a, **k)
        )
        document = run_decode(model)
    assert len(calls) == 2 * 9 * 3 - 2  # a warm-up of 8 tokens and two rounds of 9, two prompts
    assert document["eager"]["winner"]["agreement_with_flash"] == 1
    assert "complete logits, by the winner only" in format_decode_table(document)


def test_bench_decode_sees_other_tokens():
    """Catches an agreement that compares a side with itself."""
    model = tiny_model()
    head = model.get_output_embeddings()
    head.forward = lambda hidden: SearchedLinear.forward(head, hidden).roll(1, -1)
    document = run_decode(model)
    assert document["agreement"] < 1
    assert document["eager"]["identical_prompts"] == 0


def test_two_models(monkeypatch):
    """Catches the dense side running through FlashHead when it is a model of its own."""
    flash, dense = tiny_model(), tiny_model()
    calls = []
    own = decode.linear_twin(dense.get_output_embeddings())
    own.register_forward_hook(lambda *_: calls.append(1))
    dense.set_output_embeddings(own)
    assert run_decode(flash, dense)["agreement"] == 1
    assert calls
    assert dense.get_output_embeddings() is own


def test_static_cache_gives_the_same_tokens(monkeypatch):
    """Catches a cache that is not reset between runs, and a decoder left compiled."""
    compiled = []

    def fake_compile(forward):
        def one_token(*args, **kwargs):
            compiled.append(kwargs["input_ids"].shape[1])
            return forward(*args, **kwargs)

        return one_token

    monkeypatch.setattr(decode.torch, "compile", fake_compile)
    model = tiny_model()
    document = run_decode(model, compile=True)
    assert set(compiled) == {1}
    assert document["compiled"]["identical_prompts"] == 2
    assert document["compiled_speedup"] == document["compiled"]["speedup"]
    assert "forward" not in vars(model.get_decoder())
    assert "compiled" in format_decode_table(document)


def test_run_that_differs_is_an_error():
    """Catches figures of a side that does not repeat itself: a race, or a state left behind."""
    model = tiny_model()
    head, calls = model.get_output_embeddings(), []

    def unstable(hidden):
        calls.append(1)
        return SearchedLinear.forward(head, hidden).roll(len(calls), -1)

    head.forward = unstable
    with pytest.raises(RuntimeError, match="flash, prompt"):
        run_decode(model)


def test_bench_decode_refuses():
    """Catches a division by zero rounds and a comparison of dense with dense."""
    model = tiny_model()
    for options in ({"new_tokens": 1}, {"repeats": 0}):
        with pytest.raises(FlashHeadError, match="wanted"):
            run_decode(model, **options)
    model.set_output_embeddings(nn.Linear(D, V, bias=False))
    with pytest.raises(FlashHeadError, match="FlashHead"):
        run_decode(model)


def test_constant_head_is_complete():
    """Catches logits of the wrong shape or dtype, which would cost a conversion."""
    logits = ConstantHead(V)(torch.randn(2, 3, D, dtype=torch.bfloat16))
    assert logits.shape == (2, 3, V)
    assert logits.dtype == torch.float32
    assert not logits.any()
