"""Tasks in the form of lm-evaluation-harness: documents of our own, scored by its task class."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flashhead.errors import FlashHeadError
from flashhead.evaluate.suite import data, probes, sandbox
from flashhead.task_names import TASKS

Doc = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """One task: its questions, and what an answer is worth.

    Args:
        name: of `TASKS`.
        metric: what `base` and `value` are: "accuracy", "exact match", "pass@1" or "perplexity".
        kind: the harness's output type.
        docs: questions; `group` says which are not independent, `context` how long a probe is.
        shots: examples in the prompt.
        max_tokens: of an answer that is generated.
        until: strings that end such an answer.
        score: what a generated answer is worth, 0 or 1; None: the harness decides.
        skipped_rows: of the data, that are no questions.
    """

    name: str
    metric: str
    kind: str
    docs: list[Doc]
    shots: int = 0
    max_tokens: int = 0
    until: tuple[str, ...] = ()
    score: Callable[[Doc, str], float] | None = None
    skipped_rows: int = 0


def make_task(
    name: str,
    folder: Path | None,
    *,
    limit: int,
    seed: int,
    contexts: tuple[int, ...],
    count_tokens: Callable[[str], int],
    isolated: bool = True,
) -> Task:
    """A task with its documents.

    Args:
        name: of `TASKS`.
        folder: of the data sets; None: the task must need none.
        limit: of documents.
        seed: of which ones.
        contexts: of the probes.
        count_tokens: of a text.
        isolated: False: HumanEval's programs run with limits alone.

    Raises:
        FlashHeadError: data is missing or malformed, or programs cannot be isolated.
    """
    if name in probes.PROBES:
        docs = probes.probe(name, contexts, limit, seed, count_tokens)
        most = {"copy": 48}.get(name, 16)
        score = _copied if name == "copy" else _first_number
        return Task(name, "exact match", "generate_until", docs, 0, most, ("\n",), score)
    if folder is None:
        raise FlashHeadError(f"{name} reads a data set: pass --data-dir DIR")
    if name == "mmlu":
        docs, skipped = data.mmlu(folder, limit, seed)
        return Task(
            name, "accuracy", "multiple_choice", docs, data.MMLU_SHOTS, skipped_rows=skipped
        )
    if name == "gsm8k":
        docs = data.gsm8k(folder, limit, seed)
        stops = ("Question:", "\n\n")
        return Task(
            *(name, "exact match", "generate_until", docs),
            *(data.GSM8K_SHOTS, 256, stops, _same_number),
        )
    if name == "humaneval":
        if isolated:
            sandbox.require_isolation()
        docs = data.humaneval(folder, limit, seed)
        ends = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\n```", "\nassert ")

        def solved(doc: Doc, answer: str) -> float:
            program = f"{doc['prompt']}{answer}\n{doc['test']}\ncheck({doc['entry_point']})\n"
            return float(sandbox.passes(program, isolated=isolated))

        return Task(name, "pass@1", "generate_until", docs, 0, 256, ends, solved)
    if name == "perplexity":
        return Task(name, "perplexity", "loglikelihood", data.wikitext(folder, limit, seed))
    raise FlashHeadError(f"task {name!r}: wanted {', '.join(TASKS)}")


def to_harness(task: Task) -> Any:
    """The task as the harness takes it, with its documents in memory."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    def documents(**_: Any) -> dict[str, Any]:
        return {"test": datasets.Dataset.from_list(task.docs)}

    config: dict[str, Any] = {
        "task": task.name,
        "custom_dataset": documents,
        "test_split": "test",
        "output_type": task.kind,
        "doc_to_text": lambda doc: doc["prompt"],
        "doc_to_target": lambda doc: doc.get("target", doc.get("gold", "")),
        "target_delimiter": "",
        "num_fewshot": 0,  # the prompts hold theirs
    }
    if task.kind == "multiple_choice":
        config["doc_to_choice"] = [f" {letter}" for letter in data.LETTERS]
        config["metric_list"] = [_metric("acc")]
    elif task.kind == "loglikelihood":
        config["process_results"] = lambda _, results: {"score": results[0][0]}
        config["metric_list"] = [_metric("score")]
    else:
        assert task.score is not None
        score = task.score
        config["process_results"] = lambda doc, results: {"score": score(doc, results[0])}
        config["metric_list"] = [_metric("score")]
        config["generation_kwargs"] = {
            "until": list(task.until),
            "max_gen_toks": task.max_tokens,
            "do_sample": False,
        }
    return ConfigurableTask(config=config)


def _metric(name: str) -> dict[str, Any]:
    return {"metric": name, "aggregation": "mean", "higher_is_better": True}


def _same_number(doc: Doc, answer: str) -> float:
    return float(data.last_number(answer) == doc["target"])


def _first_number(doc: Doc, answer: str) -> float:
    found = re.search(r"\d+", answer)
    return float(found is not None and found[0] == doc["target"])


def _copied(doc: Doc, answer: str) -> float:
    return float(answer.strip() == doc["target"])
