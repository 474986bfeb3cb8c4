"""The model interface of lm-evaluation-harness over a body and a head.

Each request is answered once and kept (`answers.py`). Requests of a task are sorted and batched by
how they begin (`rows.py`). Log-likelihoods of one-token continuations of the same text, such as the
letters of a multiple choice, come from one position.

Two heads on one body (the same weights in the same dtype) share its passes: while one model
answers, its companion's head answers from the same hidden states. A generation that the companion
would continue otherwise is left to the companion's own run.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from tqdm.auto import tqdm

from flashhead.evaluate.suite.answers import Answers, key_of
from flashhead.evaluate.suite.heads import Head, token_logprobs
from flashhead.evaluate.suite.rows import Body, batches, generate, groups

TAIL_TOKENS = 24
"""New tokens in which a string that ends an answer is looked for."""


class HarnessModel(TemplateLM):
    """A body with a head, as the harness sees it.

    Args:
        body: the model without its head.
        head: what answers.
        tokenizer: of the model.
        rows_at_once: rows of a batch, for rows of so many tokens that share so many first ones.
        ends: tokens that end a generation.
        progress: a bar with the time left, on stderr.

    `asked` holds the keys of the last requests, in order; `companion` has the same body.
    """

    def __init__(
        self,
        body: Body,
        head: Head,
        tokenizer: Any,
        rows_at_once: Callable[[int, int], int],
        ends: frozenset[int],
        progress: bool = True,
    ) -> None:
        super().__init__()
        self.body, self.head, self.tokenizer = body, head, tokenizer
        self.rows_at_once, self.ends, self.progress = rows_at_once, ends, progress
        self.answers: Answers | None = None
        self.name = ""
        self.asked: list[str] = []
        self.companion: HarnessModel | None = None
        self.batch_sizes: set[int] = set()

    @property
    def eot_token_id(self) -> int:
        """Token that stands before an empty context."""
        token = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if token is None else token)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids of a text, as the tokenizer begins a text unless it is told otherwise."""
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, verbose=False, **special)["input_ids"])

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """No task of ours asks for it."""
        raise NotImplementedError("log-likelihoods of whole texts: ask for windows of them")

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        asked = [(list(context), list(wanted)) for _, context, wanted in requests]
        keys = self.asked = [key_of("loglikelihood", *pair) for pair in asked]
        assert self.answers is not None
        known = self.answers.known
        # continuations by the row that is read: the letters of a question are one row
        by_row: dict[tuple[int, ...], dict[str, list[int]]] = {}
        for (context, wanted), key in zip(asked, keys, strict=True):
            if key not in known:
                row = tuple([*context, *wanted][:-1])
                by_row.setdefault(row, {})[key] = wanted
        rows = [list(row) for row in by_row]
        wanted_of = list(by_row.values())

        def answer(members: list[int], prefix: Any) -> None:
            keep = max(len(w) for i in members for w in wanted_of[i].values())
            hidden, _ = self.body.prefill([rows[i] for i in members], prefix, keep)
            for states, i in zip(hidden, members, strict=True):
                self._keep_loglikelihoods(wanted_of[i], states)

        self._in_batches(rows, answer, lambda i: max(map(len, wanted_of[i].values())))
        return [(known[key]["logprob"], known[key]["greedy"]) for key in keys]

    def _keep_loglikelihoods(self, wanted_of: dict[str, list[int]], states: Any) -> None:
        """Answer for continuations by key; they end where the hidden states `[n, d]` end."""
        by_length: dict[int, list[str]] = {}
        for key, wanted in wanted_of.items():
            by_length.setdefault(len(wanted), []).append(key)
        for model in (self, self.companion):
            for length, keys in by_length.items():
                if model is None or all(model.known(key) for key in keys):
                    continue
                tokens = torch.tensor([wanted_of[key] for key in keys])
                found = token_logprobs(model.head, states[-length:], tokens)
                for i, key in enumerate(keys):
                    answer = {
                        "logprob": float(found.values[i]),
                        "complete_logprob": float(found.complete[i]),
                        "greedy": bool(found.greedy[i]),
                        "tokens": length,
                    }
                    model.keep(key, answer)

    def known(self, key: str) -> bool:
        """Whether a request was answered."""
        assert self.answers is not None
        return key in self.answers.known

    def keep(self, key: str, answer: dict[str, Any]) -> None:
        """Keep an answer."""
        assert self.answers is not None
        self.answers.add(key, answer)

    def generate_until(self, requests: Any, **_: Any) -> list[str]:
        """Greedy generations up to a string that ends them, an end token or `max_gen_toks`."""
        rows = [self.tok_encode(request.args[0]) for request in requests]
        options = [request.args[1] for request in requests]
        keys = self.asked = [
            key_of("generate", row, option["until"], option["max_gen_toks"])
            for row, option in zip(rows, options, strict=True)
        ]
        assert self.answers is not None
        known = self.answers.known
        first: dict[str, int] = {}
        for i, key in enumerate(keys):
            if key not in known:
                first.setdefault(key, i)
        missing = list(first.values())

        def answer(members: list[int], prefix: Any) -> None:
            places = [missing[i] for i in members]
            asked = [keys[i] for i in places]
            self._generate([rows[i] for i in places], asked, options[places[0]], prefix)

        self._in_batches([rows[i] for i in missing], answer, lambda _: 1)
        return [known[key]["text"] for key in keys]

    def _generate(
        self, rows: list[list[int]], keys: list[str], option: dict[str, Any], prefix: Any
    ) -> None:
        """Generate and keep the answers to rows that end by the same rules."""
        until: list[str] = option["until"]
        own = _Tally(len(rows))
        other = _Tally(0)
        if self.companion is not None:
            other = _Tally(len(rows), [self.companion.known(key) for key in keys])
        alive = list(range(len(rows)))

        def choose(hidden: Any) -> list[int]:
            found = self.head.choose(hidden)
            own.add(alive, found)
            follows = [i for i, place in enumerate(alive) if place in other.follows]
            if follows and self.companion is not None:
                beside = self.companion.head.choose(hidden[follows])
                other.add([alive[i] for i in follows], beside, [found[i][0] for i in follows])
            return [token for token, _, _ in found]

        def ended(place: int, new: list[int]) -> bool:
            tail = self.tokenizer.decode(new[-TAIL_TOKENS:], skip_special_tokens=True)
            over = new[-1] in self.ends or any(stop in tail for stop in until)
            if over:
                alive.remove(place)
            return over

        new = generate(self.body, rows, choose, ended, option["max_gen_toks"], prefix)
        for i, tokens in enumerate(new):
            answer = {"tokens": tokens, "text": self._text(tokens, until)}
            self.keep(keys[i], answer | own.counts(i))
            if self.companion is not None and i in other.follows:
                self.companion.keep(keys[i], answer | other.counts(i))

    def _text(self, tokens: list[int], until: list[str]) -> str:
        text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        for stop in until:
            text = text.split(stop)[0]
        return text

    def _in_batches(
        self,
        rows: list[list[int]],
        answer: Callable[[list[int], Any], None],
        least_own: Callable[[int], int],
    ) -> None:
        """Answer rows batch by batch.

        Args:
            rows: token ids.
            answer: takes places in `rows` and what their rows begin with.
            least_own: positions at the end of a row that must not be part of a beginning.
        """
        bar = tqdm(
            total=len(rows),
            desc=self.name,
            unit="row",
            disable=not (self.progress and rows),
            file=sys.__stderr__,
        )
        with bar:
            for group in groups(rows, self.body.sharing):
                shared = min([group.shared, *(len(rows[i]) - least_own(i) for i in group.members)])
                shared = max(0, shared)
                prefix = self.body.prefix(rows[group.members[0]][:shared])
                longest = len(rows[group.members[-1]])
                at_once = self.rows_at_once(longest, shared)
                self.batch_sizes.add(at_once)
                for members in batches(group, at_once):
                    answer(members, prefix)
                    bar.update(len(members))


class _Tally:
    """What a head has counted for each row, and which rows it still agrees about.

    Args:
        rows: how many.
        done: rows that need no counting; None: none.
    """

    def __init__(self, rows: int, done: list[bool] | None = None) -> None:
        self.certified, self.candidates = [0] * rows, [0] * rows
        self.follows = {i for i in range(rows) if done is None or not done[i]}

    def add(
        self,
        places: list[int],
        found: list[tuple[int, bool, int]],
        wanted: list[int] | None = None,
    ) -> None:
        """Count tokens; a row whose token is not the one wanted is followed no longer."""
        for i, (place, (token, sure, count)) in enumerate(zip(places, found, strict=True)):
            self.certified[place] += sure
            self.candidates[place] += count
            if wanted is not None and token != wanted[i]:
                self.follows.discard(place)

    def counts(self, place: int) -> dict[str, int]:
        """Of one row."""
        return {"certified": self.certified[place], "candidates": self.candidates[place]}
