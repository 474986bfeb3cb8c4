"""Verdicts on a served FlashHead: the same requests answered by the dense head and by FlashHead.

**Greedy.** FlashHead's winner is the float32 winner; the dense head's logits are bf16, where the
two best tokens are often equal, and then the first of them wins. So tokens may differ, and each
output's first difference must be shown to be such a tie: among the dense head's own logits there,
FlashHead's token is at most one bf16 step from the dense token. What follows a difference answers
another text and is not compared.
**Seeded draws.** The noise is the same, the logits differ by rounding, so a draw comes out
otherwise now and then. That is "close" if it is at most one draw in ten (the models measured here:
three in a hundred) and if draws without a seed follow the dense head's distribution.
**Distribution.** Counts of both heads, chi-square of two samples, in cells that are expected ten
times or more (`fit.py`).
**Dense rows** (penalties, log-probabilities, structured output ...) are the same product twice:
tokens must be identical, and log-probabilities within 0.01.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence

from flashhead.evaluate.answers import (
    Answers,
    Difference,
    differences,
    explain,
    logprob_error,
    outputs,
    same_length,
)
from flashhead.evaluate.features import Feature

LOGPROB_LIMIT = 0.01
DRAWN_APART_LIMIT = 0.1
REJECTED_BELOW = 1e-3


@dataclasses.dataclass(frozen=True)
class Row:
    """A feature's row of the table.

    Args:
        feature: its name.
        requests: answered by each head.
        tokens: that the dense head answered.
        searched_rows: of FlashHead.
        dense_rows: of FlashHead.
        dense_seconds: of the dense head's engine.
        flash_seconds: of FlashHead's.
        verdict: in a word or two.
        failures: what is wrong; empty: nothing.
        identical: tokens up to the first difference of each output; None: not compared.
        logprob_error: largest difference of a log-probability; None: there are none.
        differences: the first of each output.
        p_values: of the distribution, one a prompt.
    """

    feature: str
    requests: int
    tokens: int
    searched_rows: int
    dense_rows: int
    dense_seconds: float
    flash_seconds: float
    verdict: str
    failures: tuple[str, ...] = ()
    identical: int | None = None
    logprob_error: float | None = None
    differences: tuple[Difference, ...] = ()
    p_values: tuple[float, ...] = ()


def judge(
    feature: Feature,
    dense: Answers,
    flash: Answers,
    logits: Answers | None = None,
    *,
    all_searchable: bool = True,
    most_tokens: int = 0,
) -> Row:
    """Compare the heads' answers to one feature.

    Args:
        feature: whose answers they are.
        dense: of the dense head.
        flash: of FlashHead.
        logits: of the dense head again, see `answers.explain`.
        all_searchable: whether the crossover lets FlashHead search every row of a full batch.
        most_tokens: of one step of the engine.
    """
    row = Row(
        feature.name,
        requests=feature.rounds * len(feature.requests),
        tokens=sum(len(output["tokens"]) for output in outputs(dense)),
        searched_rows=flash["searched_rows"],
        dense_rows=flash["dense_rows"],
        dense_seconds=dense["seconds"],
        flash_seconds=flash["seconds"],
        verdict="refused",
    )
    refused = [
        f"refused by the engine of the {name}: {answers['refused']}"
        for name, answers in (("dense head", dense), ("FlashHead", flash))
        if answers["refused"]
    ]
    if refused:
        return dataclasses.replace(row, failures=tuple(refused))
    if feature.check == "distribution":
        row = _judge_distribution(row, feature, dense, flash)
    else:
        row = _judge_answers(row, feature, dense, flash, logits)
    failures = [*_head_failures(feature, flash, all_searchable)]
    failures += _check_failures(feature, flash, most_tokens)
    return dataclasses.replace(row, failures=(*row.failures, *failures))


def with_distribution(rows: Sequence[Row]) -> list[Row]:
    """Draws are not close where the distribution, if it was tested, is another one."""
    if not any(row.p_values and min(row.p_values) <= REJECTED_BELOW for row in rows):
        return list(rows)
    failure = "draws came out otherwise, and their distribution is another one"
    return [
        dataclasses.replace(row, verdict="differs", failures=(*row.failures, failure))
        if any(found.kind == "drawn" for found in row.differences)
        else row
        for row in rows
    ]


def two_sample_p(first: Sequence[int], second: Sequence[int]) -> float:
    """Chi-square of two samples: how probable counts so different are if both are of one source.

    Args:
        first: tokens drawn.
        second: tokens drawn elsewhere.
    """
    import torch

    from flashhead.evaluate import fit

    samples = Counter(first), Counter(second)
    tokens = sorted(samples[0] | samples[1])
    counts = torch.tensor([[sample[t] for t in tokens] for sample in samples]).double()
    expected = counts.sum(1, keepdim=True) * counts.sum(0) / counts.sum()
    bins = fit.pooled(expected.min(0).values)
    tests = [
        fit.chi_square(fit.binned(seen, bins), fit.binned(wanted, bins))
        for seen, wanted in zip(counts, expected, strict=True)
    ]
    return fit.chi2_sf(sum(x for x, _ in tests), tests[0][1])


def _judge_distribution(row: Row, feature: Feature, dense: Answers, flash: Answers) -> Row:
    """Verdict on first tokens, prompt by prompt."""
    p_values = []
    for prompt in dict.fromkeys(request.prompt for request in feature.requests):
        drawn = [
            [
                output["tokens"][0]
                for answers in sample["rounds"]
                for request, answer in zip(feature.requests, answers, strict=True)
                if request.prompt == prompt
                for output in answer["outputs"]
            ]
            for sample in (dense, flash)
        ]
        p_values.append(two_sample_p(*drawn))
    fits = min(p_values) > REJECTED_BELOW
    verdict = f"{'fits' if fits else 'differs'} (p = {', '.join(f'{p:.2g}' for p in p_values)})"
    failures = () if fits else (f"p = {min(p_values):.2g}, wanted above {REJECTED_BELOW}",)
    return dataclasses.replace(row, verdict=verdict, failures=failures, p_values=tuple(p_values))


def _judge_answers(
    row: Row, feature: Feature, dense: Answers, flash: Answers, logits: Answers | None
) -> Row:
    """Verdict on tokens and log-probabilities."""
    found = [explain(each, feature, dense, logits) for each in differences(dense, flash)]
    pairs = zip(outputs(dense), outputs(flash), strict=True)
    identical = sum(same_length(a["tokens"], b["tokens"]) for a, b in pairs)
    error = logprob_error(dense, flash)
    kinds = Counter(difference.kind for difference in found)
    failures = []
    if kinds["wrong"]:
        failures.append(f"{kinds['wrong']} outputs differ")
    if error is not None and error > LOGPROB_LIMIT:
        failures.append(f"log-probabilities differ by {error:.2g}, wanted {LOGPROB_LIMIT} or less")
    if kinds["drawn"] > DRAWN_APART_LIMIT * (identical + kinds["drawn"]):
        failures.append(f"{kinds['drawn']} draws apart, {identical:,} tokens before them equal")
    allowed = [f"ties ({kinds['tie']} listed)"] if kinds["tie"] else []
    allowed += [f"close ({kinds['drawn']} apart)"] if kinds["drawn"] else []
    return dataclasses.replace(
        row,
        identical=identical,
        logprob_error=error,
        verdict="differs" if failures else ", ".join(allowed) or "equal",
        failures=tuple(failures),
        differences=tuple(found),
    )


def _head_failures(feature: Feature, flash: Answers, all_searchable: bool) -> list[str]:
    """What FlashHead searched, against what it should have."""
    searched, dense = flash["searched_rows"], flash["dense_rows"]
    if feature.head == "dense":
        return [f"{searched} rows searched, wanted none"] if searched else []
    failures = [] if searched else ["no row was searched"]
    if feature.head == "search" and dense and all_searchable:
        failures.append(f"{dense} rows dense, wanted none")
    if feature.head == "mixed" and not dense:
        failures.append("no row was dense")
    return failures


def _check_failures(feature: Feature, flash: Answers, most_tokens: int) -> list[str]:
    """What a feature asks for beyond equal answers."""
    rounds = flash["rounds"]
    if feature.check == "repeats":
        texts = [[o["tokens"] for a in answers for o in a["outputs"]] for answers in rounds]
        return [] if texts.count(texts[0]) == len(texts) else ["a seed did not repeat its tokens"]
    if feature.check == "caches" and not all(a["cached_tokens"] for a in rounds[-1]):
        return ["nothing was read from the prefix cache"]
    if feature.check == "chunks":
        longest = max(answer["prompt_tokens"] for answer in rounds[0])
        if longest <= most_tokens:
            return [f"prompts of {longest} tokens are one chunk of {most_tokens}"]
    return []


def format_table(rows: Sequence[Row]) -> str:
    """The rows for people, what is wrong below them."""
    titles = ("feature", "requests", "tokens", "identical", "log-prob error", "searched", "dense")
    lines = [(*titles, "verdict")]
    for row in rows:
        identical = "-" if row.identical is None else f"{row.identical:,}"
        error = "-" if row.logprob_error is None else f"{row.logprob_error:.1e}"
        numbers = (f"{row.requests:,}", f"{row.tokens:,}", identical, error)
        heads = (f"{row.searched_rows:,}", f"{row.dense_rows:,}")
        told = not row.failures or row.verdict.startswith(("differs", "refused"))
        verdict = row.verdict if told else "FAILED"
        lines.append((row.feature, *numbers, *heads, verdict))
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    text = [
        "  ".join(
            [line[0].ljust(widths[0])]
            + [cell.rjust(w) for cell, w in zip(line[1:-1], widths[1:], strict=True)]
            + [line[-1]]
        )
        for line in lines
    ]
    text += [f"{row.feature}: {failure}" for row in rows for failure in row.failures]
    return "\n".join(text)
