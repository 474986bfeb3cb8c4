"""One HTTP request of the playground: its checks, and the stream of tokens."""

import contextlib
import http.server
import json
import queue
import select
import socket
import traceback
import urllib.parse
from collections.abc import Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from flashhead.errors import FlashHeadError
from flashhead.playground.requests import RefusedError, parse
from flashhead.playground.turns import Job

if TYPE_CHECKING:
    from flashhead.playground.server import PlaygroundServer

POLL_SECONDS = 0.1
SOCKET_SECONDS = 15.0
"""After which a client that neither sends nor reads is let go."""
MOST_DISCARDED_BYTES = 2**20
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Connection": "close",
}


class Handler(http.server.BaseHTTPRequestHandler):
    """One request; the connection ends with its answer."""

    server: "PlaygroundServer"
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "flashhead", ""
    timeout = SOCKET_SECONDS

    def log_message(self, *_args: Any) -> None:
        """Nothing: a request line may hold the token."""

    def do_GET(self) -> None:
        """The page, or what it needs to know."""
        with self._refusing():
            path, _, query = self.path.partition("?")
            if path == "/" and (given := urllib.parse.parse_qs(query).get("token")):
                self._require_host()
                self._let_in(given[0])
                return
            self._require_access()
            if path == "/":
                self._send(200, "text/html; charset=utf-8", self.server.page)
            elif path == "/info":
                self._send(200, "application/json", json.dumps(self.server.info).encode())
            else:
                raise RefusedError(404, "no such page")

    def do_POST(self) -> None:
        """A stream of tokens."""
        with self._refusing():
            self._require_access()
            if self.path.partition("?")[0] != "/generate":
                raise RefusedError(404, "no such page")
            self._stream(self._submit())

    def _submit(self) -> Job:
        """Check a request and queue it."""
        server = self.server
        if not server.access.same_origin(self.headers):
            raise RefusedError(403, "wanted a request of this server's own page")
        if self.headers.get_content_type() != "application/json":
            raise RefusedError(415, "wanted Content-Type: application/json")
        request = parse(self._body(), server.limits)
        decoder = server.side_by_side
        assert decoder is not None
        try:
            ids = decoder.encode(
                request.prompt, request.raw, request.new_tokens, request.sampling.temperature
            )
        except FlashHeadError as error:
            raise RefusedError(400, str(error)) from error
        try:
            return server.turns.submit(
                lambda: decoder.events(ids, request.new_tokens, request.sampling)
            )
        except FlashHeadError as error:
            raise RefusedError(503, str(error)) from error

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdigit()):
            raise RefusedError(411, "wanted a Content-Length")
        size, most = int(length[:20]), self.server.limits.body_bytes
        if size > most:
            self.rfile.read(min(size, MOST_DISCARDED_BYTES))  # else the answer may be lost
            raise RefusedError(413, f"{size:,} bytes, wanted at most {most:,}")
        return self.rfile.read(size)

    def _stream(self, job: Job) -> None:
        """Pass events on as they come, and stop the work when the client goes."""
        try:
            chunked = {"Transfer-Encoding": "chunked"} if self._chunked else {}
            self._head(200, "application/x-ndjson", chunked)
            shown = None
            while True:
                try:
                    event = job.events.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    ahead = self.server.turns.ahead(job)
                    if ahead and ahead != shown:
                        self._chunk({"event": "waiting", "ahead": ahead})
                        shown = ahead
                    if self._has_gone():
                        return
                    continue
                if event is None:
                    break
                self._chunk(event)
                if self._has_gone():
                    return
            self._chunk(_last_event(job))
            if self._chunked:
                self.wfile.write(b"0\r\n\r\n")
        finally:
            job.cancelled.set()

    def _chunk(self, event: dict[str, Any]) -> None:
        line = json.dumps(event).encode() + b"\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line) if self._chunked else line)

    @property
    def _chunked(self) -> bool:
        """HTTP/1.0 (some proxies speak it) ends a stream by closing."""
        return self.request_version != "HTTP/1.0"

    def _has_gone(self) -> bool:
        if not select.select([self.connection], [], [], 0)[0]:
            return False
        return self.connection.recv(1, socket.MSG_PEEK) == b""

    def _require_host(self) -> None:
        if not self.server.access.knows_host(self.headers.get("Host")):
            raise RefusedError(421, "Host: wanted a name of this server")

    def _require_access(self) -> None:
        self._require_host()
        if not self.server.access.entitled(self.headers, self.server.server_port):
            raise RefusedError(401, "wanted the token: open /?token=TOKEN once")

    def _let_in(self, token: str) -> None:
        """Trade the token of an address for a cookie, so that the address loses it."""
        if not self.server.access.accepts_token(token):
            raise RefusedError(401, "token: not this server's")
        cookie = self.server.access.cookie(self.server.server_port)
        self._send(303, "text/plain", b"", {"Location": "/", "Set-Cookie": cookie})

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        """Answer a refused request with its one line."""
        try:
            yield
        except RefusedError as refused:
            body = json.dumps({"error": str(refused)}).encode()
            self._send(refused.status, "application/json", body)

    def _send(
        self, status: int, kind: str, body: bytes, more: dict[str, str] | None = None
    ) -> None:
        self._head(status, kind, {"Content-Length": str(len(body)), **(more or {})})
        self.wfile.write(body)

    def _head(self, status: int, kind: str, more: dict[str, str]) -> None:
        self.send_response(HTTPStatus(status))
        policy = {"Content-Security-Policy": self.server.policy}
        for name, value in {"Content-Type": kind, **HEADERS, **policy, **more}.items():
            self.send_header(name, value)
        self.end_headers()


def _last_event(job: Job) -> dict[str, Any]:
    """What a stream ends with."""
    error = job.error()
    if error is None:
        return {"event": "end", "stopped": job.cancelled.is_set()}
    if isinstance(error, FlashHeadError):
        return {"event": "error", "message": " ".join(str(error).split())}
    traceback.print_exception(error)
    return {"event": "error", "message": "a bug: the server's terminal has its traceback"}
