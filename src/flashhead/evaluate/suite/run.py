"""The evaluation: every task by both models, compared question by question."""

import contextlib
import dataclasses
import io
import logging
import os
import time
from pathlib import Path
from typing import Any

from flashhead.environment import provenance
from flashhead.errors import FlashHeadError
from flashhead.evaluate.suite import fidelity, paired
from flashhead.evaluate.suite.answers import Answers
from flashhead.evaluate.suite.probes import PROBES
from flashhead.evaluate.suite.sides import Side
from flashhead.evaluate.suite.tasks import Task, make_task, to_harness

SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class SuiteOptions:
    """What is evaluated.

    Args:
        tasks: of `names.TASKS`.
        data_dir: folder of the data sets, or None.
        limit: questions a task.
        seed: of the questions that are drawn and of the bootstrap.
        contexts: tokens of the probes' documents.
        cache: folder of the answers.
        resume: whether answers of an earlier run count.
        isolated: False: HumanEval's programs run with limits alone.
    """

    tasks: tuple[str, ...]
    data_dir: Path | None
    limit: int
    seed: int
    contexts: tuple[int, ...]
    cache: Path
    resume: bool = True
    isolated: bool = True


def evaluate(base: Side, value: Side, tokenizer: Any, options: SuiteOptions) -> dict[str, Any]:
    """Run all tasks.

    Args:
        base: the model that is the truth.
        value: the model that is compared.
        tokenizer: of both.
        options: what is evaluated.

    Returns:
        JSON-able: `tasks`, `greedy` (tokens of all generations), settings and provenance.

    Raises:
        FlashHeadError: data is missing or malformed, or a kept answer was changed.
    """
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    start = time.perf_counter()
    require_length(base.body.model.config, options)
    tasks = [
        make_task(
            name,
            options.data_dir,
            limit=options.limit,
            seed=options.seed,
            contexts=options.contexts,
            count_tokens=lambda text: len(base.harness.tok_encode(text)),
            isolated=options.isolated,
        )
        for name in options.tasks
    ]
    table = {task.name: run_task(task, base, value, tokenizer, options) for task in tasks}
    generated = [row for row in table.values() if "identical_tokens" in row]
    tokens = sum(row["tokens"] for row in generated)
    same = sum(row["identical_tokens"] for row in generated)
    sides = {"base": base.settings, "value": value.settings}
    for name, side in (("base", base), ("value", value)):
        sides[name]["rows_at_once"] = sorted(side.harness.batch_sizes)
    return {
        "kind": "evaluation",
        "schema": SCHEMA,
        "tasks": table,
        "greedy": {
            "tokens": tokens,
            "identical_tokens": same,
            "agreement": same / tokens if tokens else None,
        },
        "sides": sides,
        "limit": options.limit,
        "seed": options.seed,
        "contexts": list(options.contexts),
        "isolated": options.isolated,
        "seconds": round(time.perf_counter() - start, 1),
        **provenance(),
    }


def require_length(config: Any, options: SuiteOptions) -> None:
    """Refuse documents that are longer than a model reads: they would measure nothing of it.

    Raises:
        FlashHeadError: a probe's context is longer than `config` allows.
    """
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = max(options.contexts)
    if most is not None and longest > most and set(options.tasks) & set(PROBES):
        raise FlashHeadError(f"--context {longest}: the model reads at most {most:,} tokens")


def run_task(
    task: Task, base: Side, value: Side, tokenizer: Any, options: SuiteOptions
) -> dict[str, Any]:
    """One task: both models' answers, scores, and how they differ."""
    scores, answers, seconds = [], [], {}
    for side in (base, value):
        path = options.cache / side.fingerprint[:16] / f"{task.name}.jsonl"
        side.harness.answers = Answers(path, side.fingerprint, resume=options.resume)
    resumed = sum(side.harness.answers.resumed for side in (base, value) if side.harness.answers)
    for name, side in (("base", base), ("value", value)):
        begun = time.perf_counter()
        got, kept = _answered(task, side, name)
        seconds[name] = round(time.perf_counter() - begun, 1)
        scores.append(got)
        answers.append(kept)
    where = [doc["group"] for doc in task.docs]
    row: dict[str, Any] = {"metric": task.metric, "shots": task.shots}
    if task.skipped_rows:
        row["skipped_rows"] = task.skipped_rows
    if task.kind == "loglikelihood":
        tokens = [float(answer["tokens"]) for answer in answers[0]]
        nll = [[-x / n for x, n in zip(got, tokens, strict=True)] for got in scores]
        row |= paired.compare(nll[0], nll[1], where, options.seed, weights=tokens, exponential=True)
        row["scored_tokens"] = int(sum(tokens))
        row["complete_logits"] = _of_complete_logits(answers, where, options.seed)
    else:
        row |= paired.compare(scores[0], scores[1], where, options.seed)
        pairs = list(zip(*scores, strict=True))
        row |= {"lost": pairs.count((1.0, 0.0)), "gained": pairs.count((0.0, 1.0))}
    asked = _asked(task, base, answers[0])
    if task.kind == "generate_until":
        row |= fidelity.generations(answers[0], answers[1])
        row["certified"] = _certified(value, answers[1])
        prompts = [base.harness.tok_encode(doc["prompt"]) for doc in task.docs]
        both = (answers[0], answers[1])
        pair = (scores[0], scores[1])
        row["examples"] = fidelity.examples(base, value, prompts, both, pair, tokenizer)
    found = fidelity.distributions(base, value, asked, options.seed)
    if task.kind != "generate_until":
        row |= {"agreement": found["argmax_agreement"], "first_divergence": None}
        row |= {"certified": None, "examples": []}
    row |= found
    if task.docs and "context" in task.docs[0]:
        row["by_context"] = _by_context(task, scores, options.seed)
    return row | {"seconds": seconds, "resumed_answers": resumed}


def _of_complete_logits(
    answers: list[list[dict[str, Any]]], where: list[Any], seed: int
) -> dict[str, Any]:
    """Perplexities if the scored tokens had the complete logits, estimates among them."""
    tokens = [float(answer["tokens"]) for answer in answers[0]]
    base, value = ([-a["complete_logprob"] / a["tokens"] for a in kept] for kept in answers)
    return paired.compare(base, value, where, seed, weights=tokens, exponential=True)


def _answered(task: Task, side: Side, name: str) -> tuple[list[float], list[dict[str, Any]]]:
    """Scores of a task's documents, in order, and the answers they rest on (the first, where a
    document asks for several).
    """
    from lm_eval import evaluator

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    harness = side.harness
    harness.name = f"{task.name}, {name}"
    assert harness.answers is not None
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its bars; ours go to the real one
            results: Any = evaluator.evaluate(
                harness, {task.name: to_harness(task)}, bootstrap_iters=0, log_samples=True
            )
    finally:
        harness.answers.close()
    samples = sorted(results["samples"][task.name], key=lambda sample: sample["doc_id"])
    metric = "acc" if task.kind == "multiple_choice" else "score"
    requests = len(harness.asked) // len(task.docs)
    kept = [harness.answers.known[key] for key in harness.asked[::requests]]
    return [float(sample[metric]) for sample in samples], kept


def _asked(task: Task, base: Side, answers: list[dict[str, Any]]) -> list[fidelity.Asked]:
    """What both models read when their distributions are compared."""
    harness = base.harness
    if task.kind == "generate_until":
        return [
            fidelity.Asked(
                harness.tok_encode(doc["prompt"]) + answer["tokens"][:-1], len(answer["tokens"])
            )
            for doc, answer in zip(task.docs, answers, strict=True)
        ]
    if task.kind == "multiple_choice":
        return [fidelity.Asked(harness.tok_encode(doc["prompt"]), 1) for doc in task.docs]
    pairs = [harness._encode_pair(doc["prompt"], doc["target"]) for doc in task.docs]
    return [fidelity.Asked([*context, *wanted][:-1], len(wanted)) for context, wanted in pairs]


def _certified(side: Side, answers: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Share of generated tokens with a certificate, and rows scored exactly for one."""
    from flashhead.evaluate.suite.heads import SearchedHead

    tokens = sum(len(answer["tokens"]) for answer in answers)
    if not isinstance(side.head, SearchedHead) or not tokens:
        return None
    return {
        "share": sum(answer["certified"] for answer in answers) / tokens,
        "candidates_mean": sum(answer["candidates"] for answer in answers) / tokens,
    }


def _by_context(task: Task, scores: list[list[float]], seed: int) -> dict[str, Any]:
    """The comparison for each length of a probe."""
    found = {}
    for context in sorted({doc["context"] for doc in task.docs}):
        picked = [i for i, doc in enumerate(task.docs) if doc["context"] == context]
        base, value = ([got[i] for i in picked] for got in scores)
        where = [task.docs[i]["group"] for i in picked]
        found[str(context)] = paired.compare(base, value, where, seed)
    return found


def format_table(document: dict[str, Any]) -> str:
    """The document as text."""
    head = ("task", "metric", "n", "base", "value", "difference", "95 % interval", "tokens", "KL")
    widths = (11, 12, 5, 8, 8, 11, 20, 8, 9)
    lines = ["".join(f"{name:>{w}}" for name, w in zip(head, widths, strict=True))]
    for name, row in document["tasks"].items():
        change = f"x {row['ratio']:.4f}" if "ratio" in row else f"{row['difference']:+.4f}"
        interval = row["interval"]
        shown = "one document" if interval is None else f"{interval[0]:+.4f} {interval[1]:+.4f}"
        agreed = f"{row['agreement']:.2%}"
        cells = (
            *(name, row["metric"], row["n"], f"{row['base']:.4f}", f"{row['value']:.4f}"),
            *(change, shown, agreed, f"{row['kl']['mean']:.1e}"),
        )
        lines.append("".join(f"{cell!s:>{w}}" for cell, w in zip(cells, widths, strict=True)))
    greedy = document["greedy"]
    if greedy["agreement"] is not None:
        lines.append(
            f"{greedy['identical_tokens']:,} of {greedy['tokens']:,} greedy tokens identical "
            f"({greedy['agreement']:.3%})"
        )
    for name, side in document["sides"].items():
        lines.append(f"{name}: {side['dtype']} body, {side['head']}")
    return "\n".join(lines)
