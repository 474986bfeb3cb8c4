"""The byte ledger against sums by hand, and what the index that is built really reads."""

import subprocess
import sys

import pytest
import torch

from flashhead.index.build_codes import build_codes
from flashhead.ledger.files import TensorInfo
from flashhead.ledger.index import codes_bytes
from flashhead.ledger.tokens import Ledger, token_bytes
from flashhead.options import CodesOptions


def test_import_without_torch():
    """`inspect` waiting seconds for torch to read a header."""
    program = "import sys, flashhead.ledger.index; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_sliding_window_and_experts():
    """A cache that grows beyond its window; experts that are not read."""
    config = {
        "vocab_size": 10,
        "hidden_size": 4,
        "num_hidden_layers": 3,
        "num_attention_heads": 1,
        "sliding_window": 5,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention", "linear_attention"],
    }
    tensors = {"head": TensorInfo((10, 4), 80.0), "a.experts.0.w": TensorInfo((4, 4), 32.0)}
    book = token_bytes(config, tensors, context=100)
    assert book.kv_bytes == (5 + 100) * 2 * 4 * 2
    assert book.body_bytes == 32 / 4 + 8


@pytest.mark.parametrize(
    ("rows", "dims", "bits"), [(1000, 64, 1.5), (33, 17, 1.0), (512, 96, 4), (40, 320, 2.5)]
)
def test_index_bytes_formula(rows, dims, bits):
    """`inspect` promising other bytes than the index that convert then writes."""
    options = CodesOptions(bits=bits)
    index = build_codes(torch.randn(rows, dims), options)
    assert codes_bytes(rows, dims, bits, len(index.segments)) == index.scan_bytes


def test_speedup_bound():
    """A bound that saves the bytes which are read, or forgets those of cache and body."""
    book = Ledger(10, 4, True, 100, head_bytes=60.0, kv_bytes=15.0, body_bytes=25.0)
    assert book.speedup_bound(1.0) == 1
    assert book.speedup_bound(0.0) == pytest.approx(100 / 40)
    assert book.speedup_bound(0.5) == pytest.approx(100 / 70)
    assert book.speedup_bound(2.0) < 1
