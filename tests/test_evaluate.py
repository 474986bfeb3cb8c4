"""Metrics against slow float64 loops, text files, and heads that are wrong on purpose."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flashhead.errors import FlashHeadError
from flashhead.evaluate import baselines, evaluate_head, format_table
from flashhead.evaluate import measure as measure_module
from flashhead.evaluate.metrics import Reference, top_ties
from flashhead.evaluate.text import read_documents, scored_positions, token_windows

V, D, BOS = 131, 40, 1


class ByteTokenizer:
    """Bytes as tokens 2..., BOS is token 1."""

    def __init__(self, bos=BOS):
        self.bos_token_id = bos

    def __call__(self, text, add_special_tokens=True, verbose=True):
        assert not add_special_tokens
        return {"input_ids": [2 + byte % (V - 2) for byte in text.encode()]}


class SearchedLinear(nn.Linear):
    """A head with FlashHead's interface whose search is exact; counts what `forward` is asked."""

    kind, impl, crossover_rows = "codes", "reference", 8

    def __init__(self, weight, bias=None):
        super().__init__(weight.shape[1], weight.shape[0], bias=bias is not None)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.index = SimpleNamespace(options=None)
        self.forward_rows = []

    def forward(self, hidden):
        self.forward_rows.append(hidden.shape[:-1].numel())
        return self.exact(hidden)

    def exact(self, hidden):
        bias = 0 if self.bias is None else self.bias.float()
        return hidden.float() @ self.weight.float().T + bias

    def dense(self, hidden):
        return nn.functional.linear(hidden, self.weight, self.bias)

    def changed(self, logits):
        return logits

    def search(self, hidden):
        n = len(hidden)
        return SimpleNamespace(
            logits=self.changed(self.exact(hidden)),
            candidates=torch.arange(n) + 3,
            certified=torch.arange(n) % 2 == 0,
            fallback=torch.arange(n) % 5 == 0,
            bytes_read=torch.arange(n) * 10 + 1000,
        )


class TinyModel(nn.Module):
    """Token embeddings mixed with their past, then the head; `cap` is a soft cap on the logits."""

    def __init__(self, head, cap=None):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, D, dtype=torch.bfloat16)
        self.head, self.cap = head, cap
        self.config = SimpleNamespace(max_position_embeddings=64)
        self.device, self.name_or_path = torch.device("cpu"), "tiny"

    def get_output_embeddings(self):
        return self.head

    def hidden(self, ids):
        return on_grid(self.embedding(ids).float().cumsum(1) / 3).bfloat16()

    def forward(self, input_ids, use_cache):
        logits = self.head(self.hidden(input_ids))
        return SimpleNamespace(logits=logits if self.cap is None else capped(logits, self.cap))


def on_grid(values: Tensor) -> Tensor:
    """Multiples of 1/16: D products of such numbers below 16 with such numbers below 8 sum to at
    most 21 bits, which float32 holds exactly in any order.
    """
    return (16 * values).round() / 16


def capped(logits: Tensor, cap: float) -> Tensor:
    return torch.tanh(logits / cap) * cap


def weight(scale=1.0):
    return (torch.randn(V, D, generator=torch.Generator().manual_seed(1)) * scale).bfloat16()


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return path


def evaluate(head, path, positions=150, **options):
    cap = options.pop("cap", None)
    model = TinyModel(head, cap)
    return evaluate_head(model, ByteTokenizer(), path, positions, progress=False, **options)


def slow_distances(truth, other):
    """KL and total variation of one row, by the definitions, in Python floats."""
    p = [math.exp(x - max(truth)) for x in truth]
    q = [math.exp(x - max(other)) for x in other]
    p, q = [x / math.fsum(p) for x in p], [x / math.fsum(q) for x in q]
    kl = math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
    return kl, math.fsum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2


def test_divergences_are_the_definitions(monkeypatch):
    """Catches a swapped KL direction, a missing half in TV, float32 sums, and lost row blocks."""
    monkeypatch.setattr("flashhead.evaluate.metrics.METRIC_LOGITS", {torch.float64: 3 * V})
    generator = torch.Generator().manual_seed(2)
    truth = torch.randn(8, V, generator=generator) * 4
    other = truth + torch.randn(8, V, generator=generator) * 0.3
    kl, tv = Reference(truth).divergences(other)
    for row in range(8):
        wanted = slow_distances(truth[row].tolist(), other[row].tolist())
        assert (kl[row].item(), tv[row].item()) == pytest.approx(wanted, rel=1e-12)


def test_document_equals_slow_computation(text_file):
    """Catches figures of the wrong positions, percentiles of the wrong thing, lost chunks, bias."""
    bias = torch.linspace(-1, 1, V).bfloat16()
    head = SearchedLinear(weight(0.3), bias)
    noise = torch.randn(V, generator=torch.Generator().manual_seed(3)) * 0.2
    head.changed = lambda logits: logits + noise
    document = evaluate(head, text_file)
    model = TinyModel(head)
    windows = token_windows(
        read_documents(text_file), ByteTokenizer(), 150, window_tokens=64, seed=0
    )
    states = torch.cat([model.hidden(w[None])[0][w != BOS] for w in windows]).detach()
    truth = states.double().numpy() @ head.weight.double().numpy().T + bias.double().numpy()
    kls, tvs = zip(*(slow_distances(t, t + noise.double().numpy()) for t in truth), strict=True)
    agree = truth.argmax(1) == (truth + noise.numpy()).argmax(1)
    lengths = [int((w != BOS).sum()) for w in windows]
    counts = np.concatenate([np.arange(n) for n in lengths])
    assert len(states) == document["positions"] == 150
    assert document["kl"] == pytest.approx(np.mean(kls), rel=1e-4)
    assert document["kl_stderr"] == pytest.approx(np.std(kls, ddof=1) / math.sqrt(150), rel=1e-3)
    assert document["tv"] == pytest.approx(np.mean(tvs), rel=1e-4)
    assert document["agreement"] == pytest.approx(agree.mean())
    assert document["disagreements"] == (~agree).sum() > 0
    assert document["candidates_mean"] == pytest.approx(counts.mean() + 3)
    assert document["candidates_p99"] == pytest.approx(np.quantile(counts + 3, 0.99))
    assert document["certified_fraction"] == pytest.approx((counts % 2 == 0).mean())
    assert document["certified_wrong"] == (~agree & (counts % 2 == 0)).sum()
    assert document["fallback_fraction"] == pytest.approx((counts % 5 == 0).mean())
    dense_bytes = 2 * (V * D + V)
    wanted_fraction = (counts * 10 + 1000).mean() / dense_bytes
    assert document["bytes_fraction"] == pytest.approx(wanted_fraction)
    assert document["methods"]["bf16"]["bytes_fraction"] == 1


def test_identical_head_has_no_distance(text_file):
    """Catches a truth that is not the float32 product, or a method fed other hidden states."""
    document = evaluate(SearchedLinear(weight()), text_file)
    assert document["agreement"] == 1
    assert document["disagreements"] == document["certified_wrong"] == 0
    assert abs(document["kl"]) < 1e-12
    assert document["tv"] < 1e-7
    assert document["methods"]["flashhead"]["kl"] == document["kl"]
    assert document["methods"]["int4"]["kl"] > document["methods"]["int8"]["kl"] > document["kl"]


def test_wrong_head_is_detected(text_file):
    """Catches a measurement that compares a head with itself: a rolled vocabulary must fail."""
    head = SearchedLinear(weight())
    head.changed = lambda logits: logits.roll(1, -1)
    document = evaluate(head, text_file)
    assert document["agreement"] < 0.2
    assert document["kl"] > 1
    assert document["certified_wrong"] > 0


@pytest.mark.parametrize("value", [-math.inf, math.nan, math.inf])
def test_incomplete_logits_stop_the_run(text_file, value):
    """Catches -inf for tokens that lost: KL would be infinite and the JSON no JSON."""
    head = SearchedLinear(weight())

    def changed(logits):
        logits[3, 7] = value
        return logits

    head.changed = changed
    with pytest.raises(RuntimeError, match="flashhead: a logit is NaN or infinite"):
        evaluate(head, text_file)


def test_either_of_two_ties_agrees():
    """Catches a top-1 that counts the other of two float32 ties as a mistake, or all as right."""
    truth = Reference(torch.tensor([[5.0, 1.0, 5.0]] * 3))
    logits = torch.tensor([[2.0, 1.0, 3.0], [3.0, 1.0, 2.0], [1.0, 3.0, 2.0]])
    assert truth.agrees(logits).tolist() == [True, True, False]


def test_bf16_ties_are_counted():
    """Catches ties taken over all logits instead of the two best, or of float32 logits."""
    rows = torch.tensor([[5.0, 5.0, 1.0], [5.0, 4.0, 4.0], [1.0, 7.0, 7.0]])
    assert top_ties(rows).tolist() == [True, False, True]
    close = torch.tensor([[1.0, 1.001]])
    assert top_ties(close.bfloat16()).item()
    assert not top_ties(close).item()


def test_soft_cap_is_applied_and_demanded(text_file):
    """Catches a soft-capped model compared before its cap, silently."""
    head, cap = SearchedLinear(weight()), 5.0
    with pytest.raises(FlashHeadError, match="logit_postprocess"):
        evaluate(head, text_file, cap=cap)
    head.changed = lambda logits: logits + 40 * (logits == logits.amax(1, keepdim=True))
    free = evaluate(head, text_file)
    same = evaluate(head, text_file, cap=cap, postprocess=lambda logits: capped(logits, cap))
    assert same["kl"] < free["kl"] / 3
    assert same["methods"]["bf16"]["agreement"] <= 1


def test_prefill_scores_one_position(text_file):
    """Catches V logits for every position of a window: 0.5 GB each on Gemma."""
    head = SearchedLinear(weight())
    evaluate(head, text_file)
    assert set(head.forward_rows) == {1}
    assert not head._forward_hooks
    assert not head._forward_pre_hooks


def test_chunks_do_not_matter(text_file, monkeypatch):
    """Catches a chunk dropped at the end of a window.

    A product of other shape adds up in another order: the weight is on a grid, as the hidden states
    are, so that this changes no logit.
    """
    head = SearchedLinear(on_grid(weight().float()).bfloat16())
    head.changed = lambda logits: logits * 1.1
    whole = evaluate(head, text_file)
    monkeypatch.setattr(measure_module, "CHUNK_LOGITS", 7 * V)
    chunked = evaluate(head, text_file)
    assert chunked["kl"] == pytest.approx(whole["kl"], rel=1e-9)
    assert chunked["agreement"] == whole["agreement"]


def test_dense_head_is_refused(text_file):
    """Catches an evaluation of nothing: a model whose head was never replaced."""
    with pytest.raises(FlashHeadError, match=r"Linear.*FlashHead"):
        evaluate(nn.Linear(D, V), text_file)


def test_document_is_json_and_a_table(text_file):
    """Catches tensors and NaN in the document, and a table that lacks a method."""
    document = evaluate(SearchedLinear(weight()), text_file)
    again = json.loads(json.dumps(document, allow_nan=False))
    assert {"model", "head", "data", "versions", "git_sha", "argv", "hardware"} <= again.keys()
    table = format_table(again)
    for word in ("flashhead (codes)", "bf16 dense", "int8 dense", "int4 dense", "150 positions"):
        assert word in table


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 32), (4, 7), (4, 64), (2, 1)])
def test_quantized_head_is_rounding_to_nearest(bits, group, monkeypatch):
    """Catches scales of the wrong group, a short last group, a zero row, and lost row blocks."""
    monkeypatch.setattr(baselines, "BLOCK_WEIGHTS", 50 * D)
    rows = weight()
    rows[5] = 0
    quantized = baselines.quantize_head(rows, bits, group)
    top = 2 ** (bits - 1) - 1
    width = group or D
    slow = np.zeros((V, D))
    source = rows.float().numpy()  # float32, as exact halves must round alike
    for v in range(V):
        for start in range(0, D, width):
            part = source[v, start : start + width]
            scale = torch.tensor(np.abs(part).max()) / top
            scale = float(scale if group is None else scale.bfloat16())
            if scale:
                slow[v, start : start + width] = (
                    np.clip(np.rint(part / np.float32(scale)), -top - 1, top) * scale
                )
    hidden = torch.randn(6, D, generator=torch.Generator().manual_seed(4)).bfloat16()
    wanted = hidden.double().numpy() @ slow.T
    assert np.abs(quantized.logits(hidden).numpy() - wanted).max() < 1e-4
    groups = -(-D // width)
    assert quantized.bytes_read == V * (D * bits // 8 + groups * (4 if group is None else 2))


def test_quantized_head_keeps_no_graph():
    """Catches autograd keeping every block alive: 3 GB on Gemma, whose head is a Parameter."""
    quantized = baselines.quantize_head(nn.Parameter(weight()), 4, 32)
    assert not quantized.scales.requires_grad
    assert not quantized.codes.requires_grad


def test_float32_logits_in_blocks(monkeypatch):
    """Catches a truth computed in bf16, and rows lost between blocks."""
    monkeypatch.setattr(baselines, "BLOCK_WEIGHTS", 50 * D)
    hidden = torch.randn(6, D, generator=torch.Generator().manual_seed(5)).bfloat16()
    bias = torch.randn(V).bfloat16()
    wanted = hidden.double() @ weight().double().T + bias.double()
    logits = baselines.float32_logits(hidden, weight(), bias)
    assert logits.dtype == torch.float32
    assert (logits.double() - wanted).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such file"),
        ("text.md", b"x", "ends in .txt or .jsonl"),
        ("empty.txt", b" \n", "holds no text"),
        ("empty.jsonl", b'{"text": ""}\n', "holds no text"),
        ("bytes.txt", b"ab\xff\xfe", "not UTF-8 at byte 2"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("other.jsonl", b'{"body": "a"}\n', "line 1: wanted an object"),
        ("number.jsonl", b'{"question": 1, "answer": "a"}\n', "line 1: wanted an object"),
        ("list.jsonl", b"[1]\n", "line 1: wanted an object"),
    ],
)
def test_unusable_text_is_one_clear_error(tmp_path, name, content, message):
    """Catches a traceback, or a silent skip, where the user's file is at fault."""
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FlashHeadError, match=message) as caught:
        read_documents(path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folder_is_not_a_text(tmp_path):
    """Catches an IsADirectoryError that escapes."""
    folder = tmp_path / "folder.txt"
    folder.mkdir()
    with pytest.raises(FlashHeadError, match="cannot be read"):
        read_documents(folder)


def test_jsonl_records(tmp_path):
    """Catches answers left out, blank lines counted, and U+2028 splitting a record."""
    path = tmp_path / "records.jsonl"
    lines = ['{"text": "one\u2028two"}', "", '{"question": "q", "answer": "a"}']
    path.write_text("\n".join(lines), encoding="utf-8")
    assert read_documents(path) == ["one\u2028two", "q\na"]


@pytest.mark.parametrize("bos", [BOS, None])
@pytest.mark.parametrize("positions", [1, 9, 10, 57, 111])
def test_windows_hold_exactly_the_positions(bos, positions):
    """Catches BOS counted as a position, windows without BOS, and one position too many."""
    documents = ["abc" * 17, "defg" * 15]
    windows = token_windows(documents, ByteTokenizer(bos), positions, window_tokens=10)
    assert sum(int(scored_positions(w, bos).sum()) for w in windows) == positions
    assert all(len(w) <= 10 for w in windows)
    if bos is not None:
        assert all(w[0] == bos for w in windows)


def test_windows_cover_the_text_once():
    """Catches overlapping windows and tokens that no window holds."""
    text = bytes(range(100)).decode()
    windows = token_windows([text], ByteTokenizer(), 100, window_tokens=9)
    body = torch.cat([w[w != BOS] for w in windows])
    assert sorted(body.tolist()) == list(range(2, 102))
    again = token_windows([text], ByteTokenizer(), 100, window_tokens=9)
    assert all(torch.equal(a, b) for a, b in zip(windows, again, strict=True))
    other = token_windows([text], ByteTokenizer(), 100, window_tokens=9, seed=1)
    assert not torch.equal(windows[0], other[0])


def test_too_few_tokens_names_both_numbers():
    """Catches an evaluation of fewer positions than asked, silently."""
    with pytest.raises(FlashHeadError, match=r"positions=12.*only 11 tokens"):
        token_windows(["elevenbytes"], ByteTokenizer(), 12)
    with pytest.raises(FlashHeadError, match="positions=0"):
        token_windows(["text"], ByteTokenizer(), 0)
