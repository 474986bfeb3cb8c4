"""The two models of an evaluation, ready to answer."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flashhead.evaluate.suite.answers import fingerprint
from flashhead.evaluate.suite.harness import HarnessModel
from flashhead.evaluate.suite.heads import DenseHead, Head, SearchedHead
from flashhead.evaluate.suite.rows import Body, Recorder

MOST_ROWS = 16
"""Of a batch on a CPU: more rows gain nothing once products are bound by arithmetic."""
MOST_ROWS_GPU = 128
SHARE = 0.25
"""Of the free memory that keys, values and activations of a batch may take."""
NEW_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Side:
    """One model of the comparison.

    Args:
        body: the model without its head.
        head: what answers in its place.
        harness: both, as the harness sees them.
        fingerprint: of weights, index and settings.
        rows_at_once: rows of a batch, for rows of so many tokens that share so many first ones.
        settings: JSON-able: dtype, head, batch.
    """

    body: Body
    head: Head
    harness: HarnessModel
    fingerprint: str
    rows_at_once: Callable[[int, int], int]
    settings: dict[str, Any]


def make_side(
    model: Any,
    tokenizer: Any,
    *,
    searched: bool,
    batch: int | None,
    progress: bool,
    like: Side | None = None,
) -> Side:
    """A side of a loaded model; its output embedding is taken out of it.

    Args:
        model: a causal LM; with a FlashHead in it, if it is to be searched.
        tokenizer: of the model.
        searched: whether its FlashHead answers; else its own head, in float32.
        batch: rows at a time; None: as many as a share of the free memory holds.
        progress: bars on stderr.
        like: another side; if its body is the same, one body serves both.
    """
    from flashhead.integrations.transformers import head_of, logit_postprocess

    process = logit_postprocess(model.config)
    index = head_of(model).index if searched else None
    dtype = str(model.dtype).removeprefix("torch.")
    found = fingerprint(
        model,
        index,
        dtype=dtype,
        searched=searched,
        torch=torch.__version__,
        asked_tokens="exact",  # answers that were kept before were scored by complete logits
    )
    head: Head
    if searched:
        head = SearchedHead(head_of(model), process)
    else:
        head = DenseHead(model.get_output_embeddings(), process)
    shared = like is not None and same_body(like.body, model)
    body = like.body if like is not None and shared else Body(model)
    at_once = _constant(batch) if batch is not None else _by_memory(model)
    harness = HarnessModel(body, head, tokenizer, at_once, end_tokens(model, tokenizer), progress)
    settings: dict[str, Any] = {"dtype": dtype, "head": head.path, "fingerprint": found}
    if like is not None:
        settings["shares_body"] = shared
        like.harness.companion = harness if shared else None
    return Side(body, head, harness, found, at_once, settings)


def same_body(body: Body, model: Any) -> bool:
    """Whether a model is a body's twin but for the index: the same modules, weights and dtypes."""
    mine, other = body.model.state_dict(), model.state_dict()
    kinds = [
        [type(module) for module in one.modules() if not isinstance(module, (Recorder, nn.Linear))]
        for one in (body.model, model)
    ]
    return (
        type(body.model) is type(model)
        and kinds[0] == kinds[1]
        and mine.keys() == other.keys()
        and all(mine[n].dtype == other[n].dtype and torch.equal(mine[n], other[n]) for n in mine)
    )


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a generation."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    listed = ends if isinstance(ends, (list, tuple)) else [ends]
    found = {*listed, tokenizer.eos_token_id}
    return frozenset(int(token) for token in found if token is not None)


def _constant(batch: int) -> Callable[[int, int], int]:
    return lambda _tokens, _shared: batch


def _by_memory(model: Any) -> Callable[[int, int], int]:
    """Rows whose keys, values and activations fit, a power of two."""
    text = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    size = model.dtype.itemsize
    cached = 2 * text.num_hidden_layers * heads * width * size
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    active = (4 * inner + 8 * text.hidden_size) * size
    free = _free_bytes(model.device)
    most = MOST_ROWS if model.device.type == "cpu" else MOST_ROWS_GPU

    def rows(tokens: int, shared: int) -> int:
        # twice the cache: it grows by copies; the shared tokens were read before
        row = (tokens + NEW_TOKENS) * 2 * cached + (tokens - shared) * active
        fitting = max(1, int(SHARE * free / row))
        return int(min(most, 1 << (fitting.bit_length() - 1)))

    return rows


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo")
    if not lines.exists():  # not Linux: assume a small machine
        return 2**32
    fields = dict(line.split(":") for line in lines.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024
