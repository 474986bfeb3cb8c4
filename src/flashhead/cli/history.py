"""A conversation as a model's prompt: in its chat template, or as a transcript of plain text.

A model without a template was not taught to take turns. It continues a transcript whose last line
is `Assistant:`, and its answer ends where it begins to speak for the user.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from flashhead.errors import FlashHeadError

STOP = "\nUser:"
"""Where an answer in a transcript ends."""
_SPEAKERS = {"user": "User", "assistant": "Assistant"}


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one side said.

    Args:
        role: "user" or "assistant".
        text: what was said.
        new_tokens: that an answer took, its end included.
        tok_per_sec: of an answer, the prompt's time included.
    """

    role: str
    text: str
    new_tokens: int | None = None
    tok_per_sec: float | None = None


def transcript(turns: Sequence[Turn], system: str | None = None) -> str:
    """Plain text that a base model continues with the assistant's answer."""
    opening = [] if system is None else [system, ""]
    said = [f"{_SPEAKERS[turn.role]}: {turn.text}" for turn in turns]
    return "\n".join([*opening, *said, f"{_SPEAKERS['assistant']}:"])


def encode_turns(tokenizer: Any, turns: Sequence[Turn], system: str | None = None) -> Any:
    """Token ids of a conversation, `int64[1, n]` with their mask, up to where the answer begins.

    Raises:
        FlashHeadError: a system prompt that the chat template does not take.
    """
    if tokenizer.chat_template is None:
        return tokenizer(transcript(turns, system), return_tensors="pt")
    from jinja2 import TemplateError

    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except TemplateError as error:
        if system is None:
            raise
        raise FlashHeadError(f"--system: the chat template does not take it ({error})") from error


def fit(
    tokenizer: Any, turns: Sequence[Turn], limit: int | None, system: str | None = None
) -> tuple[list[Turn], Any]:
    """Drop the oldest questions with their answers until a conversation fits.

    Args:
        tokenizer: of the model.
        turns: the conversation; the user spoke first and last.
        limit: tokens that there is room for; None: any number.
        system: text that always stays.

    Returns:
        The turns that are left, and their encoding.

    Raises:
        FlashHeadError: the last message alone is too long.
    """
    kept = list(turns)
    while True:
        inputs = encode_turns(tokenizer, kept, system)
        tokens = inputs["input_ids"].shape[1]
        if limit is None or tokens <= limit:
            return kept, inputs
        if len(kept) == 1:
            raise FlashHeadError(
                f"a message of {tokens:,} tokens with its template: the context has room for "
                f"{limit:,}"
            )
        del kept[:2]
