"""`flashhead chat`: a conversation with a model in the terminal, or piped in line by line.

Answers go to stdout, everything else to stderr. Ctrl-C during an answer ends the answer, and what
was said stays; at the prompt it ends the program.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import sys
from collections.abc import Iterator
from typing import Any

from flashhead.cli.answer import Answer, interruptible
from flashhead.cli.arguments import MODEL_HELP, Parser, add_decoding, command
from flashhead.cli.generate import sampling, seed_torch, summary
from flashhead.cli.history import STOP, Turn, encode_turns, fit
from flashhead.errors import FlashHeadError

COMMANDS = {
    "/reset": "forget what was said",
    "/exit": "end (as Ctrl-D does)",
    "/help": "list the commands",
}


class Chat:
    """A model and what was said to it.

    Args:
        model: a causal LM with a FlashHead.
        tokenizer: of the model.
        options: arguments of `generate`, `max_new_tokens` among them.
        system: text before the conversation.
    """

    def __init__(
        self, model: Any, tokenizer: Any, options: dict[str, Any], system: str | None = None
    ) -> None:
        self.turns: list[Turn] = []
        self.said: list[Turn] = []
        self.seconds = 0.0
        self.bytes_fractions: list[tuple[int, float]] = []
        self._model, self._tokenizer, self._options = model, tokenizer, options
        self._system = system
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._room = None if context is None else context - options["max_new_tokens"]
        if self._room is not None and self._room < 1:
            raise FlashHeadError(
                f"--max-new-tokens {options['max_new_tokens']}: wanted less than the model's "
                f"context of {context:,}"
            )
        encode_turns(tokenizer, [Turn("user", "")], system)  # a template may refuse `system`

    def reset(self) -> None:
        """Forget what was said."""
        self.turns = []

    def answer(self, text: str) -> None:
        """Stream the model's answer to a message, and keep both."""
        asked = Turn("user", text)
        try:
            turns, inputs = fit(self._tokenizer, [*self.turns, asked], self._room, self._system)
        except FlashHeadError as error:
            _note(str(error))
            return
        if dropped := len(self.turns) + 1 - len(turns):
            _note(f"the context is full: the oldest {dropped} turns were dropped")
        plain = self._tokenizer.chat_template is None
        answer = Answer(self._tokenizer, sys.stdout, STOP if plain else None)
        counted = self._generate(inputs, answer)
        if not answer.tokens:
            _note("stopped before the first token: the message is forgotten")
            return
        replied = Turn("assistant", answer.text.rstrip(), len(answer.tokens), answer.tok_per_sec)
        self.turns = [*turns, replied]
        self.said += [asked, replied]
        self.seconds += answer.seconds
        if counted:
            self.bytes_fractions.append((len(answer.tokens), counted["bytes_fraction"]))
        _note(("stopped: " if answer.interrupted else "") + summary(answer, counted))

    def totals(self) -> dict[str, Any]:
        """Tokens and speed of all answers, and the bytes that their searches read."""
        tokens = sum(turn.new_tokens or 0 for turn in self.said)
        searched = sum(count for count, _ in self.bytes_fractions)
        read = sum(count * fraction for count, fraction in self.bytes_fractions)
        return {
            "turns": len(self.said),
            "new_tokens": tokens,
            "seconds": self.seconds,
            "tok_per_sec": tokens / self.seconds if tokens else None,
            "bytes_fraction": read / searched if searched else None,
        }

    def _generate(self, inputs: Any, answer: Answer) -> dict[str, float]:
        """Generate into `answer`; returns what the search counted."""
        from transformers import StoppingCriteriaList

        from flashhead.cli import session

        head = self._model.get_output_embeddings()
        head.stats.reset()
        with interruptible(answer):
            self._model.generate(
                **inputs.to(self._model.device),
                **self._options,
                pad_token_id=session.pad_token(self._tokenizer),
                stopping_criteria=StoppingCriteriaList([lambda ids, *_: answer.complete(ids)]),
                streamer=answer,
            )
        return session.counted(head)


def add_parser(subparsers: Any) -> None:
    """Describe the subcommand."""
    parser: Parser = command(subparsers, "chat", run, "talk to a model in the terminal")
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before all else")
    add_decoding(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Talk until the user ends it."""
    options = {**sampling(args), "max_new_tokens": args.max_new_tokens}
    from flashhead.cli import session

    model, tokenizer = session.load_model(args, "dense" if args.dense else args.head)
    chat = Chat(model, tokenizer, options, args.system)
    seed = seed_torch(args.seed)
    for line in _lines():
        text = line.strip()
        if text == "/exit":
            break
        if text.startswith("/"):
            _obey(text, chat)
        elif text:
            chat.answer(text)
    return {
        "model": args.model,
        "head": model.get_output_embeddings().kind,
        "system": args.system,
        "turns": [dataclasses.asdict(turn) for turn in chat.said],
        "totals": chat.totals(),
        "temperature": args.temperature,
        "top_p": args.top_p,
        "seed": seed if args.temperature > 0 else None,
    }


def _obey(text: str, chat: Chat) -> None:
    if text == "/reset":
        chat.reset()
        _note("forgotten")
    elif text == "/help":
        for name, does in COMMANDS.items():
            _note(f"{name:<8}{does}")
    else:
        _note(f"{text.split()[0]}: no such command; wanted {', '.join(COMMANDS)}")


def _lines() -> Iterator[str]:
    """What the user says: typed at a prompt, or piped in."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (editing and history at the prompt)
    _note("/help lists the commands")
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def _note(text: str) -> None:
    """A line on stderr, dim on a terminal."""
    line = f"[{text}]"
    if sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
        line = f"\x1b[2m{line}\x1b[0m"
    print(line, file=sys.stderr, flush=True)
