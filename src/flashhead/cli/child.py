"""A child process that does not outlive this one: signals are passed on, nothing is left behind.

The child leads a session of its own, so that Ctrl-C reaches it once, from here, and not from the
terminal as well, and so that all that it starts can be ended as one group. On Linux what it leaves
behind becomes a child of this process (and is waited for), and it is told when this process dies.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from flashhead.errors import FlashHeadError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
GRACE_SECONDS = 10.0
"""What the child left behind has so long to end after SIGTERM."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def run_child(name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run a command to its end.

    A signal is passed on, and the child's end is waited for; a second one kills the child.

    Args:
        name: of the command, for errors.
        command: program and arguments.
        environment: variables set beside those of this process.

    Raises:
        KeyboardInterrupt: Ctrl-C, once the child has ended. After another signal this process dies
            of that signal instead.
        FlashHeadError: the child failed.
    """
    received: list[int] = []
    child = _start(command, environment)

    def pass_on(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            child.send_signal(number)
        else:
            _signal_group(child.pid, signal.SIGKILL)

    # a signal that is ignored stays so: nohup, or a job in the background of a script
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in heard}
    try:
        code = child.wait()
        _end_group(child.pid)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        _die_of(received[0])
    if code != 0:
        how = f"exit code {code}" if code > 0 else f"signal {-code} ({signal.strsignal(-code)})"
        raise FlashHeadError(f"{name} ended with {how}")


def _start(command: Sequence[str], environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    def die_with_parent() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


def _end_group(group: int) -> None:
    """End what is left of a process group whose leader has ended."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        _signal_group(group, number)
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline:
            try:
                pid, _ = os.waitpid(-group, os.WNOHANG)
            except ChildProcessError:  # no process of this group is left
                return
            if pid == 0:
                time.sleep(0.05)


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _die_of(number: int) -> None:
    """End as the signal ends a process that does not handle it: whoever waits for us sees it."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
