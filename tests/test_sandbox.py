"""What a model wrote does no harm, and counts as failed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flashhead.errors import FlashHeadError
from flashhead.evaluate.suite import sandbox
from flashhead.evaluate.suite.sandbox import Limits, passes

needs_filter = pytest.mark.skipif(
    sandbox.filter_table() is None, reason="no filter of system calls for this processor"
)
LIMITS = Limits(cpu_seconds=1, wall_seconds=4.0, memory_bytes=2**28)


@needs_filter
def test_an_honest_program_passes_and_a_wrong_one_does_not():
    """Catches a filter so tight that the standard library does not work under it."""
    honest = """
import collections, datetime, decimal, functools, hashlib, itertools, math, random, re, string
from typing import List, Optional
assert hashlib.md5(b"a").hexdigest().startswith("0cc1")
assert re.findall(r"\\d+", "a1b22") == ["1", "22"]
assert sorted(random.sample(range(5), 5)) == list(range(5))
assert datetime.date(2024, 2, 29).weekday() == 3 and datetime.datetime.now().year > 2000
print("printing is no crime")
"""
    assert passes(honest)
    assert not passes(honest + "assert 1 == 2")
    assert not passes("this is not Python")


@needs_filter
@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time\ntime.sleep(60)",
        "x = [0] * 10**9",
        "s = 'x'\nwhile True: s += s",
        "def f(): f()\nimport sys\nsys.setrecursionlimit(10**9)\nf()",
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass",
    ],
    ids=["loop", "sleep", "memory", "growing memory", "recursion", "ignores signals"],
)
def test_time_and_memory_are_limited(program):
    """Catches a limit that is not set: the test would take a minute, or all memory."""
    start = time.perf_counter()
    assert not passes(program, LIMITS)
    assert time.perf_counter() - start < 30


@needs_filter
def test_a_fork_bomb_starts_no_process(tmp_path):
    """Catches a filter without fork, clone, clone3 or threads: the child would leave a trace."""
    bomb = """
import os
started = 0
for call in (os.fork, os.forkpty, getattr(os, "vfork", os.fork)):
    try:
        call()
        started += 1
    except OSError:
        pass
import _thread
try:
    _thread.start_new_thread(lambda: None, ())
    started += 1
except RuntimeError:
    pass
try:
    os.execv("/bin/true", ["true"])
except OSError:
    pass
assert started == 0
"""
    assert passes(bomb, LIMITS)
    assert not passes("import os\nwhile True: os.fork()", LIMITS)


@needs_filter
def test_files_outside_survive(tmp_path):
    """Catches a program that may delete, truncate, rename, create, link or chmod."""
    canary = tmp_path / "canary"
    canary.write_text("alive")
    tmp_path.chmod(0o777)
    canary.chmod(0o666)
    folder, path = repr(str(tmp_path)), repr(str(canary))
    attempts = f"""
import os
done = []
for name, call in {{
    "remove": lambda: os.remove({path}),
    "rmdir": lambda: os.rmdir({folder}),
    "truncate": lambda: os.truncate({path}, 0),
    "write": lambda: open({path}, "w"),
    "append": lambda: open({path}, "a"),
    "update": lambda: open({path}, "r+"),
    "create": lambda: open({folder} + "/new", "x"),
    "rename": lambda: os.rename({path}, {path} + "2"),
    "mkdir": lambda: os.mkdir({folder} + "/dir"),
    "symlink": lambda: os.symlink({path}, {folder} + "/link"),
    "link": lambda: os.link({path}, {folder} + "/hard"),
    "chmod": lambda: os.chmod({path}, 0),
    "utime": lambda: os.utime({path}),
    "own folder": lambda: open("mine", "w"),
}}.items():
    try:
        call()
        done.append(name)
    except OSError:
        pass
assert not done, done
assert open({path}).read() == "alive"
"""
    # the folder of a test is root's own: pytest's parents are closed to nobody
    for parent in list(tmp_path.parents)[:3]:
        if parent.stat().st_uid == os.geteuid() and str(parent).startswith("/tmp/pytest"):
            parent.chmod(0o755)
    assert passes(attempts, LIMITS)
    assert canary.read_text() == "alive"
    assert [p.name for p in tmp_path.iterdir()] == ["canary"]
    assert canary.stat().st_mode & 0o777 == 0o666


@needs_filter
def test_no_network_and_no_other_process():
    """Catches sockets, signals to the parent, and new privileges."""
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    attempts = f"""
import os, socket, signal
done = []
for name, call in {{
    "socket": lambda: socket.socket(),
    "unix": lambda: socket.socket(socket.AF_UNIX),
    "pair": lambda: socket.socketpair(),
    "connect": lambda: socket.socket().connect(("127.0.0.1", 80)),
    "kill": lambda: os.kill({victim.pid}, signal.SIGKILL),
    "killpg": lambda: os.killpg(os.getppid(), signal.SIGKILL),
    "root": lambda: os.setuid(0),
    "nice": lambda: os.setpriority(os.PRIO_PROCESS, {victim.pid}, 19),
    "chroot": lambda: os.chroot("/"),
    "session": lambda: os.setsid(),
}}.items():
    try:
        call()
        done.append(name)
    except OSError:
        pass
assert not done, done
"""
    try:
        assert passes(attempts, LIMITS)
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


@needs_filter
@pytest.mark.parametrize(
    "program",
    [
        "import os\nos._exit(0)",
        "raise SystemExit(0)",
        "import os\nfor fd in range(64):\n try: os.close(fd)\n except OSError: pass",
        "import os\nfor n in range(3, 9):\n try: os.write(n, b'x' * 10**6)\n except OSError: pass",
    ],
    ids=["_exit", "SystemExit", "closes", "floods"],
)
def test_leaving_early_or_flooding_the_answer_is_no_pass(program):
    """Catches a verdict by exit code, and a parent that reads without end."""
    assert not passes(program, LIMITS)


def test_without_isolation_nothing_runs(monkeypatch, tmp_path):
    """Catches a silent fallback: the program must not have run."""
    trace = tmp_path / "trace"
    monkeypatch.setattr(sandbox, "filter_table", lambda: None)
    with pytest.raises(FlashHeadError, match=r"cannot isolate.*--unsafe-code"):
        passes(f"open({str(trace)!r}, 'w')")
    assert not trace.exists()


@needs_filter
def test_a_refused_filter_is_an_error_and_nothing_runs(monkeypatch):
    """Catches a child that goes on when the kernel takes no filter."""
    table = sandbox.filter_table()
    monkeypatch.setattr(sandbox, "filter_table", lambda: {**table, "allowed": [0] * 8_000})
    with pytest.raises(FlashHeadError, match=r"refused|cannot isolate"):
        passes("pass")


def test_unsafe_code_keeps_limits(tmp_path):
    """Catches `--unsafe-code` without any limit, and one that does not run at all."""
    trace = tmp_path / "trace"
    assert passes(f"open({str(trace)!r}, 'w').close()", LIMITS, isolated=False)
    assert trace.exists()
    assert not passes("while True: pass", LIMITS, isolated=False)


def test_the_child_needs_nothing_of_flashhead():
    """Catches an import of the library in the process that runs generated code."""
    text = Path(sandbox.__file__).with_name("sandbox_child.py").read_text()
    assert "flashhead." not in text.split('"""', 2)[2]
