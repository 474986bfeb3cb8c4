"""Perplexity through the cache: a prefill, then token by token, as a served model runs.

The rows of one document are the base model (keys and values in its dtype), the base model with only
its cache rounded, and the model that is compared. All see the same windows; every window's last
`decode_share` of tokens is decoded one at a time. Bytes are those the cache holds at the end.
"""

import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from flashhead.environment import provenance

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROUNDED = ("fp8", "int4")
"""Rows of the base model with a rounded cache."""
LABELS = {"base": "base, bf16 cache", "fp8": "base, fp8 cache", "int4": "base, int4 cache"}


@torch.no_grad()
def measure(
    model: "PreTrainedModel",
    windows: list[Tensor],
    make_cache: Callable[[], Any],
    *,
    decode_share: float,
    rows: int = 16,
    name: str = "",
    progress: bool = True,
) -> dict[str, float]:
    """One model, one kind of cache.

    Args:
        model: a causal LM.
        windows: int64[tokens] each; those of the same length run together.
        make_cache: a new, empty cache that counts its bytes.
        decode_share: of each window's tokens, from its end, run one at a time.
        rows: windows at a time.
        name: of the progress bar.
        progress: progress bar on stderr.

    Returns:
        `perplexity`, `nll` (nats a token), `tokens` (predicted), `decoded_tokens`,
        `cache_bytes_per_token`.
    """
    from flashhead.convert.latent_statistics import batches

    total = sum(len(window) for window in windows)
    nll, predicted, decoded, held, seen = 0.0, 0, 0, 0, 0
    with tqdm(total=total, desc=name, unit="token", disable=not progress, leave=False) as bar:
        for batch in batches(windows, rows * len(windows[0])):
            batch, cache = batch.to(model.device), make_cache()
            tokens = batch.shape[1]
            single = min(tokens - 1, round(decode_share * tokens))
            cuts = [0, *range(tokens - single, tokens + 1)]
            for start, stop in itertools.pairwise(cuts):
                out = model(batch[:, start:stop], past_key_values=cache, use_cache=True).logits
                targets = batch[:, start + 1 : stop + 1]
                kept = out[:, : targets.shape[1]].float().flatten(0, 1)
                nll += float(functional.cross_entropy(kept, targets.flatten(), reduction="sum"))
                predicted += targets.numel()
                bar.update((stop - start) * len(batch))
            decoded += single * len(batch)
            held, seen = held + cache.bytes_held(), seen + batch.numel()
    return {
        "perplexity": math.exp(nll / predicted),
        "nll": nll / predicted,
        "tokens": predicted,
        "decoded_tokens": decoded,
        "cache_bytes_per_token": held / seen,
    }


def compare(
    base: "PreTrainedModel",
    load_value: "Callable[[], PreTrainedModel]",
    windows: list[Tensor],
    *,
    data: Path,
    decode_share: float,
    rows: int = 16,
    progress: bool = True,
) -> dict[str, Any]:
    """A model against its base.

    Args:
        base: the model that is the truth.
        load_value: loads the one that is compared, after the base's rows are done.
        windows: int64[tokens] each.
        data: where they come from.
        decode_share: as in `measure`.
        rows: as in `measure`.
        progress: progress bars on stderr.

    Returns:
        JSON-able: `tasks.perplexity` with `base`, `value`, `ratio` and all `rows`, and where it was
        measured.
    """
    from flashhead.integrations.latent_cache import LatentCache, RoundedCache
    from flashhead.integrations.latent_model import latent_modules
    from flashhead.nn.token_store import StoreOptions

    start = time.perf_counter()
    options = {"decode_share": decode_share, "rows": rows, "progress": progress}

    def rounded(model: "PreTrainedModel", kind: str) -> Callable[[], Any]:
        return lambda: RoundedCache(model.config, StoreOptions(kind))

    table = {
        label: measure(base, windows, rounded(base, kind), name=label, **options)  # type: ignore[arg-type]
        for label, kind in (("base", "bf16"), *((kind, kind) for kind in ROUNDED))
    }
    value = load_value()
    # bytes of tokens are measured, not of room for more
    make = (
        (lambda: LatentCache(value, reserve=0)) if latent_modules(value) else rounded(value, "bf16")
    )
    table["value"] = measure(value, windows, make, name="value", **options)  # type: ignore[arg-type]
    for row in table.values():
        row["ratio"] = row["perplexity"] / table["base"]["perplexity"]
    task = {
        "base": table["base"]["perplexity"],
        "value": table["value"]["perplexity"],
        "ratio": table["value"]["ratio"],
        "cache_bytes_per_token": {
            name: table[name]["cache_bytes_per_token"] for name in ("base", "value")
        },
        "data": data.name,
        "windows": len(windows),
        "decode_share": decode_share,
        "dtype": str(base.dtype).removeprefix("torch."),
        "rows": table,
    }
    seconds = round(time.perf_counter() - start, 1)
    return {"tasks": {"perplexity": task}, "seconds": seconds, **provenance()}


def format_table(document: dict[str, Any], value: str) -> str:
    """The rows as text."""
    task = document["tasks"]["perplexity"]
    lines = [f"{'cache':<28}{'bytes/token':>12}{'smaller':>9}{'perplexity':>12}{'ratio':>8}"]
    base_bytes = task["rows"]["base"]["cache_bytes_per_token"]
    for name, row in task["rows"].items():
        held = row["cache_bytes_per_token"]
        lines.append(
            f"{LABELS.get(name, value)[:27]:<28}{held:>12,.0f}{base_bytes / held:>8.2f}x"
            f"{row['perplexity']:>12.3f}{row['ratio']:>8.4f}"
        )
    row = task["rows"]["value"]
    lines.append(
        f"{row['tokens']:,.0f} tokens of {task['data']}, {row['decoded_tokens']:,.0f} decoded one "
        f"at a time, {task['dtype']}"
    )
    return "\n".join(lines)
