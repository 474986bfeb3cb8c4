"""The sampling features that a served head must keep: which requests, and what the head may do.

A feature is a batch of requests. They are plain values, so that the process that runs them (which
has vLLM) and the one that judges them need share nothing else. Sampling parameters are named as
vLLM names them; where it wants token ids, which differ from model to model, they are given as text:
`stop_tokens`, `allowed_tokens` and `biased_tokens` (text: bias).

Token counts do not depend on what is generated (`ignore_eos`) unless ending is the feature, so that
both heads see the same batches, and what differs is the head's doing.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from flashhead.errors import FlashHeadError

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "The three laws of thermodynamics say that",
    "To bake a loaf of bread, first",
    "In 1969, Neil Armstrong",
    "SELECT name, count(*) FROM",
    "Photosynthesis is the process by which",
    "Dear Sir or Madam,\n\nI am writing to",
    "The quick brown fox",
    "La ville de Paris est",
    "Die wichtigste Erfindung des Menschen ist",
    "1, 1, 2, 3, 5, 8, 13,",
    "A good password should",
    "The mitochondria of a cell",
    "import numpy as np\n\nx = np.",
    "Shakespeare's most famous play",
    "Water boils at",
    "The stock market fell today because",
    "Question: What is 17 times 3?\nAnswer:",
)
DRAWN = ("Once upon a time", "I went to the")
"""Prompts of the distribution: few tokens, for all draws read them."""
DRAWS = 2000
"""Of each of these prompts."""
FEW, SOME = 4, 8
"""Prompts of most features; dense rows are the same product twice and need few."""
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
GRAMMAR = 'root ::= "SELECT " column " FROM " table\ncolumn ::= "name" | "age"\ntable ::= "people"'

HeadUse = Literal["search", "dense", "mixed"]
Check = Literal["", "repeats", "caches", "chunks", "distribution"]


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and its sampling parameters."""

    prompt: str
    params: dict[str, Any]

    @property
    def is_greedy(self) -> bool:
        """Whether the largest logit decides."""
        return bool(self.params["temperature"] == 0)


@dataclasses.dataclass(frozen=True)
class Feature:
    """A batch of requests.

    Args:
        name: of the row in the table.
        head: what FlashHead does with its rows: "search" (all), "dense" (all), "mixed".
        requests: of one batch.
        rounds: how often the batch is run.
        check: more than equal answers: "repeats" (rounds are equal), "caches" (a later round reads
            the prefix cache), "chunks" (prompts exceed the tokens of a step), "distribution"
            (instead of equal answers: counts of first tokens are of one distribution).
    """

    name: str
    head: HeadUse
    requests: tuple[Request, ...]
    rounds: int = 1
    check: Check = ""


def all_features(tokens: int = 64) -> tuple[Feature, ...]:
    """Every feature, in the order of the table: what is searched first.

    Args:
        tokens: of an answer, 8 or more; where rows are dense, half of them.
    """
    half = tokens // 2
    return (*_searched(tokens), *_prefilled(half), _drawn(), *_dense(half), _mixed(half))


def choose(features: Sequence[Feature], names: Sequence[str]) -> tuple[Feature, ...]:
    """Features by their names.

    Raises:
        FlashHeadError: there is none of a name.
    """
    known = {feature.name: feature for feature in features}
    for name in names:
        if name not in known:
            raise FlashHeadError(f"feature {name!r}: wanted one of {', '.join(known)}")
    return tuple(known[name] for name in dict.fromkeys(names))


def _greedy(prompts: Sequence[str], tokens: int, **params: Any) -> tuple[Request, ...]:
    shared = {"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True}
    return tuple(Request(prompt, {**shared, **params}) for prompt in prompts)


def _seeded(prompts: Sequence[str], tokens: int, **params: Any) -> tuple[Request, ...]:
    """Every request has a seed of its own."""
    shared = {"temperature": 1.0, "max_tokens": tokens, "ignore_eos": True}
    return tuple(
        Request(prompt, {**shared, "seed": 100 + number, **params})
        for number, prompt in enumerate(prompts)
    )


def _searched(tokens: int) -> tuple[Feature, ...]:
    some = PROMPTS[:SOME]
    stops = _greedy(some, tokens, ignore_eos=False, stop=[",", "\n"])
    stop_tokens = _greedy(some, tokens, ignore_eos=False, stop_tokens=[".", ","])
    three = _seeded(PROMPTS[:FEW], tokens // 2, temperature=0.8, n=3)
    return (
        Feature("greedy", "search", _greedy(PROMPTS, tokens)),
        Feature("temperature-0.7", "search", _seeded(some, tokens, temperature=0.7)),
        Feature("temperature-1", "search", _seeded(some, tokens)),
        Feature("top-p", "search", _seeded(some, tokens, top_p=0.9)),
        Feature("top-k", "search", _seeded(some, tokens, top_k=20)),
        Feature("min-p", "search", _seeded(some, tokens, min_p=0.05)),
        Feature("n=3", "search", three),
        Feature("seeds", "search", _seeded(some, tokens // 2), rounds=2, check="repeats"),
        Feature("stop-string", "search", stops),
        Feature("stop-token", "search", stop_tokens),
    )


def _dense(tokens: int) -> tuple[Feature, ...]:
    few = PROMPTS[:FEW]

    def greedy(name: str, **params: Any) -> Feature:
        return Feature(name, "dense", _greedy(few, tokens, **params))

    def structured(name: str, prompt: str, **wanted: Any) -> Feature:
        prompts = (prompt, *few[1:])
        shared = {"ignore_eos": False, "structured_outputs": wanted}
        return Feature(name, "dense", _greedy(prompts, tokens, **shared))

    stops = {"ignore_eos": False, "stop_tokens": [".", ","]}
    return (
        greedy("repetition-penalty", repetition_penalty=1.2),
        greedy("frequency-penalty", frequency_penalty=0.7),
        greedy("presence-penalty", presence_penalty=0.7),
        greedy("logprobs", logprobs=5),
        Feature("sampled-logprobs", "dense", _seeded(few, tokens, temperature=0.7, logprobs=5)),
        greedy("prompt-logprobs", prompt_logprobs=3),
        greedy("logit-bias", biased_tokens={" the": 4.0, ".": -4.0}),
        greedy("allowed-tokens", allowed_tokens=[" a", " the", " of", " in", ",", "."]),
        greedy("bad-words", bad_words=["the", "is"]),
        greedy("min-tokens", min_tokens=tokens // 2, **stops),
        structured("choice", "The sky is blue. True or false?\nAnswer: ", choice=["true", "false"]),
        structured("regex", "Mail to the office: ", regex=r"[a-z]{2,8}@[a-z]{2,8}\.(com|org)"),
        structured("json", "A person as JSON: ", json=SCHEMA),
        structured("grammar", "All names, in SQL: ", grammar=GRAMMAR),
    )


def _prefilled(tokens: int) -> tuple[Feature, ...]:
    """How long prompts get into a batch."""
    long = tuple("\n".join((*PROMPTS[n:], *PROMPTS[:n])) for n in range(FEW))
    cached = _greedy(long[:1], tokens)
    return (
        Feature("prefix-caching", "search", cached, rounds=2, check="caches"),
        Feature("chunked-prefill", "search", _greedy(long, tokens), check="chunks"),
    )


def _drawn() -> Feature:
    """Draws without seeds: the engine's own noise."""
    params = {"temperature": 1.0, "max_tokens": 1, "ignore_eos": True, "n": DRAWS // 4}
    requests = tuple(Request(prompt, params) for prompt in DRAWN for _ in range(4))
    return Feature("distribution", "search", requests, check="distribution")


def _mixed(tokens: int) -> Feature:
    """Rows of all kinds in one batch."""
    person = ("A person as JSON: ",)
    requests = (
        *_greedy(PROMPTS[:FEW], tokens),
        *_seeded(PROMPTS[FEW:SOME], tokens),
        *_greedy(PROMPTS[SOME : SOME + 2], tokens, logprobs=5),
        *_greedy(person, tokens, structured_outputs={"json": SCHEMA}),
    )
    return Feature("mixed-batch", "mixed", requests)
