"""A headless Chromium for tests, driven over its DevTools pipe; no driver package is needed."""

import base64
import contextlib
import fcntl
import json
import os
import selectors
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
TIMEOUT_SECONDS = 60.0
CLOSE_SECONDS = 10.0


def find_browser() -> str:
    """The browser's program. Without one the test is skipped, in CI it fails."""
    for name in NAMES:
        path = shutil.which(name)
        if path:
            return path
    if os.environ.get("CI"):
        pytest.fail("no Chromium in CI: .ci/run installs it")
    pytest.skip("no Chromium: apt-get install chromium")


class Page:
    """One tab.

    Args:
        process: the browser.
        pipes: to write commands to and to read answers from.
    """

    def __init__(self, process: subprocess.Popen[bytes], pipes: tuple[int, int]) -> None:
        self._process, (self._to, self._from) = process, pipes
        self._buffer, self._number, self._session = b"", 0, None
        self.problems: list[str] = []
        self.requests: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def wait_for(self, event: str) -> None:
        """Wait for an event of the page."""
        while self._read().get("method") != event:
            pass

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, url: str, width: int, height: int = 900, dark: bool = False) -> None:
        """Load a page at a width."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=url)
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while self.evaluate("document.readyState") != "complete":
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _read(self) -> dict[str, Any]:
        with selectors.DefaultSelector() as selector:
            selector.register(self._from, selectors.EVENT_READ)
            while b"\0" not in self._buffer:
                assert selector.select(TIMEOUT_SECONDS), "the browser does not answer"
                part = os.read(self._from, 1 << 16)
                assert part, "the browser has ended"
                self._buffer += part
        line, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(line)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method: str | None, parameters: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.problems.append(str(parameters["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning"):
            self.problems.append(str(parameters["args"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.problems.append(str(parameters["entry"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])


@contextlib.contextmanager
def browser_page() -> Iterator[Page]:
    """A new browser with one tab, in a profile of its own."""
    program = find_browser()
    to_browser, from_test = os.pipe()
    from_browser, to_test = os.pipe()

    def place() -> None:  # the browser reads commands at 3 and answers at 4
        high = [fcntl.fcntl(pipe, fcntl.F_DUPFD, 100) for pipe in (to_browser, to_test)]
        for number, pipe in zip((3, 4), high, strict=True):
            os.dup2(pipe, number)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = [
            *("--headless=new", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu"),
            *("--no-sandbox", "--disable-dev-shm-usage", f"--user-data-dir={profile}"),
        ]
        process = subprocess.Popen(
            [program, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=place,
            pass_fds=(3, 4),
            close_fds=True,
        )
        os.close(to_browser)
        os.close(to_test)
        try:
            yield Page(process, (from_test, from_browser))
        finally:  # killed at once, its children would still write to the profile
            with contextlib.suppress(OSError):
                os.write(from_test, b'{"id": 0, "method": "Browser.close"}\0')
            try:
                process.wait(CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(from_test)
            os.close(from_browser)
