"""The playground's server: limits, who may ask, whose turn it is, how it ends."""

import functools
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from playground_client import PROMPT, SECONDS, Opened, ask, events_of, serving, side, wait_until

from flashhead.cli import main
from flashhead.errors import FlashHeadError
from flashhead.options import Sampling
from flashhead.playground.access import Access
from flashhead.playground.requests import Limits, RefusedError, parse
from flashhead.playground.turns import MOST_WAITING, Turns

TOKEN = "a-token_of-23-characters"


@pytest.fixture
def server(decoder):
    with serving(decoder) as found:
        yield found


@pytest.mark.parametrize(
    ("body", "status", "match"),
    [
        (b"{", 400, "wanted JSON"),
        (b"\xff", 400, "wanted JSON"),
        (b"[" * 900, 400, "wanted JSON"),
        (b"[]", 400, "wanted a JSON object"),
        ({}, 400, "prompt: wanted a text"),
        ({"prompt": " "}, 400, "prompt: wanted a text"),
        ({"prompt": 3}, 400, "prompt: wanted a text"),
        ({"prompt": "\ud800"}, 400, "prompt: wanted Unicode"),
        ({"prompt": "x" * 101}, 413, "prompt: 101 characters, wanted at most 100"),
        ({"prompt": "x" * 9999}, 413, "bytes, wanted at most"),
        ({"prompt": "x", "max_new_tokens": 0}, 400, "max_new_tokens: wanted an integer"),
        ({"prompt": "x", "max_new_tokens": True}, 400, "max_new_tokens: wanted an integer"),
        ({"prompt": "x", "max_new_tokens": 65}, 413, "max_new_tokens: 65, wanted at most 64"),
        ({"prompt": "x", "temperature": -1}, 400, "temperature: wanted 0"),
        ({"prompt": "x", "temperature": float("nan")}, 400, "temperature: wanted 0"),
        ({"prompt": "x", "temperature": "1"}, 400, "temperature: wanted a number"),
        ({"prompt": "x", "seed": -1}, 400, "seed: wanted"),
        ({"prompt": "x", "raw": 1}, 400, "raw: wanted"),
        ({"prompt": "x", "top_p": 1}, 400, "unknown field 'top_p'"),
    ],
)
def test_limits(body, status, match, decoder):
    """Catches a request that reaches the model, a traceback, and a limit that is not kept."""
    with serving(decoder, limits=Limits(100, 64)) as server:
        got, headers, text = ask(server, body=body)
        assert (got, server.turns.submitted) == (status, 0)
        assert match in json.loads(text)["error"]
        assert headers.get_content_type() == "application/json"


def test_a_prompt_beyond_the_context_is_refused(server):
    """Catches an error in the middle of a stream."""
    status, _, text = ask(server, body={"prompt": "w5 " * 200, "max_new_tokens": 100})
    assert status == 400
    assert "context of 256" in text


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "attacker.example"}, 421),
        ({"Host": "127.0.0.1.attacker.example"}, 421),
        ({"Host": "localhost@attacker.example"}, 421),
        ({"Host": "[::1"}, 421),
        ({"Host": ""}, 421),
        ({"Host": "[::1]:8080"}, 200),
        ({"Host": "localhost:9000"}, 200),
        ({"Origin": "http://[::1"}, 403),
        ({"Origin": "http://attacker.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Transfer-Encoding": "chunked"}, 411),
    ],
)
def test_other_pages_cannot_ask(headers, status, server):
    """Catches DNS rebinding, a form of another page, and CORS."""
    got, found, _ = ask(server, body={"prompt": PROMPT, "max_new_tokens": 1}, headers=headers)
    assert got == status
    assert not [name for name in found if name.lower().startswith("access-control")]


def test_paths_and_methods(server):
    """Catches a file server, and a preflight that is granted."""
    assert ask(server, "GET", "/../etc/passwd")[0] == 404
    assert ask(server, "GET", "/generate")[0] == 404
    assert ask(server, "GET", "//[")[0] == 404
    assert ask(server, path="/", body={})[0] == 404
    assert ask(server, "OPTIONS")[0] == 501
    assert ask(server, "GET", "/", headers={"Host": "attacker.example"})[0] == 421
    status, headers, text = ask(server, "GET", "/")
    assert status == 200
    assert "'unsafe-inline'" not in headers["Content-Security-Policy"]
    assert "innerHTML" not in text
    assert json.loads(ask(server, "GET", "/info")[2])["vocab_size"] == 515


def test_token(decoder):
    """Catches a server that answers without it, and a cookie that scripts or other sites get."""
    body = {"prompt": PROMPT, "max_new_tokens": 1}
    with serving(decoder, "0.0.0.0", TOKEN) as server:
        host = {"Host": "box.example:80"}
        for path in ("/", "/info"):
            assert ask(server, "GET", path, headers=host)[0] == 401
        assert ask(server, body=body)[0] == 401
        assert ask(server, body=body, headers={"Authorization": "Bearer wrong"})[0] == 401
        assert ask(server, body=body, headers={"Authorization": f"Bearer {TOKEN}"})[0] == 200
        assert ask(server, "GET", "/?token=wrong")[0] == 401
        status, headers, _ = ask(server, "GET", f"/?token={TOKEN}", headers=host)
        assert (status, headers["Location"]) == (303, "/")
        cookie, *flags = headers["Set-Cookie"].split("; ")
        assert {"HttpOnly", "SameSite=Strict"} <= set(flags)
        assert TOKEN not in cookie
        assert ask(server, body=body, headers={"Cookie": cookie})[0] == 200
        assert ask(server, body=body, headers={"Cookie": cookie[:-1]})[0] == 401
        foreign = {"Cookie": cookie, "Origin": "http://attacker.example"}
        assert ask(server, body=body, headers=foreign)[0] == 403


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.9", "box.example", ""])
def test_other_addresses_want_a_token(host, capsys):
    """Catches an open server; nothing is loaded or bound for it."""
    assert main(["playground", "nowhere", "--host", host]) == 2
    assert "others can reach it; wanted --token" in capsys.readouterr().err
    with pytest.raises(FlashHeadError, match="--token: wanted 16"):
        Access(host, "short")


def test_port_in_use(capsys):
    """Catches a traceback, and a model that is loaded before the port is known to be free."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["playground", "nowhere", "--port", port]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"--port {port}: Address already in use" in line


def test_a_client_that_leaves_stops_its_decode(server, monkeypatch):
    """Catches a model that goes on for nobody; the next request is then served."""
    decoder, steps = server.side_by_side, []
    read = decoder._read

    def slow(*args):
        steps.append(1)
        time.sleep(0.02)
        return read(*args)

    monkeypatch.setattr(decoder, "_read", slow)
    leaving = Opened(server, 200)
    assert leaving.event()["event"] == "start"
    assert leaving.event()["event"] == "token"
    leaving.leave()
    wait_until(lambda: not server.turns._jobs)
    assert len(steps) < 100
    monkeypatch.setattr(decoder, "_read", read)
    status, _, text = ask(server, body={"prompt": PROMPT, "max_new_tokens": 3})
    assert status == 200
    assert events_of(text)[-1] == {"event": "end", "stopped": False}
    assert decoder.model.get_output_embeddings() is decoder.head


def test_two_tabs_both_finish_and_the_second_is_told_to_wait(server, monkeypatch):
    """Catches two decodes in one model at once, and a tab that hears nothing."""
    decoder, go = server.side_by_side, threading.Event()
    read = decoder._read

    def held(*args):
        assert go.wait(SECONDS)
        return read(*args)

    monkeypatch.setattr(decoder, "_read", held)
    first = Opened(server, 12)
    second = Opened(server, 12)
    assert second.event() == {"event": "waiting", "ahead": 1}
    go.set()
    texts = []
    for tab in (first, second):
        events = events_of(tab.answer.read().decode())
        tab.leave()
        assert events[-1] == {"event": "end", "stopped": False}
        texts.append([token["token"] for token in side(events, "flash")])
    assert texts[0] == texts[1]
    assert len(texts[0]) == 12


def test_http_1_0(server):
    """Catches chunks in the stream of a proxy that knows none."""
    body = json.dumps({"prompt": PROMPT, "max_new_tokens": 2}).encode()
    lines = ("POST /generate HTTP/1.0", "Host: localhost", "Content-Type: application/json")
    head = "\r\n".join((*lines, f"Content-Length: {len(body)}", "", "")).encode()
    with socket.create_connection(("127.0.0.1", server.server_port), SECONDS) as connection:
        connection.sendall(head + body)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    headers, _, text = answer.decode().partition("\r\n\r\n")
    assert "Transfer-Encoding" not in headers
    assert [event["event"] for event in events_of(text)] == ["start", *["token"] * 4, "end"]


def test_turns():
    """Catches a queue without end, work for a client that has left, and an error that takes the
    thread with it."""
    turns, go = Turns(), threading.Event()

    def hold():
        go.wait(SECONDS)
        yield {"n": 1}

    def fail():
        yield {"n": 2}
        raise FlashHeadError("no")

    jobs = [turns.submit(hold), *(turns.submit(fail) for _ in range(MOST_WAITING))]
    with pytest.raises(FlashHeadError, match="16 requests wait already"):
        turns.submit(hold)
    jobs[1].cancelled.set()
    assert turns.ahead(jobs[3]) == 2
    go.set()
    assert jobs[1].events.get(timeout=SECONDS) is None
    assert jobs[2].events.get(timeout=SECONDS) == {"n": 2}
    assert jobs[2].events.get(timeout=SECONDS) is None
    assert str(jobs[2].error()) == "no"
    turns.close()
    with pytest.raises(FlashHeadError, match="about to end"):
        turns.submit(hold)


def test_errors_of_the_model_are_one_line(server, monkeypatch):
    """Catches a stream that ends without a word."""

    def broken(*_args):
        raise FlashHeadError("hidden holds NaN")

    monkeypatch.setattr(server.side_by_side, "_read", broken)
    events = events_of(ask(server, body={"prompt": PROMPT, "max_new_tokens": 3})[2])
    assert events == [{"event": "error", "message": "hidden holds NaN"}]


def test_parse_keeps_what_was_given():
    """Catches a field that is ignored."""
    body = json.dumps({"prompt": "é", "max_new_tokens": 7, "temperature": 1, "seed": 3})
    request = parse(body.encode(), Limits())
    assert (request.prompt, request.new_tokens, request.raw) == ("é", 7, False)
    assert request.sampling == Sampling(temperature=1.0, seed=3)
    assert parse(b'{"prompt": "x"}', Limits(new_tokens=9)).new_tokens == 9
    with pytest.raises(RefusedError):
        parse(b'{"prompt": "x", "max_new_tokens": 257}', Limits())


def test_the_command_ends_by_ctrl_c(tiny_folder):
    """Catches a server that hangs at Ctrl-C with a decode under way, and a page that is not
    found once installed."""
    command = ("playground", tiny_folder, "--port", "0", "--crossover", "1", "--json")
    process = subprocess.Popen(
        [sys.executable, "-m", "flashhead", *command, "--set", "calibration_tokens=256"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # a shell's background job, as CI may be, hands down an ignored SIGINT
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        seen = []
        while "open http" not in (line := process.stderr.readline()):
            assert line, seen
            seen.append(line)
        port = int(line.split(":")[3].split("/")[0])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
        body = json.dumps({"prompt": PROMPT, "max_new_tokens": 200})
        connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
        assert json.loads(connection.getresponse().readline())["event"] == "start"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert "Traceback" not in err
    assert json.loads(out)["requests"] == 1
