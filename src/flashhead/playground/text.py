"""Tokens as text while they come, and the tokens that end it."""

from collections.abc import Callable
from typing import Any


class PiecewiseText:
    """Text of tokens as they come; what may be half a character waits for its rest."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode, self._tokens, self._shown = decode, list[int](), 0

    def piece(self, token: int, last: bool) -> str:
        """What this token adds."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        if text.endswith("\ufffd") and not last:
            return ""
        piece, self._shown = text[self._shown :], len(text)
        return piece


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens after which `generate` stops."""
    found = model.generation_config.eos_token_id
    found = tokenizer.eos_token_id if found is None else found
    return frozenset([found] if isinstance(found, int) else found or ())
