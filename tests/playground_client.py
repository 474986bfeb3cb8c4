"""A playground's server on a free port, and clients of it."""

import contextlib
import http.client
import json
import threading
import time

from flashhead.playground.requests import Limits
from flashhead.playground.server import PlaygroundServer

PROMPT = "w5 w9 w30 w7"
SECONDS = 60.0


@contextlib.contextmanager
def serving(decoder, host="127.0.0.1", token=None, limits=None):
    server = PlaygroundServer(host, 0, token, limits or Limits())
    server.start(decoder, "tiny")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.close()
        thread.join()


def ask(server, method="POST", path="/generate", body=None, headers=None):
    """Status, headers and text of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=SECONDS)
    text = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    given = {"Content-Type": "application/json"} if method == "POST" else {}
    connection.request(method, path, text, {**given, **(headers or {})})
    answer = connection.getresponse()
    found = answer.status, answer.headers, answer.read().decode()
    connection.close()
    return found


def events_of(text):
    return [json.loads(line) for line in text.splitlines()]


def side(events, name):
    return [event for event in events if event["event"] == "token" and event["side"] == name]


class Opened:
    """A request whose answer is read as it comes."""

    def __init__(self, server, tokens):
        self.connection = http.client.HTTPConnection(
            "127.0.0.1", server.server_port, timeout=SECONDS
        )
        body = json.dumps({"prompt": PROMPT, "max_new_tokens": tokens})
        self.connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
        self.answer = self.connection.getresponse()

    def event(self):
        return json.loads(self.answer.readline())

    def leave(self):
        self.answer.close()
        self.connection.close()


def wait_until(holds):
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
