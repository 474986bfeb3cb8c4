"""Tokens per second that the bytes allow, at batch 1, and what was published.

    seconds per token = bytes / bandwidth + overhead

The overhead of one device, the RTX 3500 Ada, is fitted: one constant for the four figures that the
clusters method's paper gives for Llama-3.2-1B (arXiv 2603.14591), by least squares of the relative
errors of the time. Their context is not known, and does not matter to what the fit predicts for
them: all four read the same cache, whose time the constant takes in. The constant is a property of
that device and its software. Other devices have none here, so theirs is an upper bound; on an H100
small models are bound by launches and the host, far below it.
"""

import dataclasses
import math
from typing import Any

from flashhead.ledger.architecture import parse
from flashhead.ledger.configs import known_configs
from flashhead.ledger.index import expected_index
from flashhead.ledger.shapes import sized_tensors
from flashhead.ledger.tokens import Ledger, token_bytes

CLUSTER_TOKENS = 16
PROBES = 256
"""Of the published method, which names 256 and 512; the fewer read less."""
MEASURED_FRACTION = 0.10
"""Of the head's bytes, that a certified token read at most on average: 9.0-9.9 % on the four models
of `benchmarks/results/certified*.json`, with 1.25 bits a dimension.
"""
HEADS = ("dense", "published", "ours_expected", "ours_measured")
"""Ways to search a vocabulary: `head_bytes_read`."""

FIT_MODEL, FIT_DEVICE, FIT_CONTEXT = "llama-3.2-1b", "RTX 3500 Ada", 2048
PUBLISHED_TOK_PER_SEC = {
    ("bf16", "dense"): 130.0,
    ("bf16", "published"): 163.0,
    ("w4a16", "dense"): 278.0,
    ("w4a16", "published"): 485.0,
}
"""Of Llama-3.2-1B on the RTX 3500 Ada, by weights and head."""


@dataclasses.dataclass(frozen=True)
class Device:
    """A GPU by its data sheet.

    Args:
        name: for people.
        bandwidth_bytes_per_s: of its memory.
        memory_bytes: nominal; what a model needs beside its weights and cache is not counted.
    """

    name: str
    bandwidth_bytes_per_s: float
    memory_bytes: float


DEVICES = (
    Device(FIT_DEVICE, 432e9, 12e9),
    Device("Jetson AGX Orin", 204.8e9, 64e9),
    Device("H100", 3.35e12, 80e9),
)


@dataclasses.dataclass(frozen=True)
class Fit:
    """The overhead of the RTX 3500 Ada and what it makes of the figures it is fitted to."""

    overhead_ms: float
    predicted_tok_per_sec: dict[tuple[str, str], float]

    def largest_error(self) -> float:
        """Of the predictions, relative to what was published."""
        return max(
            abs(self.predicted_tok_per_sec[key] / published - 1)
            for key, published in PUBLISHED_TOK_PER_SEC.items()
        )

    def document(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "model": FIT_MODEL,
            "device": FIT_DEVICE,
            "context": FIT_CONTEXT,
            "probes": PROBES,
            "overhead_ms": self.overhead_ms,
            "largest_error": self.largest_error(),
            "figures": [
                {
                    "weights": key[0],
                    "head": key[1],
                    "published_tok_per_sec": published,
                    "predicted_tok_per_sec": self.predicted_tok_per_sec[key],
                    "error": self.predicted_tok_per_sec[key] / published - 1,
                }
                for key, published in PUBLISHED_TOK_PER_SEC.items()
            ],
        }


def head_bytes_read(book: Ledger) -> dict[str, float]:
    """Bytes read in place of the head, by way of searching it.

    Returns:
        dense: the head itself. published: normalised centroids in bf16, one for 16 tokens, and
        the rows of the probed clusters. ours_expected: what every query reads of a codes index of
        the usual size. ours_measured: the share of the head that certified tokens read on four
        models, candidates' rows included.
    """
    row = book.head_bytes / book.vocab_size
    centroids = math.ceil(book.vocab_size / CLUSTER_TOKENS)
    rows = centroids + min(PROBES, centroids) * CLUSTER_TOKENS
    return {
        "dense": book.head_bytes,
        "published": rows * row,
        "ours_expected": expected_index(book)["bytes_per_query"],
        "ours_measured": MEASURED_FRACTION * book.head_bytes,
    }


def tok_per_sec(book: Ledger, device: Device, overhead_ms: float) -> dict[str, float]:
    """Tokens per second of one sequence by way of searching the head."""
    rest = book.total_bytes - book.head_bytes
    return {
        head: 1 / ((rest + read) / device.bandwidth_bytes_per_s + overhead_ms / 1e3)
        for head, read in head_bytes_read(book).items()
    }


def fit_overhead() -> Fit:
    """The constant c >= 0 with the least sum of ((t + c) / T - 1)^2.

    t is the time of the bytes, T the published time: c = sum((1 - t/T) / T) / sum(1 / T^2).
    """
    architecture = parse(known_configs()[FIT_MODEL])
    config = dataclasses.asdict(architecture)
    device = next(device for device in DEVICES if device.name == FIT_DEVICE)
    books = {
        weights: token_bytes(config, sized_tensors(architecture, weights), FIT_CONTEXT)
        for weights, _ in PUBLISHED_TOK_PER_SEC
    }
    roofs = {key: tok_per_sec(books[key[0]], device, 0.0)[key[1]] for key in PUBLISHED_TOK_PER_SEC}
    above = sum((1 - rate / roofs[key]) * rate for key, rate in PUBLISHED_TOK_PER_SEC.items())
    below = sum(rate**2 for rate in PUBLISHED_TOK_PER_SEC.values())
    overhead_ms = max(0.0, above / below * 1e3)
    predicted = {
        key: tok_per_sec(books[key[0]], device, overhead_ms)[key[1]]
        for key in PUBLISHED_TOK_PER_SEC
    }
    return Fit(overhead_ms, predicted)
