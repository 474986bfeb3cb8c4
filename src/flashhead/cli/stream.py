"""Text on the screen as tokens arrive; the duck type that `generate(streamer=...)` expects."""

import time
from typing import Any, TextIO


class Streamer:
    """Prints every token at once, and keeps the tokens and the time they took.

    Args:
        tokenizer: of the model.
        out: where to print; None: nowhere.
    """

    def __init__(self, tokenizer: Any, out: TextIO | None = None) -> None:
        self.tokens: list[int] = []
        self.seconds = 0.0
        self._tokenizer = tokenizer
        self._out = out
        self._shown = 0
        self._prompt_seen = False
        self._started = time.perf_counter()

    @property
    def text(self) -> str:
        """The text so far, without special tokens."""
        return str(self._tokenizer.decode(self.tokens, skip_special_tokens=True))

    @property
    def tok_per_sec(self) -> float:
        """New tokens over the time of the whole call, the prompt included."""
        return len(self.tokens) / self.seconds

    def put(self, ids: Any) -> None:
        """Take the prompt first, then each new token."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.tokens.extend(ids.reshape(-1).tolist())
        self.seconds = time.perf_counter() - self._started
        self._print(final=False)

    def end(self) -> None:
        """Print what waited for the rest of a character."""
        self._print(final=True)

    def _print(self, final: bool) -> None:
        if self._out is None:
            return
        text = self.text
        if final or not text.endswith("\ufffd"):  # a character may take several tokens
            print(text[self._shown :], end="\n" if final else "", file=self._out, flush=True)
            self._shown = len(text)
