"""The head alone: verify, then time it against the dense product and torch's quantised ones.

Nothing is timed before its result is right: the head's logits on real hidden states are compared
with float64, and a wrong one ends the run. Then all methods run interleaved on the same hidden
states (`timing.py`). The byte floor is what a method would take if it did nothing but read its
bytes at the bandwidth of a large copy measured in the same run.
"""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashhead.bench.products import pack_int4, pack_int8
from flashhead.bench.timing import copy_bytes_per_sec, interleave
from flashhead.environment import provenance
from flashhead.errors import FlashHeadError

if TYPE_CHECKING:
    from flashhead.nn.head import FlashHead

VERIFIED_ROWS = 32
BLOCK_WEIGHTS = 2**23
"""Weights converted to float64 at a time (64 MB)."""
BASELINE = "bf16 F.linear"
COMPLETE, GREEDY = "FlashHead logits", "FlashHead next_token"


def bench_head(
    head: "FlashHead",
    hidden: Tensor,
    *,
    batches: Sequence[int] = (1, 2, 4, 8),
    repeats: int = 50,
) -> dict[str, Any]:
    """Verify a head on hidden states, then time it.

    Args:
        head: with an index.
        hidden: `bf16/f32[n, d]`, real hidden states; each round takes the next ones.
        batches: rows a call.
        repeats: interleaved rounds a batch size.

    Returns:
        JSON document with a row for every batch size and method.

    Raises:
        FlashHeadError: no index, too few hidden states, or a value out of range.
        RuntimeError: the head, or a baseline, returns a wrong result.
    """
    started = time.perf_counter()
    _require(head, hidden, batches, repeats)
    with torch.inference_mode():
        verified = verify_head(head, hidden[:: -(-len(hidden) // VERIFIED_ROWS)])
        int8, int8_bytes = pack_int8(head.weight)
        int4 = pack_int4(head.weight)
        dense_bytes = head.weight.numel() * head.weight.element_size()
        bytes_read = {BASELINE: dense_bytes, "bf16 F.linear + argmax": dense_bytes}
        bytes_read |= {"int8 weight-only": int8_bytes}
        if int4 is not None:
            bytes_read[f"int4 weight-only, group {int4[2]}"] = int4[1]
        bytes_read[COMPLETE] = bytes_read[f"{COMPLETE} + argmax"] = verified["bytes_read_mean"]
        bytes_read[GREEDY] = verified["greedy_bytes_read_mean"]
        bandwidth = copy_bytes_per_sec()
        rows = []
        for batch in batches:
            calls = _calls(head, hidden, batch, int8, None if int4 is None else int4[0])
            timings = interleave(
                dict(zip(bytes_read, calls, strict=True)), BASELINE, rounds=repeats
            )
            for name, timing in timings.items():
                dense = name.startswith(COMPLETE) and batch > head.crossover_rows
                size = dense_bytes if dense else bytes_read[name]
                floor = {"bytes_read": size, "floor_ms": size / bandwidth * 1e3}
                rows.append({"batch": batch, "method": name, **timing, **floor})
    return {
        "head": head.kind,
        "impl": head.impl,
        "crossover_rows": head.crossover_rows,
        "vocab_size": head.weight.shape[0],
        "hidden_size": head.weight.shape[1],
        "verified": verified,
        "repeats": repeats,
        "copy_gb_per_sec": bandwidth / 1e9,
        "rows": rows,
        **provenance(),
        "seconds": time.perf_counter() - started,
    }


def _require(head: "FlashHead", hidden: Tensor, batches: Sequence[int], repeats: int) -> None:
    if getattr(head, "index", None) is None:
        raise FlashHeadError('a dense head: wanted a FlashHead with an index, head="codes"')
    if repeats < 1 or not batches or min(batches) < 1:
        raise FlashHeadError(f"repeats={repeats}, batches={tuple(batches)}: wanted 1 or more each")
    if hidden.dim() != 2 or hidden.shape[1] != head.weight.shape[1] or len(hidden) < max(batches):
        raise FlashHeadError(
            f"hidden states of shape {tuple(hidden.shape)}: "
            f"wanted [{max(batches)} or more, {head.weight.shape[1]}]"
        )


def _calls(
    head: "FlashHead",
    hidden: Tensor,
    batch: int,
    int8: Callable[[Tensor], Tensor],
    int4: Callable[[Tensor], Tensor] | None,
) -> list[Callable[[int], Tensor]]:
    """The timed calls, in the order of the table; each takes the hidden states of its round."""
    weight, bias = head.weight, head.bias
    starts = len(hidden) // batch

    def rows(number: int) -> Tensor:
        start = number % starts * batch
        return hidden[start : start + batch].to(weight.dtype)

    calls: list[Callable[[int], Tensor]] = [
        lambda number: F.linear(rows(number), weight, bias),
        lambda number: F.linear(rows(number), weight, bias).argmax(-1),
        lambda number: int8(rows(number)),
    ]
    if int4 is not None:
        calls.append(lambda number: int4(rows(number)))
    calls.append(lambda number: head(rows(number)))
    calls.append(lambda number: head(rows(number)).argmax(-1))
    calls.append(lambda number: head.next_token(rows(number)).tokens)
    return calls


def verify_head(head: "FlashHead", hidden: Tensor) -> dict[str, Any]:
    """Compare the head's search with float64 on some hidden states.

    A certified argmax (of the logits, and of `next_token`) must be the float64 one, but for logits
    that float32 cannot tell apart, and at least as many logits as there are candidates must be
    exact. Exact is: off by at most four times what `hidden.float() @ weight.float().T` errs.

    Args:
        head: with an index.
        hidden: `bf16/f32[n, d]`.

    Returns:
        What was counted, JSON-able.

    Raises:
        RuntimeError: one of the two does not hold; the message says where.
    """
    output = head.search(hidden)
    truth, eager_error = float64_logits(hidden, head.weight, head.bias)
    slack = 4 * eager_error
    error = (output.logits.double() - truth).abs()
    exact = (error <= slack).sum(1)
    if bool((exact < output.candidates).any()):
        row = int((exact < output.candidates).nonzero()[0])
        raise RuntimeError(
            f"hidden state {row}: {int(output.candidates[row])} candidates but only "
            f"{int(exact[row])} logits within {slack:.2g} of float64"
        )
    chosen = output.logits.argmax(1, keepdim=True)
    regret = truth.amax(1) - truth.gather(1, chosen)[:, 0]
    wrong = output.certified & (regret > slack)
    inexact = output.certified & (error.gather(1, chosen)[:, 0] > slack)
    if bool((wrong | inexact).any()):
        row = int((wrong | inexact).nonzero()[0])
        raise RuntimeError(
            f"hidden state {row}: certified token {int(chosen[row])} is {float(regret[row]):.3g} "
            f"below the best float64 logit, its own off by {float(error[row, chosen[row]]):.3g}"
        )
    greedy = head.next_token(hidden)
    lost = truth.amax(1) - truth.gather(1, greedy.tokens[:, None])[:, 0]
    if bool((greedy.certified & (lost > slack)).any()):
        row = int((lost > slack).nonzero()[0])
        raise RuntimeError(
            f"hidden state {row}: next_token is certified {float(lost[row]):.3g} below the best"
        )
    return {
        "rows": len(hidden),
        "greedy_bytes_read_mean": greedy.bytes_read.double().mean().item(),
        "agreement": (regret <= slack).double().mean().item(),
        "certified_fraction": output.certified.double().mean().item(),
        "candidates_mean": output.candidates.double().mean().item(),
        "bytes_read_mean": output.bytes_read.double().mean().item(),
        "float32_error": eager_error,
    }


def float64_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, float]:
    """Float64 logits `[n, V]` on the device of `hidden`, and the largest error of the eager float32
    ones.
    """
    vocab_size, d = weight.shape
    logits = torch.empty(len(hidden), vocab_size, dtype=torch.float64, device=hidden.device)
    worst = 0.0
    block_rows = max(1, BLOCK_WEIGHTS // d)
    for start in range(0, vocab_size, block_rows):
        block = slice(start, min(vocab_size, start + block_rows))
        logits[:, block] = hidden.double() @ weight[block].double().T
        eager = hidden.float() @ weight[block].float().T
        if bias is not None:
            logits[:, block] += bias[block].double()
            eager += bias[block].float()
        worst = max(worst, (eager.double() - logits[:, block]).abs().max().item())
    return logits, worst


def format_head_table(document: dict[str, Any]) -> str:
    """Ratios first, for people; `document` is what `bench_head` returned."""
    verified = document["verified"]
    lines = [
        f"head {document['vocab_size']:,} x {document['hidden_size']:,}, {document['head']}, "
        f"{document['impl']}; verified on {verified['rows']} hidden states; "
        f"copy {document['copy_gb_per_sec']:.1f} GB/s",
        f"{'batch':>5}  {'method':<28}{'x F.linear':>11}{'p10-p90':>14}"
        f"{'ms':>9}{'MB read':>9}{'floor ms':>10}",
    ]
    for row in document["rows"]:
        dense = row["method"].startswith(COMPLETE) and row["batch"] > document["crossover_rows"]
        spread = f"{row['ratio_p10']:.2f}-{row['ratio_p90']:.2f}"
        lines.append(
            f"{row['batch']:>5}  {row['method'] + (' (dense)' if dense else ''):<28}"
            f"{row['ratio']:>10.2f}x{spread:>14}{row['median_ms']:>9.2f}"
            f"{row['bytes_read'] / 1e6:>9.1f}{row['floor_ms']:>10.2f}"
        )
    return "\n".join(lines)
