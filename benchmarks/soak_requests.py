"""Random requests of a soak test: what is asked, and what is wrong with the answer.

A request is drawn by its kind:

- greedy: from a fixed set, whole or streamed; its tokens must be the dense head's.
- sampled: any sampling parameters, one to three choices.
- structured: a JSON schema, a choice or a regular expression, which the text must follow.
- cancelled: the client leaves, before or amid the stream.
- malformed: a body that must be refused with its status.
"""

import dataclasses
import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from flashhead.integrations.vllm.openai_answers import read_answers

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
KINDS = {"greedy": 35, "sampled": 30, "structured": 10, "cancelled": 15, "malformed": 10}
"""Kinds and how often of a hundred."""
MAX_TOKENS = 128
PROMPT_TOKENS = 600
GREEDY_COUNT = 30
SEED = 5
"""Of the fixed set."""
QUESTIONS = (
    "Name three colours.",
    "Why is the sky blue?",
    "Write a short poem about the sea.",
    "What is 17 times 3?",
    "Wie heißt die Hauptstadt von Frankreich?",
    "Give me a recipe for pancakes.",
)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["cat", "dog", "bird"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
CHOICES = ["yes", "no", "perhaps"]
DATE = r"\d{4}-\d{2}-\d{2}"
NO_JSON = (b"", b"{", b"null", b"[1, 2]", b'"text"', b"\xff\xfe\x00", b'{"prompt": "x",}')
MALFORMED: tuple[dict[str, Any], ...] = (
    {"temperature": "hot"},
    {"temperature": -1},
    {"max_tokens": -5},
    {"max_tokens": "many"},
    {"max_tokens": 10**9},
    {"top_p": 2.0},
    {"top_k": -5},
    {"min_p": 3},
    {"n": 0},
    {"n": 10**6},
    {"seed": 2**70},
    {"stop": 5},
    {"logprobs": 999},
    {"presence_penalty": 9},
    {"logit_bias": {"99999999": 1}},
    {"logit_bias": {"x": 1}},
    {"allowed_token_ids": []},
    {"min_tokens": 50, "max_tokens": 3},
    {"prompt": None},
    {"prompt": {"a": 1}},
    {"prompt": ""},
    {"prompt": [-1]},
    {"prompt": [99_999_999]},
    {"prompt": [5] * 20_000},
    {"stream": "maybe"},
    {"structured_outputs": {"json": {"type": "nope"}}},
    {"structured_outputs": {"regex": "(["}},
    {"structured_outputs": {"choice": []}},
)


@dataclasses.dataclass(frozen=True)
class Request:
    """One request and what must come of it.

    Args:
        kind: of `KINDS`.
        path: where it goes.
        body: fields, or bytes that are no JSON object.
        status: wanted.
        number: of a greedy one in the fixed set.
        leave_after: of a cancelled one: chunks before the client goes, or -1: it does not wait for
            any.
    """

    kind: str
    path: str
    body: dict[str, Any] | bytes
    status: int = 200
    number: int = -1
    leave_after: int = 0


def fixed_set(tokens: Sequence[int]) -> list[Request]:
    """The greedy requests, the same in every soak of a model.

    Args:
        tokens: of a text, in the model's vocabulary.
    """
    rng = random.Random(SEED)
    found = []
    for number in range(GREEDY_COUNT):
        body: dict[str, Any] = {"temperature": 0, "max_tokens": rng.choice((1, 8, 24, 48, 96))}
        path = CHAT if number < len(QUESTIONS) else COMPLETIONS
        if path == CHAT:
            body["messages"] = [{"role": "user", "content": QUESTIONS[number]}]
        else:
            body["prompt"] = _cut(rng, tokens)
        if number % 5 == 4:
            body["stop"] = ["\n", "."]
        found.append(Request("greedy", path, body, number=number))
    return found


def draw(rng: random.Random, fixed: Sequence[Request], tokens: Sequence[int]) -> Request:
    """A random request."""
    kind = rng.choices(list(KINDS), weights=list(KINDS.values()))[0]
    if kind == "greedy":
        request = rng.choice(fixed)
        assert isinstance(request.body, dict)
        return dataclasses.replace(request, body={**request.body, "stream": rng.random() < 0.3})
    return {
        "sampled": _sampled,
        "structured": _structured,
        "cancelled": _cancelled,
        "malformed": _malformed,
    }[kind](rng, tokens)


def _cut(rng: random.Random, tokens: Sequence[int]) -> list[int]:
    """A piece of the text, short ones more often."""
    length = round(PROMPT_TOKENS ** rng.random())
    start = rng.randrange(max(1, len(tokens) - length))
    return list(tokens[start : start + length])


def _prompted(rng: random.Random, tokens: Sequence[int]) -> tuple[str, dict[str, Any]]:
    if rng.random() < 0.3:
        return CHAT, {"messages": [{"role": "user", "content": rng.choice(QUESTIONS)}]}
    return COMPLETIONS, {"prompt": _cut(rng, tokens)}


def _sampled(rng: random.Random, tokens: Sequence[int]) -> Request:
    path, body = _prompted(rng, tokens)
    body |= {"max_tokens": rng.randint(1, MAX_TOKENS), "temperature": rng.uniform(0.1, 1.8)}
    options: dict[str, Callable[[], Any]] = {
        "top_p": lambda: rng.uniform(0.05, 1.0),
        "top_k": lambda: rng.choice((1, 2, 20, 200)),
        "min_p": lambda: rng.uniform(0.0, 0.3),
        "seed": lambda: rng.randrange(2**31),
        "n": lambda: rng.randint(1, 3),
        "stop": lambda: rng.choice((["\n"], [".", ","], [" the"])),
        "presence_penalty": lambda: rng.uniform(-2, 2),
        "frequency_penalty": lambda: rng.uniform(-2, 2),
        "repetition_penalty": lambda: rng.uniform(0.8, 1.5),
        "logit_bias": lambda: {str(rng.choice(tokens)): rng.uniform(-100, 10)},
        "ignore_eos": lambda: True,
    }
    body |= {name: value() for name, value in options.items() if rng.random() < 0.25}
    if rng.random() < 0.25:
        many = rng.randint(0, 5)
        body |= {"logprobs": True, "top_logprobs": many} if path == CHAT else {"logprobs": many}
    return Request("sampled", path, body)


def _structured(rng: random.Random, _tokens: Sequence[int]) -> Request:
    # no piece of the text: where a prompt ends within a character, vLLM repeats it in the answer
    question = rng.choice(QUESTIONS)
    path, body = rng.choice(
        (
            (CHAT, {"messages": [{"role": "user", "content": question}]}),
            (COMPLETIONS, {"prompt": f"{question}\n"}),
        )
    )
    wanted = rng.choice(({"json": SCHEMA}, {"choice": CHOICES}, {"regex": DATE}))
    return Request(
        "structured",
        path,
        {
            **body,
            "max_tokens": MAX_TOKENS,
            "temperature": rng.choice((0, 0.7, 1.2)),
            "structured_outputs": wanted,
        },
    )


def _cancelled(rng: random.Random, tokens: Sequence[int]) -> Request:
    request = _sampled(rng, tokens)
    assert isinstance(request.body, dict)
    body = {**request.body, "max_tokens": MAX_TOKENS, "stream": True, "ignore_eos": True}
    return Request("cancelled", request.path, body, leave_after=rng.choice((-1, 1, 5, 20)))


def _malformed(rng: random.Random, tokens: Sequence[int]) -> Request:
    body = {"model": "model", "prompt": _cut(rng, tokens), "max_tokens": 4}
    which = rng.random()
    if which < 0.15:
        return Request("malformed", COMPLETIONS, {**body, "model": "another"}, 404)
    if which < 0.35:
        return Request("malformed", rng.choice((COMPLETIONS, CHAT)), rng.choice(NO_JSON), 400)
    return Request("malformed", COMPLETIONS, {**body, **rng.choice(MALFORMED)}, 400)


def problem_of(request: Request, response: dict[str, Any]) -> str | None:
    """What is wrong with the whole response to a sampled or structured request, or None."""
    assert isinstance(request.body, dict)
    body, answers = request.body, read_answers(response)
    if len(answers) != body.get("n", 1):
        return f"{len(answers)} choices, wanted {body.get('n', 1)}"
    used = response["usage"]["completion_tokens"]
    if used > len(answers) * body["max_tokens"]:
        return f"{used} tokens, wanted up to {len(answers) * body['max_tokens']}"
    for answer in answers:
        if answer.finish not in ("stop", "length"):
            return f"finish_reason {answer.finish!r}"
        if any(not value <= 0 for value in answer.logprobs):  # NaN as well
            return "a log-probability above 0 or not a number"
        ended = request.kind == "structured" and answer.finish == "stop"  # JSON may be cut off
        if ended and not _follows(body["structured_outputs"], answer.text):
            return f"does not follow {body['structured_outputs']}: {answer.text!r}"
    return None


def _follows(wanted: dict[str, Any], text: str) -> bool:
    if "choice" in wanted:
        return text in wanted["choice"]
    if "regex" in wanted:
        return re.fullmatch(wanted["regex"], text) is not None
    try:
        document = json.loads(text)
    except ValueError:
        return False
    return list(document) == SCHEMA["required"] and document["kind"] in ("cat", "dog", "bird")
