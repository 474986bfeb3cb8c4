"""Two decodes of one prompt over the same model, a token of each in turn.

Only the head differs: the dense product as the model has it, or a certified search. The prompt is
read once; each side then has a KV cache of its own. The two take turns to be first, so whatever
else the machine does hits both. With a temperature both draw by the same noise
(`ops/noise`), so the texts part where the heads disagree and not by chance.
"""

import contextlib
import copy
import dataclasses
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flashhead.errors import FlashHeadError
from flashhead.integrations.transformers import logit_postprocess
from flashhead.nn.head import FlashHead
from flashhead.ops.noise.api import gumbel, gumbel_at
from flashhead.options import Sampling
from flashhead.playground.text import PiecewiseText, end_tokens

SIDES = ("dense", "flash")


@dataclasses.dataclass(frozen=True)
class Choice:
    """A token and what it cost.

    Args:
        token: its id.
        candidates: rows of the head scored exactly.
        certified: whether it is known to be what the dense float32 head gives.
        bytes_read: of head and index.
    """

    token: int
    candidates: int
    certified: bool
    bytes_read: int


Chooser = Callable[[Tensor, Sampling, int], Choice]


class _Caught(nn.Module):
    """Stands in for the head: keeps the last position's hidden state and computes no logits."""

    def __init__(self, head: FlashHead) -> None:
        super().__init__()
        self.head = head
        self.hidden: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The head's own."""
        return self.head.weight

    def forward(self, hidden: Tensor) -> Tensor:
        self.hidden = hidden[:, -1]
        return hidden.new_zeros(len(hidden), 1, 1)


class _Side:
    """A decode in progress."""

    def __init__(
        self, name: str, choose: Chooser, hidden: Tensor, cache: Any, text: PiecewiseText
    ) -> None:
        self.name, self.choose, self.hidden, self.cache = name, choose, hidden, cache
        self.text = text
        self.token: int | None = None
        self.ended = False


class SideBySide:
    """A model with a FlashHead and what decodes with it.

    Args:
        model: a causal LM whose output embedding is a FlashHead of codes.
        tokenizer: of the model.
        encode: tokenizer, prompt and whether to leave the chat template out, to `int64[1, n]` under
            "input_ids".

    Raises:
        FlashHeadError: another head.
    """

    def __init__(self, model: Any, tokenizer: Any, encode: Callable[[Any, str, bool], Any]) -> None:
        head = model.get_output_embeddings()
        if not isinstance(head, FlashHead) or not head.searches_tokens:
            kind = getattr(head, "kind", type(head).__name__)
            raise FlashHeadError(f"playground: the head is {kind}, wanted an index of codes")
        self.model, self.head = model, head
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        probe = torch.tensor([-1.0, 40.0])
        self.samples = torch.equal(logit_postprocess(model.config)(probe), probe)
        self.has_template = tokenizer.chat_template is not None
        self.ends = end_tokens(model, tokenizer)
        self._tokenizer, self._encode = tokenizer, encode
        self._tokenizing = threading.Lock()  # fast tokenizers refuse two threads at once
        self._choosers: dict[str, Chooser] = {"dense": self._dense, "flash": self._flash}

    @property
    def searches(self) -> bool:
        """Whether one row is searched; else the dense product was measured to be faster here."""
        return self.head.token_crossover_rows > 0

    def encode(self, prompt: str, raw: bool, new_tokens: int, temperature: float) -> Tensor:
        """Token ids of a prompt, `int64[1, n]`.

        Raises:
            FlashHeadError: no token, no room for the new ones in the model's context, or a
                temperature where the model changes its logits after the head.
        """
        if temperature > 0 and not self.samples:
            raise FlashHeadError("temperature: this model scales its logits; wanted 0 (greedy)")
        with self._tokenizing:
            ids: Tensor = self._encode(self._tokenizer, prompt, raw)["input_ids"]
        count = ids.shape[1]
        if count == 0:
            raise FlashHeadError("prompt: wanted at least one token")
        if self.context is not None and count + new_tokens > self.context:
            raise FlashHeadError(
                f"prompt: {count:,} tokens and {new_tokens:,} new ones are more than the model's "
                f"context of {self.context:,}"
            )
        return ids

    def events(
        self, ids: Tensor, new_tokens: int, sampling: Sampling
    ) -> Generator[dict[str, Any], None, None]:
        """Decode with both heads; closing this early stops it.

        Args:
            ids: `int64[1, n]`, the prompt.
            new_tokens: at most, of each side.
            sampling: temperature and seed.

        Yields:
            JSON-able: "start" when the prompt is read, one "token" a token, and once "parts" where
            the two differ first: what both tokens score in float32 and in the dense head's dtype.
        """
        with self._catching() as caught:
            began = time.perf_counter()
            hidden, cache = self._read(caught, ids, None)
            yield {
                "event": "start",
                "prompt_tokens": ids.shape[1],
                "seconds": time.perf_counter() - began,
            }
            caches = (cache, copy.deepcopy(cache))
            sides = [
                _Side(name, self._choosers[name], hidden, own, PiecewiseText(self._decode))
                for name, own in zip(SIDES, caches, strict=True)
            ]
            same = True
            for step in range(new_tokens):
                for side in sides if step % 2 == 0 else reversed(sides):
                    if not side.ended:
                        yield self._step(caught, side, sampling, step, step + 1 == new_tokens)
                if same and sides[0].token != sides[1].token:
                    same = False
                    yield self._parting(sides, sampling, step)

    def _step(
        self, caught: _Caught, side: _Side, sampling: Sampling, step: int, last: bool
    ) -> dict[str, Any]:
        """One token. The first has no time: its hidden state came with the prompt."""
        began = time.perf_counter()
        if side.token is not None:
            token = torch.tensor([[side.token]])
            side.hidden, side.cache = self._read(caught, token, side.cache)
        choice = side.choose(side.hidden, sampling, step)
        seconds = None if side.token is None else time.perf_counter() - began
        side.token, side.ended = choice.token, choice.token in self.ends
        return {
            "event": "token",
            "side": side.name,
            "step": step,
            "text": side.text.piece(choice.token, last or side.ended),
            "ends": side.ended,
            "seconds": seconds,
            **dataclasses.asdict(choice),
        }

    @torch.no_grad()
    def _parting(self, sides: list[_Side], sampling: Sampling, step: int) -> dict[str, Any]:
        """Scores of the two tokens where the sides differ; up to there they had the same text."""
        hidden, rows = sides[0].hidden, torch.tensor([side.token for side in sides])
        exact = self.head.exact_logits(hidden[0], rows)
        own = self.head.dense(hidden)[0].float().cpu()[rows]
        if sampling.temperature > 0:
            impl = self.head.noise_impl
            noise = sampling.temperature * gumbel_at(sampling.seed, step, rows, impl=impl)
            exact, own = exact + noise, own + noise
        return {
            "event": "parts",
            "step": step,
            "float32": dict(zip(SIDES, exact.tolist(), strict=True)),
            "dense_dtype": dict(zip(SIDES, own.tolist(), strict=True)),
            "dtype": str(self.head.weight.dtype).removeprefix("torch."),
        }

    @torch.no_grad()
    def _read(self, caught: _Caught, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Run the body: the last position's hidden state, `[1, d]`, and the cache."""
        output = self.model(
            input_ids=ids.to(self.head.weight.device), past_key_values=cache, use_cache=True
        )
        assert caught.hidden is not None
        return caught.hidden, output.past_key_values

    @torch.no_grad()
    def _dense(self, hidden: Tensor, sampling: Sampling, step: int) -> Choice:
        """The head that was replaced, in the weight's dtype."""
        logits, size = self.head.dense(hidden).float(), self.head.out_features
        if sampling.temperature > 0:
            steps = torch.tensor([step])
            noise = gumbel(sampling.seed, steps, size, impl=self.head.noise_impl)
            logits += sampling.temperature * noise.to(logits.device)
        return Choice(int(logits.argmax(1)), size, False, self.head.dense_bytes)

    def _flash(self, hidden: Tensor, sampling: Sampling, step: int) -> Choice:
        """FlashHead as it runs elsewhere: the search, or the dense product if that is faster."""
        if not self.searches:
            return self._dense(hidden, sampling, step)
        found = self.head.next_token(hidden, sampling, steps=torch.tensor([step]))
        return Choice(
            int(found.tokens),
            int(found.candidates),
            bool(found.certified),
            int(found.bytes_read),
        )

    def _decode(self, tokens: list[int]) -> str:
        with self._tokenizing:
            text = self._tokenizer.decode(
                tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        return str(text)

    @contextlib.contextmanager
    def _catching(self) -> Iterator[_Caught]:
        caught = _Caught(self.head)
        self.model.set_output_embeddings(caught)
        try:
            yield caught
        finally:
            self.model.set_output_embeddings(self.head)
