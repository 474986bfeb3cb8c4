"""Tokens a second of `generate`, dense against FlashHead, in one process on the same weights.

Each round runs every side on one prompt, in rotating order, greedy and of fixed length (end tokens
are ignored), and the speed-up is the median over rounds of the two times' ratio. A third side
replaces the head by one that returns a constant: what it reaches is the upper bound for any head.

With `compile=True` the same is measured once more with a static cache and the decoder compiled for
one token (`torch.compile`), on all sides alike: transformers' own overhead a token then shrinks.
The head stays outside the compiled part, so that all sides share one compiled body.

A FlashHead of codes runs once more as "winner", by `generate_certified`, which asks the head for
its winner only.

With a `base`, the model that a quantized variant was made from, two more sides run: the base as it
is, and the variant's body with an int8 dense head (torch's weight-only product).
"""

import contextlib
import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flashhead.bench.products import int8_codes
from flashhead.bench.timing import quantiles
from flashhead.environment import provenance
from flashhead.errors import FlashHeadError
from flashhead.integrations.greedy import generate_certified
from flashhead.nn.head import FlashHead
from flashhead.nn.packed import Int8Linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WARMUP_TOKENS = 8
"""Enough for a compiled decoder to be compiled anew with its lengths as variables."""


class ConstantHead(nn.Module):
    """A head that costs nothing: the same zero logits for every hidden state."""

    logits: Tensor

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.register_buffer("logits", torch.zeros(vocab_size), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Zeros, float32[..., V], of `[..., d]` hidden states."""
        return self.logits.expand(*hidden.shape[:-1], -1)


@dataclasses.dataclass
class _Side:
    """A model, the head it runs with, and what was measured."""

    model: "PreTrainedModel"
    head: nn.Module
    certified: bool = False
    seconds: list[float] = dataclasses.field(default_factory=list)
    decode_seconds: list[float] = dataclasses.field(default_factory=list)
    tokens: dict[int, list[int]] = dataclasses.field(default_factory=dict)


class _Clock:
    """A streamer that notes when each token arrives; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to flush."""


def bench_decode(
    model_dense: "PreTrainedModel",
    model_flash: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    *,
    new_tokens: int,
    repeats: int,
    compile: bool = False,  # noqa: A002
    base: "PreTrainedModel | None" = None,
) -> dict[str, Any]:
    """Time `generate` with the dense head, with FlashHead and with no head, interleaved.

    Args:
        model_dense: with its own head, or the same object as `model_flash`: its weights are then
            used through an `nn.Linear`.
        model_flash: whose output embedding is a FlashHead.
        tokenizer: of both.
        prompts: texts, used in turn.
        new_tokens: tokens generated a run.
        repeats: rounds through all prompts.
        compile: measure with a static cache and a compiled decoder, too.
        base: a model with its own head to compare with as well, and with it an int8 head.

    Returns:
        JSON document: `eager` and `compiled` (None unless asked for), eager's main figures on top;
        with codes each of them has `winner`, what asking for the winner only is worth; with a base
        `stacked`: how many times as fast as it FlashHead is, and as its own body with an int8 head.

    Raises:
        FlashHeadError: a value out of range, or a model without FlashHead.
        RuntimeError: a run is not repeatable or stops early.
    """
    started = time.perf_counter()
    flash = model_flash.get_output_embeddings()
    if getattr(flash, "index", None) is None:
        raise FlashHeadError("model_flash: wanted a model with a FlashHead that has an index")
    if not prompts or repeats < 1 or new_tokens < 2:
        raise FlashHeadError(
            f"{len(prompts)} prompts, repeats={repeats}, new_tokens={new_tokens}: "
            "wanted 1 or more, 1 or more, 2 or more"
        )
    inputs = [tokenizer(prompt, return_tensors="pt") for prompt in prompts]
    dense = (
        linear_twin(flash) if model_dense is model_flash else model_dense.get_output_embeddings()
    )

    def measure(runner: Callable[["PreTrainedModel"], dict[str, Any]]) -> dict[str, Any]:
        sides = {
            "dense": _Side(model_dense, dense),
            "flash": _Side(model_flash, flash),
            "body": _Side(model_flash, ConstantHead(flash.weight.shape[0])),
        }
        if isinstance(flash, FlashHead) and flash.searches_tokens:
            sides["winner"] = _Side(model_flash, flash, certified=True)
        if base is not None:
            sides["base"] = _Side(base, base.get_output_embeddings())
            sides["int8"] = _Side(model_flash, int8_twin(flash))
        return _interleave(sides, inputs, new_tokens, repeats, runner)

    eager, compiled = measure(lambda _model: {}), None
    if compile:
        length = max(len(batch["input_ids"][0]) for batch in inputs) + new_tokens
        with contextlib.ExitStack() as stack:
            models = {id(m): m for m in (model_dense, model_flash, base) if m is not None}
            for model in models.values():
                stack.enter_context(compiled_decoder(model))
            caches = {key: _static_cache(model, length) for key, model in models.items()}
            compiled = measure(lambda model: {"past_key_values": _reset(caches[id(model)])})
    return {
        "model": model_flash.name_or_path,
        "head": flash.kind,
        "impl": flash.impl,
        "prompts": len(prompts),
        "new_tokens": new_tokens,
        "repeats": repeats,
        "dense_tok_per_sec": eager["sides"]["dense"]["tok_per_sec"],
        "flash_tok_per_sec": eager["sides"]["flash"]["tok_per_sec"],
        "speedup": eager["speedup"],
        "agreement": eager["agreement"],
        "compiled_speedup": None if compiled is None else compiled["speedup"],
        "eager": eager,
        "compiled": compiled,
        **provenance(),
        "seconds": time.perf_counter() - started,
    }


def linear_twin(head: nn.Linear) -> nn.Linear:
    """An `nn.Linear` that shares the head's weight and bias."""
    out_features, in_features = head.weight.shape
    twin = nn.Linear(in_features, out_features, bias=head.bias is not None, device="meta")
    twin.weight, twin.bias = head.weight, head.bias
    return twin


def int8_twin(head: nn.Linear) -> nn.Module:
    """A dense head of the same rows in 8 bits, a scale a row."""
    codes, scales = int8_codes(head.weight.detach())
    bias = None if head.bias is None else head.bias.detach()
    return Int8Linear(codes, scales, bias)


def _interleave(
    sides: dict[str, _Side],
    inputs: list[Any],
    new_tokens: int,
    repeats: int,
    arguments: Callable[["PreTrainedModel"], dict[str, Any]],
) -> dict[str, Any]:
    """One warm-up round, then `repeats` rounds through all prompts; see `bench_decode`."""
    names = list(sides)
    for side in sides.values():
        for batch in inputs:
            _generate(side, batch, min(new_tokens, WARMUP_TOKENS), arguments(side.model))
    statistics = getattr(sides["flash"].head, "stats", None)
    if statistics is not None:
        statistics.reset()
    for number in range(repeats * len(inputs)):
        which = number % len(inputs)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            side = sides[name]
            tokens, clock, seconds = _generate(
                side, inputs[which], new_tokens, arguments(side.model)
            )
            if len(tokens) != new_tokens or side.tokens.setdefault(which, tokens) != tokens:
                raise RuntimeError(f"{name}, prompt {which}: the run stopped early or differs")
            side.seconds.append(seconds)
            side.decode_seconds.append(clock[-1] - clock[1])
    return _summary(sides, new_tokens)


def _generate(
    side: _Side, batch: Any, new_tokens: int, arguments: dict[str, Any]
) -> tuple[list[int], list[float], float]:
    """New tokens, arrival times and seconds of one greedy run."""
    clock = _Clock()
    with _running(side.model, side.head):
        start = time.perf_counter()
        settings = {**batch, "max_new_tokens": new_tokens, "streamer": clock, **arguments}
        if side.certified:
            output = generate_certified(side.model, **settings)
        else:
            output = side.model.generate(**settings)
        seconds = time.perf_counter() - start
    return output[0, batch["input_ids"].shape[1] :].tolist(), clock.times, seconds


@contextlib.contextmanager
def _running(model: "PreTrainedModel", head: nn.Module) -> Iterator[None]:
    """The model with another head, and greedy settings that no end token stops."""
    own_head, own_settings = model.get_output_embeddings(), model.generation_config
    settings = type(own_settings)(
        do_sample=False, bos_token_id=own_settings.bos_token_id, pad_token_id=0
    )
    model.set_output_embeddings(head)
    model.generation_config = settings
    try:
        yield
    finally:
        model.set_output_embeddings(own_head)
        model.generation_config = own_settings


def _summary(sides: dict[str, _Side], new_tokens: int) -> dict[str, Any]:
    dense, flash, body = sides["dense"], sides["flash"], sides["body"]
    speedup, p10, p90 = quantiles(_ratios(dense.seconds, flash.seconds))
    pairs = [
        (ours == theirs)
        for which, tokens in dense.tokens.items()
        for ours, theirs in zip(flash.tokens[which], tokens, strict=True)
    ]
    return {
        "speedup": speedup,
        "speedup_p10": p10,
        "speedup_p90": p90,
        "decode_speedup": quantiles(_ratios(dense.decode_seconds, flash.decode_seconds))[0],
        "upper_bound": quantiles(_ratios(dense.seconds, body.seconds))[0],
        "head_share": 1 - quantiles(_ratios(body.decode_seconds, dense.decode_seconds))[0],
        "agreement": sum(pairs) / len(pairs),
        "identical_prompts": sum(
            flash.tokens[which] == dense.tokens[which] for which in dense.tokens
        ),
        "sides": {name: _rates(side, new_tokens) for name, side in sides.items()},
        "head_statistics": _counters(flash.head),
        "winner": _winner(sides),
        "stacked": _stacked(sides),
    }


def _stacked(sides: dict[str, _Side]) -> dict[str, float] | None:
    """FlashHead on its body against the base, and against an int8 head on the same body."""
    if "base" not in sides:
        return None
    return _over(sides, "flash", ("base", "int8"))


def _winner(sides: dict[str, _Side]) -> dict[str, float] | None:
    """`generate_certified` against every other side, and its agreement with complete logits."""
    if "winner" not in sides:
        return None
    others = tuple(name for name in ("dense", "flash", "base", "int8") if name in sides)
    result = _over(sides, "winner", others)
    same = [
        a == b
        for which, tokens in sides["flash"].tokens.items()
        for a, b in zip(sides["winner"].tokens[which], tokens, strict=True)
    ]
    return result | {"agreement_with_flash": sum(same) / len(same)}


def _over(sides: dict[str, _Side], ours: str, others: tuple[str, ...]) -> dict[str, float]:
    """How many times as fast as other sides one is: `over_NAME`, its spread, and of decoding."""
    result: dict[str, float] = {}
    for name in others:
        median, p10, p90 = quantiles(_ratios(sides[name].seconds, sides[ours].seconds))
        result |= {f"over_{name}": median, f"over_{name}_p10": p10, f"over_{name}_p90": p90}
        decode = _ratios(sides[name].decode_seconds, sides[ours].decode_seconds)
        result[f"over_{name}_decode"] = quantiles(decode)[0]
    return result


def _ratios(numerators: list[float], denominators: list[float]) -> list[float]:
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def _rates(side: _Side, new_tokens: int) -> dict[str, float]:
    """`tok_per_sec` is of the whole call, `decode_tok_per_sec` of what follows the first token."""
    median, p10, p90 = quantiles([new_tokens / seconds for seconds in side.seconds])
    decode = quantiles([(new_tokens - 1) / seconds for seconds in side.decode_seconds])[0]
    rates = {"tok_per_sec": median, "tok_per_sec_p10": p10, "tok_per_sec_p90": p90}
    return rates | {"decode_tok_per_sec": decode, "decode_ms_per_token": 1e3 / decode}


def _counters(head: nn.Module) -> dict[str, Any]:
    statistics = getattr(head, "stats", None)
    return copy.copy(vars(statistics)) if statistics is not None else {}


@contextlib.contextmanager
def compiled_decoder(model: "PreTrainedModel") -> Iterator[None]:
    """Run the model's decoder through `torch.compile` for one token, as it is for a prompt."""
    decoder = model.get_decoder()
    own = vars(decoder).get("forward")
    eager = decoder.forward
    compiled = torch.compile(eager)

    def forward(*args: Any, **kwargs: Any) -> Any:
        tokens = args[0] if args else kwargs.get("input_ids")
        one = tokens is not None and tokens.shape[1] == 1
        return (compiled if one else eager)(*args, **kwargs)

    decoder.forward = forward
    try:
        yield
    finally:
        del decoder.forward
        if own is not None:
            decoder.forward = own


def _static_cache(model: "PreTrainedModel", length: int) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=length)


def _reset(cache: Any) -> Any:
    cache.reset()
    return cache
