"""Two synthetic tasks: copy a random string, add two numbers of two digits.

A document is 16 lines of one task. What is asked later was never trained on: a tenth of the 8,100
pairs of numbers is held out, and strings of 8 to 16 letters and digits do not come twice.
"""

import dataclasses
import random
import string

LINES = 16
SHOWN = 3
"""Lines before the one that is asked, so that the task is known."""
SYMBOLS = string.ascii_lowercase + string.digits
ANSWER_TOKENS = {"copy": 28, "addition": 6}


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt and the line that should follow it."""

    prompt: str
    answer: str


def split_pairs(seed: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Pairs of numbers that are trained on, and those that are held out."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(seed).shuffle(pairs)
    held = len(pairs) // 10
    return pairs[held:], pairs[:held]


def copy_line(rng: random.Random) -> tuple[str, str]:
    """`copy STRING =>` and ` STRING`."""
    text = "".join(rng.choices(SYMBOLS, k=rng.randint(8, 16)))
    return f"copy {text} =>", f" {text}"


def sum_line(pair: tuple[int, int]) -> tuple[str, str]:
    """`A+B=` and the sum."""
    return f"{pair[0]}+{pair[1]}=", str(sum(pair))


class Documents:
    """An iterator of training documents.

    Args:
        seed: of the held-out pairs and of the lines.
    """

    def __init__(self, seed: int) -> None:
        self._rng, self._pairs, self._turn = random.Random(seed + 1), split_pairs(seed)[0], 0

    def __iter__(self) -> "Documents":
        return self

    def __next__(self) -> str:
        self._turn += 1
        lines = []
        for _ in range(LINES):
            if self._turn % 2:
                lines.append("".join(copy_line(self._rng)))
            else:
                lines.append("".join(sum_line(self._rng.choice(self._pairs))))
        return "\n".join(lines) + "\n"


def questions(seed: int, count: int) -> dict[str, list[Question]]:
    """At most `count` questions a task; additions are of held-out pairs, each asked once."""
    rng = random.Random(seed + 2)
    trained, held = split_pairs(seed)
    found: dict[str, list[Question]] = {"copy": [], "addition": []}
    for i in range(count):
        shown = ["".join(copy_line(rng)) for _ in range(SHOWN)]
        ask, answer = copy_line(rng)
        found["copy"].append(Question("\n".join([*shown, ask]), answer))
        if i < len(held):
            shown = ["".join(sum_line(rng.choice(trained))) for _ in range(SHOWN)]
            ask, answer = sum_line(held[i])
            found["addition"].append(Question("\n".join([*shown, ask]), answer))
    return found
