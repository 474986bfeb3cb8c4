"""An answer on the screen that the model, a text or Ctrl-C can end."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any, TextIO

from flashhead.cli.stream import Streamer


class Answer(Streamer):
    """Streams an answer; what follows `stop` is not shown, nor what may become `stop`.

    Args:
        tokenizer: of the model.
        out: where to print; None: nowhere.
        stop: text that ends the answer; None: only the model does.
    """

    def __init__(self, tokenizer: Any, out: TextIO | None = None, stop: str | None = None) -> None:
        super().__init__(tokenizer, out)
        self.interrupted = False
        self._stop = stop
        self._ended = False
        self._prompt_tokens: int | None = None

    @property
    def text(self) -> str:
        """The answer so far."""
        text = super().text
        if self._stop is not None:
            text, found, _ = text.partition(self._stop)
            if not (found or self._ended):
                text = text[: len(text) - _overlap(text, self._stop)]
        return text.lstrip()

    def put(self, ids: Any) -> None:
        """Take the prompt first, then each new token."""
        if self._prompt_tokens is None:
            self._prompt_tokens = ids.shape[-1]
        super().put(ids)

    def complete(self, ids: Any) -> bool:
        """Whether the model need not go on, as `generate` asks before it streams the last token.

        Args:
            ids: `int64[1, n]`, the prompt and all new tokens.
        """
        if self.interrupted or self._stop is None:
            return self.interrupted
        new = ids[0, self._prompt_tokens :].tolist()
        return self._stop in self._tokenizer.decode(new, skip_special_tokens=True)

    def end(self) -> None:
        """Print the rest; a second call does nothing."""
        if not self._ended:
            self._ended = True
            super().end()


@contextlib.contextmanager
def interruptible(answer: Answer) -> Iterator[None]:
    """Make Ctrl-C end the answer after its current token, and a second one at once."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        if answer.interrupted:
            raise KeyboardInterrupt
        answer.interrupted = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        signal.signal(signal.SIGINT, before)
    answer.end()


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that are a beginning of `stop`."""
    lengths = range(len(stop) - 1, 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
