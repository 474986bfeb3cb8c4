"""A vLLM server of one's own, for tests and benchmarks: started, waited for, ended without a rest.

The server leads a session of its own, so Ctrl-C at a terminal reaches it only from here. What it
starts (the engine, its workers, the resource tracker of multiprocessing) stays in its process
group. `stop` sends SIGTERM to the server, which ends its engine and workers in order, and SIGKILL
to whatever is left of the group after a while. Where this process dies first, Linux sends the
server SIGTERM.

Nothing of vLLM is imported here, and requests go to 127.0.0.1 without any proxy.
"""

import contextlib
import ctypes
import http.client
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from flashhead.integrations.vllm.plugin import WORKER

HOST = "127.0.0.1"
START_SECONDS = 600.0
STOP_SECONDS = 30.0
"""The server has so long to end after SIGTERM."""
WORKERS_SECONDS = 5.0
"""What it has started has so long to end after it."""
REQUEST_SECONDS = 180.0
HEALTH_SECONDS = 20.0
ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",  # brings /collective_rpc
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
_PR_SET_PDEATHSIG = 1
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerError(RuntimeError):
    """The server did not start, or has ended; the message closes with the end of its log."""


class Server:
    """`vllm serve` on a free port, as a context manager.

    Args:
        model: folder.
        arguments: more of them for `vllm serve`.
        log: file that takes what the server prints.
        environment: variables to set, or with None to unset, for the server.
        start_seconds: how long it may take to answer.
    """

    def __init__(
        self,
        model: str | Path,
        *arguments: str,
        log: Path,
        environment: Mapping[str, str | None] | None = None,
        start_seconds: float = START_SECONDS,
    ) -> None:
        self.port = _free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.command = [
            *serve_command(str(model)),
            *("--host", HOST, "--port", str(self.port), "--worker-extension-cls", WORKER),
            *arguments,
        ]
        self.log, self.start_seconds = log, start_seconds
        values = {**os.environ, **ENVIRONMENT, **(environment or {})}
        self._environment = {name: value for name, value in values.items() if value is not None}
        self._process: subprocess.Popen[bytes] | None = None
        self._group: int | None = None

    def __enter__(self) -> "Server":
        try:
            self.start()
        except BaseException:  # Ctrl-C as well: no server without somebody to end it
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            ServerError: it ended, or has not answered in time.
        """
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        self._group = self._process.pid
        deadline = time.monotonic() + self.start_seconds
        while not self.is_healthy():
            self.require_running()
            if time.monotonic() > deadline:
                raise ServerError(f"no answer in {self.start_seconds:.0f} s\n{self.log_tail()}")
            time.sleep(0.25)

    def stop(self) -> None:
        """End the server and everything that it has started."""
        if self._process is None:
            return
        process, self._process = self._process, None
        try:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            _wait_for_end(process.pid)
        finally:  # a second Ctrl-C as well
            if group_members(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            _wait_for_end(process.pid)

    def processes(self) -> list[int]:
        """Process ids of the server and all that it has started; [] once it was stopped."""
        return [] if self._group is None else group_members(self._group)

    def require_running(self) -> None:
        """Raise a `ServerError` if the server has ended."""
        code = None if self._process is None else self._process.poll()
        if self._process is None or code is not None:
            raise ServerError(f"the server has ended ({code})\n{self.log_tail()}")

    def is_healthy(self) -> bool:
        """Whether it answers /health, which asks the engine too."""
        try:
            return self.send("GET", "/health", timeout_s=HEALTH_SECONDS)[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def send(
        self,
        method: str,
        path: str,
        data: bytes | None = None,
        timeout_s: float = REQUEST_SECONDS,
    ) -> tuple[int, bytes]:
        """One request as it is; the status and the body of its answer, an error's as well.

        Raises:
            OSError: no answer.
        """
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}, method=method
        )
        try:
            with _OPENER.open(request, timeout=timeout_s) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def post(self, path: str, body: Any) -> Any:
        """JSON out, JSON in.

        Raises:
            ServerError: another status than 200.
        """
        status, answer = self.send("POST", path, json.dumps(body).encode())
        if status != 200:
            raise ServerError(f"{path}: {status} {answer.decode(errors='replace')[:500]}")
        return json.loads(answer)

    def statistics(self) -> list[dict[str, Any]]:
        """Counters of the heads that FlashHead serves (`worker.py`); [] where it is disabled."""
        answer = self.post("/collective_rpc", {"method": "flashhead_statistics"})
        return [head for worker in answer["results"] for head in worker]

    def log_text(self) -> str:
        """All that the server has printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def log_tail(self, lines: int = 60) -> str:
        """The last lines of it."""
        return "\n".join(self.log_text().splitlines()[-lines:])


def serve_command(model: str) -> list[str]:
    """The program that is `vllm serve MODEL`, with this interpreter."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        # a CPU build by another name: `vllm serve` looks its own version up and fails
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]


def group_members(group: int) -> list[int]:
    """Processes of a group that have not ended (Linux; none elsewhere)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            # pid (name) state parent group ...; a name may hold anything
            state, _, owner = stat.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if int(owner) == group and state != "Z":
                found.append(int(stat.parent.name))
    return sorted(found)


def _wait_for_end(group: int) -> None:
    deadline = time.monotonic() + WORKERS_SECONDS
    while group_members(group) and time.monotonic() < deadline:
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
