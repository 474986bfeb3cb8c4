"""What tests of a served model stand on: the server's beginning and end, and equal answers."""

import dataclasses
import sys
import time

import pytest

from flashhead.integrations.vllm.openai_answers import (
    Answer,
    Difference,
    ask_for_tokens,
    compare,
    read_answers,
)
from flashhead.integrations.vllm.serving import Server, ServerError, group_members

FAKE = """
import http.server, signal, subprocess, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def log_message(self, *_):
        pass

ignore = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(60)"
worker = subprocess.Popen([sys.executable, "-c", ignore], stdout=subprocess.PIPE)
worker.stdout.readline()
print("the fake is up", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def fake(tmp_path, script: str = FAKE, **options) -> Server:
    """A server whose program is a script, and whose worker does not care for SIGTERM."""
    server = Server(tmp_path, log=tmp_path / "server.log", **options)
    server.command = [sys.executable, "-c", script, str(server.port)]
    return server


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_is_left(tmp_path, monkeypatch) -> None:
    """Catches an engine or a worker that outlives its server."""
    monkeypatch.setattr("flashhead.integrations.vllm.serving.WORKERS_SECONDS", 0.2)
    with fake(tmp_path) as server:
        group = server.processes()[0]
        assert len(server.processes()) == 2
        assert server.send("GET", "/nothing")[0] == 404
    assert group_members(group) == server.processes() == []
    assert server.log_tail() == "the fake is up"
    with pytest.raises(ServerError, match="has ended"):
        server.require_running()


def test_server_that_does_not_start(tmp_path) -> None:
    """Catches a wait for a server that has ended, or without an end, and a message without why."""
    with (
        pytest.raises(ServerError, match=r"has ended \(3\)(?s:.*)no such model"),
        fake(tmp_path, "import sys; print('no such model', flush=True); sys.exit(3)"),
    ):
        pass
    started = time.monotonic()
    sleeper = fake(tmp_path, "import time; time.sleep(60)", start_seconds=0.5)
    with pytest.raises(ServerError, match="no answer in 0 s"), sleeper:
        pass
    assert time.monotonic() - started < 20
    assert sleeper.processes() == []


def response(tokens, tops, chat=False, **choice):
    """As vLLM writes it."""
    names = [f"token_id:{token}" for token in tokens]
    named = [{f"token_id:{token}": value for token, value in top.items()} for top in tops]
    own = [top[token] for token, top in zip(tokens, tops, strict=True)]
    choice = {"token_ids": tokens, "finish_reason": "length", **choice}
    if not chat:
        found = {"tokens": names, "token_logprobs": own, "top_logprobs": named}
        return {"choices": [{"text": "x", "logprobs": found, **choice}]}
    content = [
        {
            "token": name,
            "logprob": value,
            "top_logprobs": [{"token": t, "logprob": v} for t, v in top.items()],
        }
        for name, value, top in zip(names, own, named, strict=True)
    ]
    return {"choices": [{"message": {"content": "x"}, "logprobs": {"content": content}, **choice}]}


@pytest.mark.parametrize("chat", [False, True])
def test_answers_are_read(chat: bool) -> None:
    """Catches tokens and log-probabilities of another place or shape."""
    tops = ({4: -0.5, 9: -0.5}, {7: -0.1, 4: -3.0})
    (answer,) = read_answers(response([9, 7], tops, chat))
    assert answer == Answer("x", (9, 7), "length", (-0.5, -0.1), tops)
    path = "/v1/chat/completions" if chat else "/v1/completions"
    assert ask_for_tokens(path, {"n": 1})["logprobs"] == (True if chat else 5)


def test_differences_are_ties_or_errors() -> None:
    """Catches a wrong token that passes, and a tie of bf16 logits that does not."""
    tops = ({1: -0.1, 2: -2.0}, {3: -0.7, 4: -0.825, 5: -1.2}, {6: -0.2})
    dense = Answer("x", (1, 3, 6), "length", tops=tops)
    flash = Answer("x", (1, 3, 6), "length")

    def part(tokens, **changes) -> Difference | None:
        return compare([dense], dataclasses.replace(flash, tokens=tokens, **changes))

    assert part((1, 3, 6)) is None
    assert part((1, 4, 9)) == Difference(1, 3, 4, pytest.approx(0.125))
    assert part((1, 4, 9)).is_tie
    assert not part((1, 5, 6)).is_tie
    assert not part((2, 3, 6)).is_tie
    for tokens in ((1, 8, 6), (1, 3), (1, 3, 6, 6)):  # not among the best; ends early; goes on
        assert part(tokens).gap_nats is None
        assert not part(tokens).is_tie
    for change in ({"text": "y"}, {"finish": "stop"}):
        assert not part((1, 3, 6), **change).is_tie


def test_dense_answers_of_other_batches() -> None:
    """Catches a tie with one dense answer that hides a wrong token beyond another's prefix."""
    alone = Answer("x", (1, 3), "length", tops=({1: -0.1}, {3: -0.7, 4: -0.7}))
    batched = Answer("y", (1, 4, 5), "length", tops=({1: -0.1}, {4: -0.7, 3: -0.7}, {5: 0, 6: -2}))
    assert compare([alone, batched], Answer("y", (1, 4, 5), "length")) is None
    found = compare([alone, batched], Answer("z", (1, 4, 6), "length"))
    assert (found.position, found.is_tie) == (2, False)
