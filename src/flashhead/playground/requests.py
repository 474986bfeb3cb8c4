"""What a page may ask for, checked before the model sees it."""

import dataclasses
import json
from typing import Any

from flashhead.errors import FlashHeadError
from flashhead.options import Sampling


class RefusedError(FlashHeadError):
    """A request that is answered with one line.

    Args:
        status: of HTTP.
        message: the line.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Limits:
    """Args:
    prompt_chars: of a prompt, at most.
    new_tokens: of each side, at most.
    """

    prompt_chars: int = 4000
    new_tokens: int = 256

    @property
    def body_bytes(self) -> int:
        """Of a request: a character is at most 12 bytes of JSON."""
        return 12 * self.prompt_chars + 1024


@dataclasses.dataclass(frozen=True)
class Request:
    """Args:
    prompt: text to go on from, or a message to answer.
    new_tokens: of each side, at most.
    sampling: temperature and seed.
    raw: whether to leave the model's chat template out.
    """

    prompt: str
    new_tokens: int
    sampling: Sampling
    raw: bool


def parse(body: bytes, limits: Limits) -> Request:
    """A request from its JSON: `prompt`, and if wanted `max_new_tokens`, `temperature`, `seed` and
    `raw`. Unless given, 64 tokens or what is allowed, greedy.

    Raises:
        RefusedError: 400, or 413 for a prompt or a text that is too long.
    """
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, "wanted JSON") from error
    if not isinstance(given, dict):
        raise RefusedError(400, "wanted a JSON object")
    unknown = set(given) - {"prompt", "max_new_tokens", "temperature", "seed", "raw"}
    if unknown:
        raise RefusedError(400, f"unknown field {min(unknown)[:40]!r}")
    prompt, tokens = given.get("prompt"), given.get("max_new_tokens", min(64, limits.new_tokens))
    if not isinstance(prompt, str) or not prompt.strip():
        raise RefusedError(400, "prompt: wanted a text that is not empty")
    if len(prompt) > limits.prompt_chars:
        got = f"{len(prompt):,} characters"
        raise RefusedError(413, f"prompt: {got}, wanted at most {limits.prompt_chars:,}")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise RefusedError(400, "prompt: wanted Unicode text, it has half a surrogate pair")
    if not _is_integer(tokens) or tokens < 1:
        raise RefusedError(400, "max_new_tokens: wanted an integer, 1 or more")
    if tokens > limits.new_tokens:
        raise RefusedError(413, f"max_new_tokens: {tokens:,}, wanted at most {limits.new_tokens:,}")
    raw = given.get("raw", False)
    if not isinstance(raw, bool):
        raise RefusedError(400, "raw: wanted true or false")
    return Request(prompt, tokens, _sampling(given), raw)


def _sampling(given: dict[str, Any]) -> Sampling:
    temperature, seed = given.get("temperature", 0), given.get("seed", 0)
    if not (_is_integer(temperature) or isinstance(temperature, float)):
        raise RefusedError(400, "temperature: wanted a number")
    if not 0 <= temperature <= 100:
        raise RefusedError(400, "temperature: wanted 0 (greedy) to 100")
    if not _is_integer(seed) or not 0 <= seed < 2**53:
        raise RefusedError(400, "seed: wanted an integer, 0 to 2^53 - 1")
    return Sampling(temperature=float(temperature), seed=seed)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
