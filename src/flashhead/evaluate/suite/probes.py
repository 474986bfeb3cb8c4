"""Tasks of a given length: find a needle, look up a value, copy a line, add numbers.

A document of `context` tokens (counted by the model's tokenizer, question included) holds about
twenty facts, and each is asked for once: questions of a document share all of its keys and values,
so 200 questions cost ten prefills. They are no independent samples: intervals resample documents.
Words and numbers are drawn by the seed; no text file is needed.

    needle     numbers hidden between sentences, one a name
    lookup     lines of `name: number`, nothing else
    copy       lines of random words; one is to be continued exactly, from its number and two words
    addition   solved sums; one more is to be solved
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from flashhead.errors import FlashHeadError

QUESTIONS = 20
"""Of a document."""
LEAST_CONTEXT, LEAST_FACTS = 256, 4
_WORDS = re.findall(
    r"\w+",
    """
    river stone window garden silver lantern market bridge winter orange paper morning
    harbor candle forest hammer island jacket kettle ladder mirror needle office pencil
    quiet ribbon saddle tunnel valley wagon yellow anchor basket copper desert engine
    feather glacier hollow indigo jungle kitchen lemon meadow nickel olive pepper quartz
    rocket shadow temple umbrella velvet willow zebra autumn bottle cotton dragon ember
    falcon ginger
    """,
)
Count = Callable[[str], int]
Doc = dict[str, Any]


def probe(
    name: str, contexts: tuple[int, ...], limit: int, seed: int, count_tokens: Count
) -> list[Doc]:
    """Questions of one probe.

    Args:
        name: "needle", "lookup", "copy" or "addition".
        contexts: tokens of a document with its question, 256 or more.
        limit: questions of all contexts together, shared out evenly.
        seed: of what is drawn.
        count_tokens: of a text.

    Returns:
        `prompt`, `target`, `context` and `group` (its document) each.
    """
    docs: list[Doc] = []
    for place, context in enumerate(contexts):
        if context < LEAST_CONTEXT:
            raise FlashHeadError(f"--context {context}: wanted {LEAST_CONTEXT} tokens or more")
        wanted = limit // len(contexts) + (place < limit % len(contexts))
        for start in range(0, wanted, QUESTIONS):
            rng = np.random.default_rng((seed, list(_MAKERS).index(name), context, start))
            body, questions = _fitted(_MAKERS[name], rng, context, count_tokens)
            if not questions:
                raise FlashHeadError(f"--context {context}: too short for {name} in these tokens")
            docs += [
                {
                    "prompt": body + question,
                    "target": target,
                    "context": context,
                    "group": f"{context}/{start // QUESTIONS}",
                }
                for question, target in questions[: wanted - start]
            ]
    return docs


def _fitted(
    make: Any, rng: np.random.Generator, context: int, count_tokens: Count
) -> tuple[str, list[tuple[str, str]]]:
    """The longest document of a maker that fits, with its questions; without any if none fits."""
    seed = int(rng.integers(2**31))

    def made(size: int) -> tuple[str, list[tuple[str, str]]]:
        found: tuple[str, list[tuple[str, str]]] = make(np.random.default_rng(seed), size)
        return found

    def fits(size: int) -> bool:
        body, questions = made(size)
        return count_tokens(body + max((q for q, _ in questions), key=len)) <= context

    low, high = QUESTIONS, 2 * QUESTIONS
    if not fits(low):
        low = LEAST_FACTS  # a short context asks about fewer
        if not fits(low):
            return "", []
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return made(low)


def _names(rng: np.random.Generator, count: int) -> list[str]:
    """Different names of two words and a number."""
    picked = rng.choice(len(_WORDS) ** 2 * 90, size=count, replace=False)
    pairs = [(int(p) // 90, 10 + int(p) % 90) for p in picked]
    return [f"{_WORDS[w // len(_WORDS)]} {_WORDS[w % len(_WORDS)]} {n}" for w, n in pairs]


def _sentence(rng: np.random.Generator) -> str:
    a, b, c, d = (_WORDS[i] for i in rng.integers(len(_WORDS), size=4))
    return f"The {a} near the {b} was moved to the {c} before the {d} came back."


def _needle(rng: np.random.Generator, size: int) -> tuple[str, list[tuple[str, str]]]:
    facts = _facts(rng, min(QUESTIONS, size))
    lines = [_sentence(rng) for _ in range(size - len(facts))]
    for name, value in facts:
        at = int(rng.integers(len(lines) + 1))
        lines.insert(at, f"The secret number of {name} is {value}.")
    asked = "\n\nQuestion: What is the secret number of {0}?\nAnswer: The secret number of {0} is"
    return " ".join(lines), [(asked.format(name), value) for name, value in facts]


def _lookup(rng: np.random.Generator, size: int) -> tuple[str, list[tuple[str, str]]]:
    facts = _facts(rng, size)
    body = "".join(f"{name}: {value}\n" for name, value in facts)
    asked = rng.choice(len(facts), size=min(QUESTIONS, size), replace=False)
    return body, [(f"\nThe same line again:\n{facts[i][0]}:", facts[i][1]) for i in asked]


def _facts(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    numbers = rng.integers(10_000, 100_000, size=count)
    return [(name, str(n)) for name, n in zip(_names(rng, count), numbers, strict=True)]


def _copy(rng: np.random.Generator, size: int) -> tuple[str, list[tuple[str, str]]]:
    words = rng.integers(len(_WORDS), size=(size, 8))
    lines = [" ".join(_WORDS[i] for i in row) for row in words]
    body = "".join(f"Line {n}: {line}\n" for n, line in enumerate(lines, start=1))
    asked = rng.choice(size, size=min(QUESTIONS, size), replace=False)
    questions = []
    for i in asked:
        first, second, rest = lines[i].split(" ", 2)
        questions.append((f"\nThe same line again:\nLine {i + 1}: {first} {second}", rest))
    return body, questions


def _addition(rng: np.random.Generator, size: int) -> tuple[str, list[tuple[str, str]]]:
    # two, three and four digits alike often
    sums = (10 ** rng.uniform(1, 4, size=(size + QUESTIONS, 2))).astype(int)
    lines = [(f"{a} + {b} =", str(a + b)) for a, b in sums.tolist()]
    body = "".join(f"{left} {right}\n" for left, right in lines[:size])
    return body, lines[size : size + min(QUESTIONS, size)]


_MAKERS = {"needle": _needle, "lookup": _lookup, "copy": _copy, "addition": _addition}
PROBES = tuple(_MAKERS)
