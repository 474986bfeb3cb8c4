"""Two engines' answers to the same requests: where they part, and whether the logits tie there.

Answers are what `integrations/vllm/run_features.py` writes about a feature: rounds of requests of
outputs, each with its tokens and, if asked for, pairs of token and log-probability by position.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from flashhead.evaluate.features import Feature, Request

TOP_LOGITS = 5
"""Logits that tell whether two tokens tie."""
Answers = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Difference:
    """Where two answers to a request part.

    Args:
        round: of the feature.
        request: of the round.
        output: of the request.
        position: of the first tokens that differ, from 0.
        dense: the dense head's token; None: its answer has ended.
        flash: FlashHead's token; None: its answer has ended.
        kind: "tie" (explained), "drawn" (by the same noise), "wrong".
        gap: the dense head's logit of its token less that of FlashHead's; None: not known.
        step: bf16 step at that logit.
    """

    round: int
    request: int
    output: int
    position: int
    dense: int | None
    flash: int | None
    kind: Literal["tie", "drawn", "wrong"] = "wrong"
    gap: float | None = None
    step: float | None = None


def differences(dense: Answers, flash: Answers) -> list[Difference]:
    """The first difference of each output that has one, not yet explained."""
    found = []
    for number, (first, second) in enumerate(zip(dense["rounds"], flash["rounds"], strict=True)):
        for request, (a, b) in enumerate(zip(first, second, strict=True)):
            for output, (ours, theirs) in enumerate(zip(a["outputs"], b["outputs"], strict=True)):
                texts = ours["tokens"], theirs["tokens"]
                if texts[0] == texts[1] and ours["finish"] == theirs["finish"]:
                    continue
                at = same_length(*texts)
                a_token, b_token = (text[at] if at < len(text) else None for text in texts)
                found.append(Difference(number, request, output, at, a_token, b_token))
    return found


def with_logits(feature: Feature, dense: Answers, flash: Answers) -> Feature | None:
    """The feature to run once more, with the logits that show a tie; None: nothing differs so.

    All its requests are run again, not only those that differ: batches, and with them hidden
    states, are then the same to the bit.
    """
    if feature.head == "dense" or feature.check == "distribution":
        return None
    if dense["refused"] or flash["refused"]:
        return None
    if not any(
        feature.requests[found.request].is_greedy and None not in (found.dense, found.flash)
        for found in differences(dense, flash)
    ):
        return None
    requests = tuple(
        Request(request.prompt, {**request.params, "logprobs": TOP_LOGITS})
        if request.is_greedy
        else request
        for request in feature.requests
    )
    return dataclasses.replace(feature, requests=requests)


def explain(
    found: Difference, feature: Feature, dense: Answers, logits: Answers | None
) -> Difference:
    """Say of which kind a difference is.

    Args:
        found: not yet explained.
        feature: that it belongs to.
        dense: answers of the dense head.
        logits: of the dense head to the feature that `with_logits` gave, logits in place of
            log-probabilities.
    """
    if feature.head == "dense" or found.dense is None or found.flash is None:
        return found
    if not feature.requests[found.request].is_greedy:
        return dataclasses.replace(found, kind="drawn")
    if logits is None or logits["refused"]:
        return found
    text, again = (
        answers["rounds"][found.round][found.request]["outputs"][found.output]
        for answers in (dense, logits)
    )
    end = found.position + 1
    if again["tokens"][:end] != text["tokens"][:end]:
        return found  # the dense head did not repeat itself
    known = dict(again["logprobs"][found.position])
    if found.flash not in known:
        return found  # not even among the best
    gap, step = known[found.dense] - known[found.flash], bf16_step(known[found.dense])
    kind: Literal["tie", "wrong"] = "tie" if abs(gap) <= step else "wrong"
    return dataclasses.replace(found, kind=kind, gap=gap, step=step)


def bf16_step(value: float) -> float:
    """Distance of neighbouring bf16 numbers at a value: 8 significant bits."""
    return math.ldexp(1.0, math.frexp(value)[1] - 8)


def logprob_error(dense: Answers, flash: Answers) -> float | None:
    """Largest difference of a log-probability that both list; None: there is none.

    Prompts count, and outputs up to their first difference.
    """
    errors: list[float] = []
    for first, second in zip(dense["rounds"], flash["rounds"], strict=True):
        for a, b in zip(first, second, strict=True):
            errors += _errors(a["prompt_logprobs"], b["prompt_logprobs"], None)
            for ours, theirs in zip(a["outputs"], b["outputs"], strict=True):
                same = same_length(ours["tokens"], theirs["tokens"])
                errors += _errors(ours["logprobs"], theirs["logprobs"], same)
    return max(errors) if errors else None


def _errors(dense: list[Any] | None, flash: list[Any] | None, count: int | None) -> Iterator[float]:
    """Differences at the first `count` positions, or at all."""
    if dense is None or flash is None:
        return
    for ours, theirs in zip(dense[:count], flash[:count], strict=True):
        known = dict(theirs)
        yield from (abs(value - known[token]) for token, value in ours if token in known)


def outputs(answers: Answers) -> Iterator[Mapping[str, Any]]:
    """All outputs of all requests of all rounds."""
    for requests in answers["rounds"]:
        for answer in requests:
            yield from answer["outputs"]


def same_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens before the first difference."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))
