"""The requests put to the dense server and to FlashHead's, and how their answers are compared."""

import dataclasses
import inspect
from typing import Any

from flashhead.integrations.vllm.openai_answers import Answer, compare, read_answers

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
COUNTRY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "population": {"type": "integer", "minimum": 0, "maximum": 1000000000},
        "continent": {"enum": ["Africa", "America", "Asia", "Europe"]},
    },
    "required": ["name", "population", "continent"],
    "additionalProperties": False,
}
COLOURS = ["red", "green", "blue"]


@dataclasses.dataclass(frozen=True)
class Request:
    """Where it goes and what it says."""

    path: str
    body: dict[str, Any]


def complete(prompt: str, tokens: int = 48, **more: Any) -> Request:
    """A greedy completion."""
    return Request(
        COMPLETIONS,
        {"model": "model", "prompt": prompt, "max_tokens": tokens, "temperature": 0, **more},
    )


def chat(question: str, tokens: int = 48, **more: Any) -> Request:
    """A greedy answer of the assistant."""
    messages = [{"role": "user", "content": question}]
    return Request(
        CHAT,
        {"model": "model", "messages": messages, "max_tokens": tokens, "temperature": 0, **more},
    )


GREEDY = {
    "france": complete("The capital of France is", 64),
    "story": complete("Once upon a time, in a village by the sea,", 64),
    "code": complete("def fibonacci(n):\n", 64),
    "german": complete("Die wichtigste Erfindung des Menschen ist", 64),
    "numbers": complete("1, 1, 2, 3, 5, 8, 13,", 64),
    "one token": complete("Water boils at", 1),
    "chat": chat("Name three colours.", 64),
    "chat, system": Request(
        CHAT,
        {
            "model": "model",
            "messages": [
                {"role": "system", "content": "You answer in one short sentence."},
                {"role": "user", "content": "Why is the sky blue?"},
            ],
            "max_tokens": 48,
            "temperature": 0,
        },
    ),
    "stop": complete("Count: one, two, three,", 64, stop=[" eight", "\n"]),
    "stop kept": complete("The quick brown fox", 64, stop=["."], include_stop_str_in_output=True),
}
"""What is searched: the largest logit decides and nothing else is asked for."""

EDITED = {
    "frequency": complete("Once upon a time", frequency_penalty=1.5),
    "presence": complete("Once upon a time", presence_penalty=1.5),
    "repetition": complete("Once upon a time", repetition_penalty=1.3),
    "negative": complete("Once upon a time", presence_penalty=-1.0, frequency_penalty=-0.5),
    "bias": complete("The capital of France is", logit_bias={"7042": -100.0, "30": 3.0}),
    "allowed": complete("Yes or no?", 8, allowed_token_ids=[30, 198, 260, 284, 7042]),
    "bad words": complete("The capital of France is", bad_words=["Paris", "the"]),
    "min tokens": complete("Count: one, two, three,", 64, min_tokens=24, stop=["\n"]),
    "chat": chat("Name three colours.", frequency_penalty=1.0, presence_penalty=0.5),
}
"""What the dense product serves, as every logit counts."""

COUNTRY_FORMAT = {"type": "json_schema", "json_schema": {"name": "country", "schema": COUNTRY}}
STRUCTURED = {
    "json schema": chat("Describe Kenya as JSON.", 96, response_format=COUNTRY_FORMAT),
    "json schema, completion": complete("Kenya as JSON: ", 96, response_format=COUNTRY_FORMAT),
    "choice": complete("My favourite colour is", 8, structured_outputs={"choice": COLOURS}),
    "choice, chat": chat("Of which colour is grass?", 8, structured_outputs={"choice": COLOURS}),
    "regex": complete("A date: ", 16, structured_outputs={"regex": r"\d{4}-\d{2}-\d{2}"}),
}

LOGPROBS = {
    "completion": complete("The capital of France is", logprobs=5),
    "prompt": complete("The capital of France is", 8, logprobs=3, echo=True),
    "chat": chat("Name three colours.", logprobs=True, top_logprobs=5),
}
MALFORMED: dict[str, dict[str, Any]] = {
    "temperature is text": {"temperature": "hot"},
    "temperature below 0": {"temperature": -1},
    "max_tokens below 0": {"max_tokens": -1},
    "max_tokens beyond the model": {"max_tokens": 10**9},
    "top_p above 1": {"top_p": 2.0},
    "top_k": {"top_k": -5},
    "n is 0": {"n": 0},
    "logprobs beyond the limit": {"logprobs": 999},
    "prompt is null": {"prompt": None},
    "prompt is an object": {"prompt": {"a": 1}},
    "prompt is empty": {"prompt": ""},
    "prompt is too long": {"prompt": [5] * 5000},
    "no such token": {"prompt": [99_999_999]},
    "bias of no token": {"logit_bias": {"999999": 1}},
    "bias is no number": {"logit_bias": {"x": 1}},
    "stop is a number": {"stop": 5},
    "schema": {"structured_outputs": {"json": {"type": "nope"}}},
    "regex": {"structured_outputs": {"regex": "(["}},
    "no choice": {"structured_outputs": {"choice": []}},
}
"""What is wrong with a completion's body."""
NO_JSON = (b"", b"{", b"null", b"[]", b'"text"', b"\xff\xfe", b"{}")


def send(client: Any, request: Request, **more: Any) -> dict[str, Any]:
    """The response to a request of the OpenAI client."""
    return create(client, request, **more).to_dict()


def create(client: Any, request: Request, **more: Any) -> Any:
    """A response, or with `stream=True` its chunks; `extra_body` takes what OpenAI's API lacks."""
    api = client.chat.completions if request.path == CHAT else client.completions
    known = inspect.signature(api.create).parameters
    fields = {**request.body, **more}
    extra = {name: fields.pop(name) for name in list(fields) if name not in known}
    return api.create(**fields, extra_body=extra)


def text_of_chunk(chunk: Any) -> str:
    """What a chunk of a stream adds."""
    if not chunk.choices:
        return ""
    choice = chunk.choices[0]
    return (choice.delta.content if hasattr(choice, "delta") else choice.text) or ""


def require_equal(dense: list[Answer], response: dict[str, Any]) -> str | None:
    """Fail unless a greedy answer is the dense head's; the tie that explains a difference, or None.

    Args:
        dense: its answers, with log-probabilities.
        response: with tokens.
    """
    answer = only(response)
    difference = compare(dense, answer)
    if difference is None:
        return None
    assert difference.is_tie, f"{difference}\n{answer.text!r}, not {[one.text for one in dense]}"
    return str(difference)


def only(response: dict[str, Any]) -> Answer:
    """The one choice of a response."""
    (answer,) = read_answers(response)
    return answer
