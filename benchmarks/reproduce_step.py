"""A step of `make reproduce`: a command, what it writes, what it needs, about how long it takes.

A command's first word is `flashhead` or a script of this folder or of examples. Commands run in a
working folder that holds `data` (a link to --data-dir), `wikitext2-valid.txt` and its halves, the
two Qwen folders under the names below, `results`, and `out`, whose documents are moved to the
results when a step is done. So the argv that a document keeps holds no path of a machine.

Minutes are of two CPU cores, or of one H100.
"""

import dataclasses
from typing import Any

TEXT = "wikitext2-valid.txt"
FIRST_HALF, SECOND_HALF = "wiki-first-half.txt", "wiki-second-half.txt"
SMALL = ("smollm2-135m", "gemma-3-270m")
QWEN = ("qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b")
"""Folders that the user gives; the small models are fetched by name."""
MODELS = (*SMALL, *QWEN)


@dataclasses.dataclass(frozen=True)
class Step:
    """One command.

    Args:
        name: what `--only` takes.
        command: `flashhead` or a script of this folder, and its arguments.
        documents: files that it writes to `out`.
        needs: `gpu`, `vllm`, `tasks` (mmlu and gsm8k in the data folder), or the extra of flashhead
            without which it cannot run: `eval`, `quantize`, `calibrate`, `plots`.
        models: folders of QWEN that it reads.
        minutes: about how long it takes.
        after: steps that make what it reads.
        makes: files or folders that it leaves in the working folder; removed before it runs.
        keeps: folders in the working folder that an interrupted run goes on from; removed when it
            starts anew.
        prints: its document is the last line of its stdout.
    """

    name: str
    command: tuple[str, ...]
    documents: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    minutes: float = 1.0
    after: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    prints: bool = False


def step(name: str, command: str, **fields: Any) -> Step:
    """A step whose document is called like it; `{out}` stands for the document's file."""
    words = tuple(command.format(out=f"out/{name}.json").split())
    found = {
        "documents": (f"{name}.json",),
        "models": tuple(model for model in QWEN if any(model in word for word in words)),
    }
    return Step(name, words, **found | fields)


def conversion(
    folder: str, model: str, minutes: float = 1.0, arguments: str = "", *needs: str
) -> Step:
    command = f"flashhead convert {model} {folder} {arguments}"
    made = (folder,)
    return step(
        f"convert-{folder}", command, documents=(), needs=needs, minutes=minutes, makes=made
    )


def drawing(name: str, command: str, sources: tuple[str, ...]) -> Step:
    """A plot of documents."""
    files = " ".join(f"results/{source}.json" for source in sources)
    line = f"flashhead {command} --from {files} --plot out/{name}.svg"
    plot = (f"{name}.svg",)
    fields = {"documents": plot, "needs": ("plots",), "models": (), "minutes": 0.2}
    return step(f"draw-{name}", line, after=sources, **fields)
