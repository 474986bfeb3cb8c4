"""Decode steps at a long context: full caches and latents, in one run.

Each line's step is the whole model: weights, cache, dense head, argmax. Rows are equal, so one text
is read once (`context_lines`). Static latents and graphs are first compared with the caches that
grow, on the same tokens; then every round times every line, in another order, and goes back to the
same context. What does not fit into memory is named, not timed.
"""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashhead.bench.context_lines import (
    Contents,
    Line,
    full_lines,
    latent_lines,
    read_text,
    stored_line,
)
from flashhead.bench.timing import quantiles
from flashhead.environment import provenance
from flashhead.errors import FlashHeadError
from flashhead.integrations.latent_cache import LatentCache
from flashhead.integrations.latent_model import latent_modules
from flashhead.nn.token_store import StoreOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERIFIED_STEPS = 4
ROUNDINGS = 16
"""Tensors that a layer rounds to the model's dtype, one after the other: norms, products,
rotations, weights of attention, activations, residuals."""


def bench_context(
    model: "PreTrainedModel",
    bases: dict[str, "PreTrainedModel"],
    ids: Tensor,
    *,
    contexts: Sequence[int],
    batches: Sequence[int],
    kinds: Sequence[StoreOptions] = (),
    steps: int = 16,
    rounds: int = 10,
    only: Sequence[str] = (),
    save: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Time decode steps.

    Args:
        model: with latent attention.
        bases: models with full caches, by the name of their line.
        ids: `int64[longest context + 1]`, the text.
        contexts: cached tokens a row.
        batches: rows.
        kinds: how latents are kept; (): as the model's folder says.
        steps: timed at once.
        rounds: measured rounds.
        only: names of the lines, which are all held in memory at once; (): all there are.
        save: called with the document after every point.

    Returns:
        JSON-able: `points`, each with `lines` (`step_ms` and its spread, `tok_per_sec`, `ratio` to
        the first line, `cache_bytes`) and `skipped`.

    Raises:
        FlashHeadError: a model without latents, too short a text, or an unknown line.
        RuntimeError: a line's logits are not those of the line that it must equal.
    """
    started = time.perf_counter()
    if not latent_modules(model):
        raise FlashHeadError("bench decode --context: wanted a model with latent attention")
    if len(ids) <= max(contexts):
        raise FlashHeadError(
            f"the text has {len(ids)} tokens: wanted more than {max(contexts)}, the context"
        )
    ids, options = ids.to(model.device), tuple(kinds) or (model.latent_store,)
    texts = {name: read_text(base, ids[None, : max(contexts)], False) for name, base in
             bases.items()}  # fmt: skip
    own = read_text(model, ids[None, : max(contexts)], True)
    document: dict[str, Any] = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "steps": steps,
        "rounds": rounds,
        "points": [],
        **provenance(),
    }
    for context in contexts:
        room = context + max(steps, VERIFIED_STEPS) + 1
        for batch in batches:
            lines: dict[str, Callable[[], Line]] = {}
            for name, base in bases.items():
                lines |= full_lines(name, base, _cut(texts[name], context), batch, room)
            latents = _cut(own, context)
            lines |= latent_lines(model, options, latents, batch, room)
            lines = _chosen(lines, only)
            exact = _references(model, bases, texts, latents, options, context, ids[context])
            limit = largest_error(model.dtype, len(model.get_decoder().layers))
            point = _point(lines, exact, ids[context], batch, steps, rounds, limit)
            document["points"].append({"context": context, "batch": batch} | point)
            document["seconds"] = time.perf_counter() - started
            if save is not None:
                save(document)
    return document


def _chosen(
    lines: dict[str, Callable[[], Line]], only: Sequence[str]
) -> dict[str, Callable[[], Line]]:
    for name in only:
        if name not in lines:
            raise FlashHeadError(f"line {name!r}: wanted some of {', '.join(lines)}")
    return {name: lines[name] for name in only or lines}


def _cut(contents: Contents, context: int) -> Contents:
    return [(first[:, :, :context], second[:, :, :context]) for first, second in contents]


@torch.no_grad()
def _references(
    model: "PreTrainedModel",
    bases: dict[str, "PreTrainedModel"],
    texts: dict[str, Contents],
    latents: Contents,
    kinds: tuple[StoreOptions, ...],
    context: int,
    token: Tensor,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Greedy tokens and logits of a row in a growing cache, by the line that must give them."""
    found = {}
    for options in kinds:
        cache = LatentCache(model, options)
        line = stored_line("", model, cache, latents, 1)
        found[f"latent {options.kind} static"] = _greedy(line, token)
    for name, base in bases.items():
        line = full_lines(name, base, _cut(texts[name], context), 1, 0)[name]()
        found[f"{name} graph"] = found[f"{name} products"] = _greedy(line, token)
    return found


def _greedy(line: Line, token: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens `[VERIFIED_STEPS]` that a row is given, and logits `[VERIFIED_STEPS, V]`."""
    given, logits = [token.reshape(1, 1)], []
    for _ in range(VERIFIED_STEPS):
        logits.append(line.step(given[-1])[0])
        given.append(logits[-1].argmax().reshape(1, 1))
    return torch.cat(given[:-1]).flatten(), torch.stack(logits)


@torch.no_grad()
def _point(
    makers: dict[str, Callable[[], Line]],
    exact: dict[str, tuple[Tensor, Tensor]],
    token: Tensor,
    batch: int,
    steps: int,
    rounds: int,
    limit: float,
) -> dict[str, Any]:
    lines: dict[str, Line] = {}
    skipped: dict[str, str] = {}
    errors: dict[str, dict[str, float]] = {}
    for name, make in makers.items():
        try:
            line = make()
            line.step(token.expand(batch, 1))
            line.rewind(1)
        except (torch.OutOfMemoryError, FlashHeadError) as error:
            skipped[name] = str(error).splitlines()[0]
            continue
        lines[name] = line
        if name in exact:
            errors[name] = _verify(line, *exact[name], batch, limit)
    if not lines:
        raise FlashHeadError("no line fits into memory")
    times = _time(lines, token.expand(batch, 1), steps, rounds)
    baseline = next(iter(makers))
    rows = {name: _row(times, name, baseline, batch, steps) for name in lines}
    for name, row in rows.items():
        row["cache_bytes"] = lines[name].cache_bytes
    return {"baseline": baseline, "lines": rows, "verified": errors, "skipped": skipped}


def largest_error(dtype: torch.dtype, layers: int) -> float:
    """Of logits in their norm, of two ways to the same sums.

    In 16 bits: independent roundings of both, as a random walk (uniform within half a unit in the
    last place, at worst). In float32, where orders of summation count for more: 1e-3.
    """
    if dtype == torch.float32:
        return 1e-3
    return float(torch.finfo(dtype).eps / 2 / 3**0.5 * (2 * ROUNDINGS * layers) ** 0.5)


def _verify(
    line: Line, given: Tensor, logits: Tensor, batch: int, limit: float
) -> dict[str, float]:
    """Compare a line with what it must give; goes back to where it was."""
    found = torch.stack([line.step(token.expand(batch, 1)) for token in given])
    line.rewind(len(given))
    error = float((found - logits[:, None]).float().norm() / logits.float().norm() / batch**0.5)
    same = float((found.argmax(-1) == logits.argmax(-1)[:, None]).float().mean())
    if not error <= limit or (logits.dtype == torch.float32 and same < 1):
        raise RuntimeError(
            f"{line.name}: logits are off by {error:.3g} of their norm, {same:.0%} of tokens equal"
        )
    return {"error": error, "largest": limit, "equal_tokens": same}


def _time(
    lines: dict[str, Line], tokens: Tensor, steps: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds of `steps` greedy steps, each round in another order, after one round that warms."""
    names, times = list(lines), {name: [] for name in lines}  # type: ignore[var-annotated]
    for number in range(rounds + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            step, next_tokens = lines[name].step, tokens
            next_tokens = step(next_tokens).argmax(-1, keepdim=True)  # a growing cache takes room
            _wait(tokens)
            start = time.perf_counter()
            for _ in range(steps):
                next_tokens = step(next_tokens).argmax(-1, keepdim=True)
            _wait(tokens)
            if number:
                times[name].append(time.perf_counter() - start)
            lines[name].rewind(steps + 1)
    return times


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _row(
    times: dict[str, list[float]], name: str, baseline: str, batch: int, steps: int
) -> dict[str, Any]:
    median, p10, p90 = quantiles([1e3 * seconds / steps for seconds in times[name]])
    row: dict[str, Any] = {"step_ms": median, "step_ms_p10": p10, "step_ms_p90": p90}
    row |= {"tok_per_sec": 1e3 * batch / median, "ratio": None}
    if baseline in times:
        pairs = zip(times[baseline], times[name], strict=True)
        ratios = quantiles([base / own for base, own in pairs])
        row |= dict(zip(("ratio", "ratio_p10", "ratio_p90"), ratios, strict=True))
    return row
