"""`flashhead playground`: two heads side by side, who may ask, and the page in a browser."""

import contextlib
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
import torch
from browser import browser_page

from flashhead.cli import main
from flashhead.cli.session import encode
from flashhead.errors import FlashHeadError
from flashhead.integrations.transformers import attach, load_tokenizer
from flashhead.ops.noise.api import gumbel
from flashhead.options import Sampling
from flashhead.playground.access import Access
from flashhead.playground.decode import SideBySide
from flashhead.playground.requests import Limits, RefusedError, parse
from flashhead.playground.server import PlaygroundServer
from flashhead.playground.text import PiecewiseText
from flashhead.playground.turns import MOST_WAITING, Turns

PROMPT = "w5 w9 w30 w7"
TOKEN = "a-token_of-23-characters"
SECONDS = 60.0


@pytest.fixture(scope="module")
def decoder(tiny_model, tiny_folder):
    """The tiny model in float32, whose dense argmax has no ties of rounding, without an end."""
    dtype, ends = tiny_model.dtype, tiny_model.generation_config.eos_token_id
    tiny_model.float()
    tokenizer = load_tokenizer(tiny_folder)
    with attach(tiny_model, "codes", progress=False, calibration_tokens=256) as attachment:
        attachment.head.crossover_rows = attachment.head.token_crossover_rows = 1
        made = SideBySide(tiny_model, tokenizer, encode)
        made.ends = frozenset()
        yield made
    tiny_model.to(dtype)
    assert tiny_model.generation_config.eos_token_id == ends


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


@pytest.fixture
def server(decoder):
    with serving(decoder) as found:
        yield found


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


def test_both_sides_are_what_generate_says(decoder):
    """Catches a cache that the two sides share, a hidden state of another position, and a model
    that keeps the stand-in for its head."""
    ids = decoder.encode(PROMPT, True, 12, 0.0)
    events = list(decoder.events(ids, 12, Sampling()))
    assert decoder.model.get_output_embeddings() is decoder.head
    assert events[0]["event"] == "start"
    assert events[0]["prompt_tokens"] == ids.shape[1] == 4
    head = decoder.head
    rows, head.crossover_rows = head.crossover_rows, 0
    wanted = decoder.model.generate(
        ids, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0
    )
    head.crossover_rows = rows
    for name in ("dense", "flash"):
        tokens = side(events, name)
        assert [token["token"] for token in tokens] == wanted[0, 4:].tolist()
        assert [token["step"] for token in tokens] == list(range(12))
        assert [token["seconds"] is None for token in tokens] == [True] + [False] * 11
    flash = side(events, "flash")
    assert all(token["certified"] and 1 <= token["candidates"] <= 515 for token in flash)
    assert all(token["candidates"] == 515 for token in side(events, "dense"))
    assert all(token["bytes_read"] == head.dense_bytes for token in side(events, "dense"))
    texts = ["".join(token["text"] for token in side(events, name)) for name in ("dense", "flash")]
    decoded = decoder._tokenizer.decode(wanted[0, 4:], skip_special_tokens=True)
    assert texts == [decoded, decoded]


def test_latent_caches_are_copied(tiny_folder, tmp_path):
    """Catches two sides that append to the same store of latents."""
    from flashhead.convert.head import convert
    from flashhead.integrations.transformers import load
    from flashhead.options_latent import LatentOptions

    words = torch.randint(3, 515, (700,), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "words.txt").write_text(" ".join(f"w{word}" for word in words))
    options = LatentOptions(kv_ratio=1.0, kv_dtype="int8", calibration=(tmp_path / "words.txt",))
    out = tmp_path / "out"
    convert(tiny_folder, out, attention=options, progress=False, calibration_tokens=64)
    model = load(str(out), dtype=torch.float32, crossover=1, progress=False)
    made = SideBySide(model, load_tokenizer(str(out)), encode)
    made.ends = frozenset()
    ids = made.encode(PROMPT, True, 12, 0.0)
    events = list(made.events(ids, 12, Sampling()))
    made.head.crossover_rows = 0
    wanted = model.generate(
        ids, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0
    )
    for name in ("dense", "flash"):
        assert [token["token"] for token in side(events, name)] == wanted[0, 4:].tolist()


def test_with_a_temperature_both_draw_by_the_same_noise(decoder):
    """Catches sides that part by chance, a seed that is not used, and steps that repeat a draw."""
    ids = decoder.encode(PROMPT, True, 24, 5.0)

    def texts(seed):
        events = list(decoder.events(ids, 24, Sampling(temperature=5.0, seed=seed)))
        return [[token["token"] for token in side(events, name)] for name in ("dense", "flash")]

    dense, flash = texts(1)
    assert dense == flash
    assert len(set(dense)) > 12
    assert texts(1) == [dense, flash]
    assert texts(2)[0] != dense


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_where_the_sides_part_both_tokens_are_scored(temperature, decoder, monkeypatch):
    """Catches scores of another step or side, and a parting that is told twice."""
    dense, seen = decoder._dense, []

    def second_best(hidden, sampling, step):
        choice = dense(hidden, sampling, step)
        if step < 2:
            return choice
        seen.append(hidden)
        return type(choice)((choice.token + 1) % 515, 515, False, 1)

    monkeypatch.setitem(decoder._choosers, "dense", second_best)
    ids = decoder.encode(PROMPT, True, 6, temperature)
    events = list(decoder.events(ids, 6, Sampling(temperature=temperature, seed=5)))
    (parts,) = [event for event in events if event["event"] == "parts"]
    assert parts["step"] == 2
    logits = (seen[0].double() @ decoder.head.weight.detach().double().T)[0]
    noise = gumbel(5, torch.tensor([2]), 515, impl="reference")[0].double()
    for name in ("dense", "flash"):
        token = side(events, name)[2]["token"]
        wanted = float(logits[token] + temperature * noise[token])
        assert parts["float32"][name] == pytest.approx(wanted, rel=1e-5, abs=1e-5)
        assert parts["dense_dtype"][name] == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    assert parts["float32"]["flash"] > parts["float32"]["dense"]


def test_an_end_token_ends_its_side_and_dense_runs_where_it_is_faster(decoder, monkeypatch):
    """Catches tokens after the end, and a search that deployment would not run."""
    ids = decoder.encode(PROMPT, True, 12, 0.0)
    second = side(list(decoder.events(ids, 2, Sampling())), "dense")[1]["token"]
    monkeypatch.setattr(decoder, "ends", frozenset([second]))
    monkeypatch.setattr(decoder.head, "token_crossover_rows", 0)
    events = list(decoder.events(ids, 12, Sampling()))
    for name in ("dense", "flash"):
        tokens = side(events, name)
        assert [token["ends"] for token in tokens] == [False] * (len(tokens) - 1) + [True]
        assert tokens[-1]["token"] == second
        assert not any(token["certified"] for token in tokens)
    assert len(events) < 25


def test_half_characters_wait(decoder):
    """Catches replacement characters in the text of a token that is a part of a character."""
    data = "aé€".encode()
    text = PiecewiseText(lambda tokens: bytes(tokens).decode(errors="replace"))
    pieces = [text.piece(byte, last=False) for byte in data]
    assert pieces == ["a", "", "é", "", "", "€"]
    assert text.piece(0xC3, last=True) == "\ufffd"


def test_heads_that_certify_nothing_are_refused(decoder, monkeypatch):
    """Catches a page that colours what is not known."""
    monkeypatch.setattr(decoder.head, "index", None)
    with pytest.raises(FlashHeadError, match="wanted an index of codes"):
        SideBySide(decoder.model, decoder._tokenizer, encode)


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


CONTRAST = """(() => {
  const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => {
    v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const paper = e => { for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor;
    if (c !== "rgba(0, 0, 0, 0)") return light(c); } return 1; };
  const shown = "p, label, h1, h2, dt, dd, button:enabled, textarea, .token, .legend span, summary";
  return Math.min(...[...document.querySelectorAll(shown)].map(e => {
    const ink = light(getComputedStyle(e).color), under = paper(e);
    return (Math.max(ink, under) + 0.05) / (Math.min(ink, under) + 0.05); })); })()"""


def test_in_a_browser(decoder, tmp_path):
    """Catches a page whose own policy blocks it, text that becomes markup, sides that stay empty,
    tokens without figures, a cancel that does nothing, and a page wider than a phone."""
    status = "document.querySelector('#status').textContent"
    click = "document.querySelector('#{}').click()"
    with serving(decoder) as server, browser_page() as tab:

        def wait_for_status(*beginnings):
            wait_until(lambda: tab.evaluate(status).startswith(beginnings))

        for width, dark in ((390, True), (1280, False)):
            tab.open(server.url, width, dark=dark)
            wait_until(lambda: tab.evaluate("!document.querySelector('#run').disabled"))
            tab.evaluate(
                "document.querySelector('#prompt').value = 'w5 w9 <img src=x onerror=alert(1)>';"
                "document.querySelector('#tokens').value = '24';" + click.format("run")
            )
            wait_for_status("Done")
            assert tab.evaluate(status) == "Done: the same 24 tokens."
            for name in ("dense", "flash"):
                assert tab.evaluate(f"document.querySelector('#{name}-text').innerText.length") > 24
                assert "MB a token" in tab.evaluate(
                    f"document.querySelector('#{name}-bytes').textContent"
                )
                assert "tokens/s" in tab.evaluate(
                    f"document.querySelector('#{name}-speed').textContent"
                )
            spans = tab.evaluate(
                "[...document.querySelectorAll('#flash-text .token')].map(e => "
                "[Number(e.dataset.candidates), e.className, e.title])"
            )
            assert len(spans) == 24
            for candidates, classes, title in spans:
                assert 1 <= candidates <= 515
                assert f"{candidates} candidates, certified" in title
                assert "certified" in classes.split()
            colours = tab.evaluate(
                "[...document.querySelectorAll('.legend span')].slice(0, 5).map(e => "
                "getComputedStyle(e).backgroundColor)"
            )
            assert len(set(colours)) == 5
            assert tab.evaluate("document.querySelectorAll('#rows tr').length") == 24
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            assert tab.evaluate(CONTRAST) >= 4.5
            shot = tmp_path / f"{width}.png"
            tab.screenshot(shot)
            assert shot.stat().st_size > 10_000
        tab.evaluate("document.querySelector('#tokens').value = '240';" + click.format("run"))
        wait_until(lambda: tab.evaluate("document.querySelectorAll('#flash-text .token').length"))
        tab.evaluate(click.format("cancel"))
        wait_for_status("Stopped")
        wait_until(lambda: not server.turns._jobs)
        assert tab.evaluate("document.querySelectorAll('#flash-text .token').length") < 240
        assert tab.evaluate("document.querySelectorAll('.text img').length") == 0
        assert tab.problems == []
        assert {url for url in tab.requests if not url.startswith((server.url, "data:"))} == set()


def test_where_texts_part(decoder, monkeypatch):
    """Catches a page that calls different texts the same."""
    dense = decoder._dense

    def other(hidden, sampling, step):
        choice = dense(hidden, sampling, step)
        return choice if step != 3 else type(choice)((choice.token + 1) % 500 + 3, 515, False, 1)

    monkeypatch.setitem(decoder._choosers, "dense", other)
    with serving(decoder) as server, browser_page() as tab:
        tab.open(server.url, 1280)
        wait_until(lambda: tab.evaluate("!document.querySelector('#run').disabled"))
        tab.evaluate(
            "document.querySelector('#prompt').value = 'w5';"
            "document.querySelector('#tokens').value = '8';"
            "document.querySelector('#run').click()"
        )
        wait_until(
            lambda: tab.evaluate("document.querySelector('#status').textContent").startswith("Done")
        )
        said = tab.evaluate("document.querySelector('#status').textContent")
        assert said.startswith("Done: the texts part at token 4: dense")
        assert " in the dense head's float32." in said
        parts = tab.evaluate(
            "['dense', 'flash'].map(s => [...document.querySelectorAll(`#${s}-text .token`)]"
            ".findIndex(e => e.classList.contains('parts')))"
        )
        assert parts == [3, 3]
        assert tab.problems == []


@pytest.mark.model
def test_smollm2():
    """Catches figures that do not hold for a real head: in float32, where nothing ties, the same
    text on both sides, every token certified, a few rows scored and a fraction of the bytes read.
    """
    from flashhead.integrations import transformers

    model = transformers.load(
        "smollm2-135m",
        dtype=torch.float32,
        crossover=1,
        progress=False,
        calibration_tokens=1024,
    )
    made = SideBySide(model, transformers.load_tokenizer("smollm2-135m"), encode)
    ids = made.encode("The capital of France is", True, 16, 0.0)
    events = list(made.events(ids, 16, Sampling()))
    dense, flash = side(events, "dense"), side(events, "flash")
    assert len(flash) == 16
    assert [token["token"] for token in flash] == [token["token"] for token in dense]
    assert "Paris" in "".join(token["text"] for token in flash)
    for token in flash:
        assert token["certified"]
        assert token["candidates"] < 0.05 * made.head.out_features
    assert sum(token["bytes_read"] for token in flash) / 16 < 0.3 * made.head.dense_bytes
