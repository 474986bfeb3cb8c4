"""The HTTP server: one page, what it needs to know, and a stream of tokens.

    GET  /            the page; with ?token=T a cookie is set first
    GET  /info        model, head and limits
    POST /generate    JSON in, one JSON event a line out: waiting, start, token ..., end

A client that goes away stops its decode after the current token.
"""

import base64
import hashlib
import http.server
import importlib.resources
import re
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any

from flashhead.errors import FlashHeadError
from flashhead.options import Sampling
from flashhead.playground.access import Access
from flashhead.playground.handler import Handler
from flashhead.playground.requests import Limits
from flashhead.playground.turns import Turns

if TYPE_CHECKING:
    from flashhead.playground.decode import SideBySide

MOST_CONNECTIONS = 64
WARM_UP = "Once"


class PlaygroundServer(http.server.ThreadingHTTPServer):
    """Bound at once; requests are answered after `start`.

    Args:
        host: address to bind to.
        port: 0: any that is free.
        token: that clients must know, or None for loopback addresses.
        limits: of a request.

    Raises:
        FlashHeadError: no token where others can reach the address, or it cannot be bound to.
    """

    daemon_threads = True

    def __init__(self, host: str, port: int, token: str | None, limits: Limits) -> None:
        self.access, self.limits = Access(host, token), limits
        self.turns = Turns()
        self.side_by_side: SideBySide | None = None
        self.info: dict[str, Any] = {}
        self.page, self.policy = _page()
        self._places = threading.BoundedSemaphore(MOST_CONNECTIONS)
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise FlashHeadError(f"--host {host} --port {port}: {reason}") from error

    def server_bind(self) -> None:
        """Bind, without the look-up of a name that `HTTPServer` does."""
        socket_address: Any = self.server_address
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(socket_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    @property
    def url(self) -> str:
        """Of the page."""
        host = str(self.server_address[0])
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}/"

    def start(self, side_by_side: "SideBySide", name: str) -> None:
        """Give it the model, warmed up by a few tokens (kernels are compiled); then
        `serve_forever`.
        """
        head = side_by_side.head
        ids = side_by_side.encode(WARM_UP, True, 2, 0.0)
        self.turns.warm_up(lambda: side_by_side.events(ids, 2, Sampling()))
        self.side_by_side = side_by_side
        self.info = {
            "model": name,
            "vocab_size": head.out_features,
            "head_bytes": head.dense_bytes,
            "searches": side_by_side.searches,
            "has_template": side_by_side.has_template,
            "samples": side_by_side.samples,
            "max_prompt_chars": self.limits.prompt_chars,
            "max_new_tokens": self.limits.new_tokens,
        }

    def close(self) -> None:
        """Stop what runs, and let the port go."""
        self.turns.close()
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own, unless there are too many."""
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """As the base class, and give the place back."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error; anything else shows its traceback."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def _page() -> tuple[bytes, str]:
    """The page, and a policy under which its own style and script run and nothing else."""
    text = importlib.resources.files("flashhead.playground").joinpath("page.html").read_bytes()
    hashes = {}
    for tag in (b"style", b"script"):
        (inner,) = re.findall(b"<%s>(.*?)</%s>" % (tag, tag), text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inner).digest()).decode()
        hashes[tag.decode()] = f"'sha256-{digest}'"
    return text, (
        f"default-src 'none'; style-src {hashes['style']}; script-src {hashes['script']}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
