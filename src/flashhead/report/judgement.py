"""May the converted model replace the original? One sentence, with the numbers it rests on.

yes        every task's difference lies within one standard error, or is not for the worse, and
           at least 99.9 % of the greedy tokens are the original's
no         a task is worse by more than one standard error, or fewer tokens are
not known  a task differs and has one document only, or fewer than 100 questions were asked
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

LEAST_AGREEMENT = 0.999
LEAST_QUESTIONS = 100
LOWER_IS_BETTER = frozenset({"perplexity"})


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What the page says first.

    Args:
        answer: "yes", "no" or "not known".
        sentence: the answer, with its figures.
        each: of several evaluations, one by one; the answer is then the worst of them.
    """

    answer: str
    sentence: str
    each: tuple["Judgement", ...] = ()

    @property
    def parts(self) -> tuple[str, str]:
        """The answer, and what it rests on."""
        answer, _, grounds = self.sentence.partition(": ")
        return answer, grounds


def judge(evaluations: Sequence[dict[str, Any]]) -> Judgement:
    """Decide for all evaluations together."""
    if not evaluations:
        return Judgement(
            "not known", "No evaluation is among the files: whether it may replace is not known."
        )
    found = [_one(document) for document in evaluations]
    answers = [one.answer for one in found]
    answer = next(a for a in ("no", "not known", "yes") if a in answers)
    return Judgement(answer, "\n".join(one.sentence for one in found), tuple(found))


def called(document: dict[str, Any]) -> str:
    """What an evaluation is about: a model, or a model with FlashHead attached to it."""
    model = str(document["model"])
    attached = model == document["against"]
    searched = str(document["sides"]["value"]["head"]).startswith("FlashHead")
    return f"{model} with FlashHead" if attached and searched else model


def outcome(row: dict[str, Any]) -> str:
    """A task: "same" (no difference at all), "within", "better", "worse" or "not known"."""
    gap = row["value"] - row["base"]
    if gap == 0:
        return "same"
    error = row["stderr"]
    if error is None:
        return "not known"
    if abs(gap) <= error:
        return "within"
    worse = gap > 0 if row["metric"] in LOWER_IS_BETTER else gap < 0
    return "worse" if worse else "better"


def _one(document: dict[str, Any]) -> Judgement:
    tasks = document["tasks"]
    outcomes = {name: outcome(row) for name, row in tasks.items()}
    worse = [name for name, found in outcomes.items() if found == "worse"]
    unknown = [name for name, found in outcomes.items() if found == "not known"]
    agreement = document["greedy"]["agreement"]
    few = agreement is not None and agreement < LEAST_AGREEMENT
    questions = sum(row["n"] for row in tasks.values())
    answer = (
        "no" if worse or few else "not known" if unknown or questions < LEAST_QUESTIONS else "yes"
    )
    verb = {"yes": "may replace", "no": "does not replace", "not known": "may or may not replace"}
    held = len(tasks) - len(worse) - len(unknown)
    parts = [
        f"{held} of {len(tasks)} tasks ({questions:,} questions) are the same, better or within "
        "one standard error"
    ]
    if worse:
        parts.append(f"worse: {', '.join(worse)}")
    if unknown:
        parts.append(f"one document only: {', '.join(unknown)}")
    if questions < LEAST_QUESTIONS:
        parts.append(f"too few questions to tell, wanted {LEAST_QUESTIONS}")
    if agreement is not None:
        total = document["greedy"]["tokens"]
        parts.append(f"{agreement:.3%} of {total:,} greedy tokens are identical")
    largest = max(row["kl"]["mean"] for row in tasks.values())
    parts.append(f"the largest mean KL of a task is {largest:.1e} nats")
    names = f"{called(document)} {verb[answer]} {document['against']}"
    return Judgement(answer, f"{names}: {'; '.join(parts)}.")
