"""Programs that a model wrote, each in a process that can compute and read, and nothing else.

Isolation is a seccomp filter (Linux 3.5 or newer, x86_64 or aarch64), which needs no privilege and
works inside a plain container; `sandbox_child.py` says what it forbids. Where it is refused nothing
runs, unless the caller says so. A filter guards the machine, not the score: a program that means to
can still find the word that counts as a pass.
"""

import dataclasses
import functools
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from flashhead.errors import FlashHeadError
from flashhead.evaluate.suite.syscalls import filter_table

MOST_ANSWER_BYTES = 4096
LATE = b"late"
"""Stands for an answer that took too long, or was too long."""
_PROBE = """
import os, socket
def refused(call):
    try:
        call()
    except PermissionError:
        return True
    return False
assert refused(os.fork) and refused(lambda: open("probe", "w")) and refused(socket.socket)
assert refused(lambda: os.unlink("here")) and refused(lambda: os.kill(os.getppid(), 0))
"""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one program may use.

    Args:
        cpu_seconds: of the processor, at least 1.
        wall_seconds: of the clock.
        memory_bytes: of address space, the interpreter's own (about 50 MB) included.
    """

    cpu_seconds: int = 5
    wall_seconds: float = 20.0
    memory_bytes: int = 2**30


def passes(program: str, limits: Limits = Limits(), *, isolated: bool = True) -> bool:
    """Whether a program runs to its end without an exception.

    Args:
        program: Python, with the tests that it must pass.
        limits: one that is exceeded counts as failed.
        isolated: False: limits of time and memory are all that holds it (`--unsafe-code`).

    Raises:
        FlashHeadError: isolation was refused; nothing has run.
    """
    table = filter_table() if isolated else None
    if isolated and table is None:
        raise FlashHeadError(_refusal(f"no filter of system calls for {sys.platform}"))
    secret = secrets.token_hex(16)
    job = {
        "program": program,
        "secret": secret,
        "filter": table,
        "limits": {
            "AS": limits.memory_bytes,
            "CPU": limits.cpu_seconds,
            "FSIZE": 0 if isolated else 2**20,
            "NOFILE": 64,
            "CORE": 0,
        },
    }
    answer = _run(json.dumps(job).encode(), limits.wall_seconds)
    if answer.startswith(b"refused "):
        raise FlashHeadError(_refusal(answer[8:].decode("utf-8", "replace").strip()))
    if not answer.startswith(b"ready\n") and answer != LATE:
        raise FlashHeadError(_refusal("the process ended before its doors were shut"))
    return answer == b"ready\n" + secret.encode()


@functools.cache
def require_isolation() -> None:
    """Try the isolation on a program that tests it from inside.

    Raises:
        FlashHeadError: it does not hold here.
    """
    if not passes(_PROBE):
        raise FlashHeadError(_refusal("a program could fork, write, signal or open a socket"))


def _refusal(reason: str) -> str:
    return (
        f"humaneval runs what the model wrote, and this machine cannot isolate it ({reason}); "
        "leave humaneval out, or accept the risk with --unsafe-code"
    )


def _run(job: bytes, wall_seconds: float) -> bytes:
    """Start the child in an empty folder, hand it the job, and take what it answers in time."""
    child = Path(__file__).with_name("sandbox_child.py")
    with tempfile.TemporaryDirectory(prefix="flashhead-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(child)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "LC_ALL": "C.UTF-8"},
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(job)
            process.stdin.close()
            return _answer(process.stdout.fileno(), time.monotonic() + wall_seconds)
        except BrokenPipeError:  # it ended before it had read the job
            return b""
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()


def _answer(pipe: int, deadline: float) -> bytes:
    """What comes through a pipe until it is closed, the deadline, or more than an answer has."""
    answer = b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while len(answer) <= MOST_ANSWER_BYTES:
            left = deadline - time.monotonic()
            if left <= 0 or not selector.select(left):
                break
            part = os.read(pipe, MOST_ANSWER_BYTES)
            if not part:
                return answer
            answer += part
    return LATE
