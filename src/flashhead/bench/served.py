"""Tokens a second of vLLM, the dense head against FlashHead: two engines, interleaved.

Both engines are loaded, each in a process of its own; in each round the one and then the other
decodes the same prompts, in turn the one or the other first. What counts is the median over the
rounds of the two times' ratio, which other load on the machine hardly moves. The processes of the
one that waits are stopped (SIGSTOP): vLLM's would spin, and take the other's cores.
"""

import contextlib
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from tqdm import tqdm

from flashhead.environment import provenance
from flashhead.errors import FlashHeadError

SIDES = ("dense", "flashhead")
_CHILD = "flashhead.integrations.vllm.time_decode"


def bench_served(
    model: str,
    prompts: Sequence[str],
    *,
    batches: Sequence[int],
    tokens: int,
    repeats: int,
    engine: dict[str, Any],
) -> dict[str, Any]:
    """Time greedy decoding in vLLM.

    Args:
        model: folder or hub id, given to both engines.
        prompts: texts; a batch takes the first ones, again from the start where it is larger.
        batches: requests at once.
        tokens: generated a request.
        repeats: timed rounds a batch, after one that warms up.
        engine: further arguments of `vllm.LLM`.

    Returns:
        JSON document.

    Raises:
        FlashHeadError: an engine failed, or FlashHead did not search.
    """
    job = {"model": model, "engine": engine, "prompts": list(prompts), "tokens": tokens}
    with contextlib.ExitStack() as stack:
        sides: dict[str, _Engine] = {}
        versions = {}
        for side in SIDES:  # one after the other: they share the cores
            sides[side] = stack.enter_context(_engine(side, job))
            versions[side] = sides[side].answer()
        bar = stack.enter_context(tqdm(total=len(batches) * (repeats + 1), desc="rounds"))
        rows = [_time(sides, batch, repeats, tokens, bar) for batch in batches]
    return {
        "benchmark": "vllm",
        "model": model,
        "vllm": versions["dense"]["vllm"],
        "engine": engine,
        "tokens": tokens,
        "repeats": repeats,
        "rows": rows,
        **provenance(),
    }


def format_served(document: dict[str, Any]) -> str:
    """The table, ready for the screen."""
    lines = [
        f"{'batch':>6}{'dense tok/s':>13}{'FlashHead':>11}{'faster':>9}{'p10-p90':>13}"
        f"{'searched':>10}{'bytes':>8}{'same texts':>12}"
    ]
    for row in document["rows"]:
        spread = f"{row['speedup_p10']:.2f}-{row['speedup_p90']:.2f}"
        lines.append(
            f"{row['batch']:>6}{row['dense_tok_per_sec']:>13.1f}"
            f"{row['flashhead_tok_per_sec']:>11.1f}{row['speedup']:>8.2f}x{spread:>13}"
            f"{row['searched_fraction']:>10.0%}{row['bytes_fraction']:>8.1%}"
            f"{row['same_texts']:>8} of {row['batch']}"
        )
    return "\n".join(lines)


def _time(
    sides: dict[str, "_Engine"], batch: int, repeats: int, tokens: int, bar: Any
) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    last: dict[str, Any] = {}
    before: dict[str, Any] = {}
    for number in range(-1, repeats):
        for side in SIDES if number % 2 else reversed(SIDES):
            last[side] = sides[side].ask(str(batch))
            if number >= 0:  # the first round compiles and warms up
                seconds[side].append(last[side]["seconds"])
        if number < 0:
            before = _counted(last["flashhead"]["heads"])
        bar.update()
    after = _counted(last["flashhead"]["heads"])
    searched = after["searched"] - before["searched"]
    dense = after["dense"] - before["dense"]
    ratios = [d / f for d, f in zip(seconds["dense"], seconds["flashhead"], strict=True)]
    deciles = statistics.quantiles(ratios, n=10, method="inclusive") if repeats > 1 else ratios * 9
    same = zip(last["dense"]["tokens"], last["flashhead"]["tokens"], strict=True)
    return {
        "batch": batch,
        "dense_tok_per_sec": batch * tokens / statistics.median(seconds["dense"]),
        "flashhead_tok_per_sec": batch * tokens / statistics.median(seconds["flashhead"]),
        "speedup": statistics.median(ratios),
        "speedup_p10": deciles[0],
        "speedup_p90": deciles[-1],
        "searched_fraction": searched / max(1, searched + dense),
        "bytes_fraction": (after["read"] - before["read"]) / max(1, searched),
        "same_texts": sum(a == b for a, b in same),
        "seconds": seconds,
    }


def _counted(heads: list[dict[str, Any]]) -> dict[str, float]:
    """Rows searched and dense so far, and the sum of the shares of bytes that searches read."""
    searching = [head for head in heads if "searched_rows" in head]
    if not searching:
        raise FlashHeadError("no head of the engine has an index: FlashHead does not serve")
    return {
        "searched": sum(head["searched_rows"] for head in searching),
        "dense": sum(head["dense_rows"] for head in searching),
        "read": sum(head["searched_rows"] * head["bytes_fraction"] for head in searching),
    }


@dataclasses.dataclass(frozen=True)
class _Engine:
    """A child process that holds an engine, and all that it has started.

    Args:
        pipe: to it.
        group: its process group.
    """

    pipe: Connection
    group: int

    def ask(self, question: str) -> dict[str, Any]:
        """Let it run until it has answered."""
        os.killpg(self.group, signal.SIGCONT)
        self.send(question)
        return self.answer()

    def send(self, message: str) -> None:
        """Say something; `_EngineEndedError` if nobody hears it."""
        try:
            self.pipe.send_bytes(message.encode())
        except ConnectionError as error:
            raise _EngineEndedError(self) from error

    def answer(self) -> dict[str, Any]:
        """Wait for an answer, then stop it."""
        try:
            answer: dict[str, Any] = json.loads(self.pipe.recv_bytes())
        except (EOFError, ConnectionError) as error:
            raise _EngineEndedError(self) from error
        os.killpg(self.group, signal.SIGSTOP)
        return answer


class _EngineEndedError(Exception):
    """An engine's process is gone, or going."""

    def __init__(self, engine: _Engine) -> None:
        super().__init__("the engine ended")
        self.engine = engine


@contextlib.contextmanager
def _engine(side: str, job: dict[str, Any]) -> Iterator[_Engine]:
    """An engine in a process group of its own, which ends with the context."""
    enabled = "1" if side == "flashhead" else "0"
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    ours, theirs = Pipe()
    with tempfile.TemporaryFile("w+") as log, ours:
        child = subprocess.Popen(
            [sys.executable, "-m", _CHILD, str(theirs.fileno())],
            env=defaults | os.environ | {"FLASHHEAD_ENABLED": enabled},
            stdout=log,
            stderr=log,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        print(f"loading the {side} engine ...", file=sys.stderr, flush=True)
        engine = _Engine(ours, child.pid)
        try:
            engine.send(json.dumps(job))
            yield engine
        except _EngineEndedError as error:
            if error.engine is not engine:
                raise
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(20)  # its workers end first, and the log is whole
            log.seek(0)
            raise FlashHeadError(f"the {side} engine ended: {_cause(log.read())}") from error
        finally:
            _end(child)


def _end(child: "subprocess.Popen[bytes]") -> None:
    """End an engine and its workers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGCONT)
    for number, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 5)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(patience)


def _cause(log: str) -> str:
    """The line of a log that says what went wrong."""
    lines = [line for line in log.splitlines() if "Error" in line]
    return lines[-1] if lines else (log.splitlines() or ["it said nothing"])[-1]
