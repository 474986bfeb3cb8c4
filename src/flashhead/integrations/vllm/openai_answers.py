"""Answers of a server that speaks OpenAI's protocol, and whether two of them agree.

A dense bf16 head ties: its logits have steps of 1/8 between 16 and 32, and where two tokens round
to the same one it takes either. FlashHead's winner is decided in float32. The texts then differ
from that token on, though neither head is wrong. So the first difference is explained, or is an
error, by the dense head's own log-probabilities there: if both tokens lie within one step.

A bf16 body rounds a row differently in batches of other sizes, so the dense head has more than one
answer to a request under load. Each is as right as the other: `compare` takes all that were seen.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

TIE_NATS = 0.13
"""One step of bf16 logits between 16 and 32, and a bit."""
TOPS = 5
WITH_TOKENS: Mapping[str, Any] = {"return_token_ids": True, "return_tokens_as_token_ids": True}
"""Fields of a request whose answer tells its tokens."""
_PREFIX = "token_id:"


@dataclasses.dataclass(frozen=True)
class Answer:
    """One choice of a response.

    Args:
        text: generated.
        tokens: their ids, () unless the request had `WITH_TOKENS`.
        finish: why it ended.
        logprobs: of the tokens, () unless asked for.
        tops: token id to log-probability, position by position, () unless asked for.
    """

    text: str
    tokens: tuple[int, ...] = ()
    finish: str | None = None
    logprobs: tuple[float, ...] = ()
    tops: tuple[dict[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Difference:
    """The first token at which two greedy answers part.

    Args:
        position: of the token.
        dense: the dense head's, None: its answer ends before.
        other: the other head's, None: its answer ends before; both None: equal tokens, and another
            text or another reason to end.
        gap_nats: log-probability of `dense` less that of `other`, by the dense head; None: `other`
            is not among its best.
    """

    position: int
    dense: int | None
    other: int | None
    gap_nats: float | None

    @property
    def is_tie(self) -> bool:
        """Whether rounding to bf16 explains it."""
        return self.gap_nats is not None and abs(self.gap_nats) <= TIE_NATS


def ask_for_tokens(path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The request as the dense server gets it: with tokens and the best ones beside them."""
    chat = path.endswith("chat/completions")
    tops = {"logprobs": True, "top_logprobs": TOPS} if chat else {"logprobs": TOPS}
    return {**tops, **WITH_TOKENS, **body}


def read_answers(response: Mapping[str, Any]) -> list[Answer]:
    """The choices of a response of /v1/completions or /v1/chat/completions."""
    return [_read_choice(choice) for choice in response["choices"]]


def _read_choice(choice: Mapping[str, Any]) -> Answer:
    found = choice.get("logprobs") or {}
    if "message" in choice:
        text = choice["message"]["content"] or ""
        content = found.get("content") or []
        logprobs = [entry["logprob"] for entry in content]
        tops = [
            {top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in content
        ]
    else:
        text, logprobs = choice["text"], found.get("token_logprobs") or []
        tops = found.get("top_logprobs") or []
    return Answer(
        text,
        tuple(choice.get("token_ids") or ()),
        choice["finish_reason"],
        tuple(logprobs),
        tuple(_by_id(top) for top in tops) if _names_ids(tops) else (),
    )


def _names_ids(tops: list[dict[str, float]]) -> bool:
    return all(name.startswith(_PREFIX) for top in tops for name in top or {})


def _by_id(top: dict[str, float] | None) -> dict[int, float]:
    return {int(name.removeprefix(_PREFIX)): value for name, value in (top or {}).items()}


def compare(dense: Sequence[Answer], other: Answer) -> Difference | None:
    """Where a greedy answer leaves the dense head's; None: it is one of them.

    Of several dense answers the one counts with which it agrees longest.

    Args:
        dense: answers to the same request, with tokens and `tops`.
        other: with tokens.
    """
    found = []
    for answer in dense:
        difference = _first_difference(answer, other)
        if difference is None:
            return None
        found.append(difference)
    return min(found, key=lambda one: (-one.position, not one.is_tie))


def _first_difference(dense: Answer, other: Answer) -> Difference | None:
    for position in range(max(len(dense.tokens), len(other.tokens))):
        ours, theirs = _at(dense.tokens, position), _at(other.tokens, position)
        if ours != theirs:
            tops = dense.tops[position] if position < len(dense.tops) else {}
            gap = None
            if ours in tops and theirs in tops:
                gap = tops[ours] - tops[theirs]
            return Difference(position, ours, theirs, gap)
    if (dense.text, dense.finish) != (other.text, other.finish):
        return Difference(len(other.tokens), None, None, None)
    return None


def _at(tokens: tuple[int, ...], position: int) -> int | None:
    return tokens[position] if position < len(tokens) else None
