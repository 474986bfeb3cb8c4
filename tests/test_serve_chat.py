"""`flashhead serve` against a vLLM that writes down how it was called, and `flashhead chat`."""

import functools
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from flashhead.cli import main
from flashhead.cli.answer import Answer, interruptible
from flashhead.cli.chat import Chat
from flashhead.cli.history import STOP, Turn, encode_turns, fit, transcript
from flashhead.errors import FlashHeadError

FAKE = """
import json, os, signal, subprocess, sys, time
from pathlib import Path

record = Path(os.environ["FAKE_RECORD"])
heard = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda n, _: heard.append(n))
pids = [os.getpid()]
if os.environ["FAKE_DOES"] == "wait":  # a worker that does not care how its parent ended
    ignore = "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(600)"
    pids.append(subprocess.Popen([sys.executable, "-c", ignore]).pid)
space = os.environ.get("VLLM_CPU_KVCACHE_SPACE")
text = json.dumps({"argv": sys.argv[1:], "space": space, "pids": pids})
record.with_suffix(".partial").write_text(text)
record.with_suffix(".partial").rename(record)
if os.environ["FAKE_DOES"].isdigit():
    sys.exit(int(os.environ["FAKE_DOES"]))
while not heard or os.environ["FAKE_DOES"] == "nothing":
    time.sleep(0.02)
record.with_suffix(".signals").write_text(json.dumps(heard))
"""


class FakeVllm:
    """A package `vllm` on a path of its own, and the command line that finds it."""

    def __init__(self, folder: Path) -> None:
        self.path, self.record = folder / "site", folder / "record.json"
        for module in ("cli/main.py", "openai/api_server.py"):
            file = self.path / "vllm" / "entrypoints" / module
            file.parent.mkdir(parents=True)
            file.write_text(FAKE)
        self.install("vllm")

    def install(self, distribution: str, version: str = "0.32.0") -> None:
        """Under this name, and no other."""
        for old in self.path.glob("*.dist-info"):
            (old / "METADATA").unlink()
            old.rmdir()
        info = self.path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )

    def start(self, *args: str, does: str = "0", **variables: str) -> subprocess.Popen[str]:
        """`flashhead serve` in a fresh process."""
        path = os.pathsep.join([str(self.path), os.environ.get("PYTHONPATH", "")])
        unset = ("VLLM_CPU_KVCACHE_SPACE", "VLLM_TARGET_DEVICE", "VLLM_API_KEY")
        kept = {name: value for name, value in os.environ.items() if name not in unset}
        fake = {"PYTHONPATH": path, "FAKE_RECORD": str(self.record), "FAKE_DOES": does}
        return subprocess.Popen(
            [sys.executable, "-m", "flashhead.cli", "serve", *args],
            env={**kept, **fake, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # a shell's background job, as CI may be, hands down an ignored SIGINT
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *args: str, **options: str) -> subprocess.CompletedProcess[str]:
        """The same, to its end."""
        process = self.start(*args, **options)
        stdout, stderr = process.communicate(timeout=60)
        return subprocess.CompletedProcess(args, process.returncode, stdout, stderr)

    def plan(self, *args: str, **options: str) -> dict:
        """Document of a dry run, which must not have started anything."""
        done = self.run("--dry-run", *args, **options)
        assert done.returncode == 0, done.stderr
        assert not self.record.exists()
        return json.loads(done.stdout)

    def started(self) -> dict:
        """What the server wrote down once it ran."""
        deadline = time.monotonic() + 60
        while not self.record.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return json.loads(self.record.read_text())

    def signals(self) -> list[int]:
        """What the server was told."""
        file = self.record.with_suffix(".signals")
        deadline = time.monotonic() + 60
        while not file.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return json.loads(file.read_text())


@pytest.fixture
def vllm(tmp_path) -> FakeVllm:
    """A vLLM for GPUs."""
    return FakeVllm(tmp_path)


@pytest.fixture
def folder(tmp_path) -> str:
    """A model that says nothing of FlashHead."""
    return model_folder(tmp_path / "model", {"architectures": ["X"]})


def model_folder(path: Path, config: object) -> str:
    """A folder with nothing but a config."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return str(path)


def server(model: str) -> list[str]:
    """The command line's beginning."""
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]


CHAT = [sys.executable, "-m", "flashhead.cli", "chat", "--dense"]
LOCAL = ["--host", "127.0.0.1", "--port", "8000"]
FLASH = ["--quantization", "flashhead"]


@pytest.mark.parametrize("command", ["serve", "chat"])
def test_help_without_torch(command):
    """A help page that takes seconds."""
    code = "import sys; from flashhead.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'vllm', 'transformers')))"
    done = subprocess.run([sys.executable, "-c", code, command, "--help"], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(f"usage: flashhead {command}".encode())


def test_serve_document(vllm, folder):
    """A default that changes unseen: flags, host, port, or variables on a GPU build."""
    assert vllm.plan(folder) == {
        "command": [*server(folder), *FLASH, *LOCAL],
        "environment": {},
        "build": "gpu",
        "vllm": "0.32.0",
    }


@pytest.mark.parametrize("method", ["flashhead", "awq", None])
def test_serve_folder_that_names_its_method(vllm, tmp_path, method):
    """A converted folder served with the flag twice, or a quantised one served without it."""
    config = {"architectures": ["X"], "quantization_config": {"quant_method": method}}
    model = model_folder(tmp_path / "converted", config)
    flags = [] if method == "flashhead" else FLASH
    assert vllm.plan(model)["command"] == [*server(model), *flags, *LOCAL]


def test_serve_embedded_name(vllm, tmp_path):
    """Clients that must ask for a folder of our cache instead of the model they named."""
    model = model_folder(tmp_path / "models" / "smollm2-135m", {"architectures": ["X"]})
    named = [*FLASH, "--served-model-name", "smollm2-135m"]
    document = vllm.plan("smollm2-135m", FLASHHEAD_CACHE=str(tmp_path))
    assert document["command"] == [*server(model), *named, *LOCAL]


def test_serve_hub_id(vllm, tmp_path):
    """A hub id taken for a folder, or looked for on the network though it is in the cache."""
    repo = tmp_path / "hub" / "models--owner--name"
    model_folder(repo / "snapshots" / "abc", {})
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    document = vllm.plan("owner/name", HF_HOME=str(tmp_path), HF_HUB_CACHE=str(tmp_path / "hub"))
    assert document["command"] == [*server("owner/name"), *FLASH, *LOCAL]


def test_serve_options(vllm, folder):
    """An option that is lost, changes its type, or comes after the user's own arguments."""
    document = vllm.plan(
        *(folder, "--host", "::1", "--port", "81", "--max-model-len", "512"),
        *("--tensor-parallel-size", "2", "--set", "bits=1.5", "--set", "index=a b"),
        *("--", "--dtype", "float32", "--", "x"),
    )
    overrides = {"flashhead_options": {"bits": 1.5, "index": "a b"}}
    assert document["command"] == [
        *(*server(folder), *FLASH, "--host", "::1", "--port", "81", "--max-model-len", "512"),
        *("--tensor-parallel-size", "2", "--hf-overrides", json.dumps(overrides)),
        *("--dtype", "float32", "--", "x"),
    ]


@pytest.mark.parametrize(
    ("distribution", "version", "variables"),
    [
        ("vllm", "0.32.0+cpu", {}),
        ("vllm", "0.32.0", {"VLLM_TARGET_DEVICE": "cpu"}),
        ("vllm-cpu", "0.32.0", {}),
    ],
)
def test_serve_cpu_build(vllm, folder, distribution, version, variables):
    """A KV cache of half the memory on a CPU; the server of `vllm-cpu`, whose own command fails."""
    vllm.install(distribution, version)
    document = vllm.plan(folder, **variables)
    assert (document["build"], document["vllm"]) == ("cpu", version)
    assert document["environment"] == {"VLLM_CPU_KVCACHE_SPACE": "4"}
    if distribution == "vllm-cpu":
        program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
        assert document["command"] == [*program, *FLASH, *LOCAL]
    assert vllm.plan(folder, VLLM_CPU_KVCACHE_SPACE="9", **variables)["environment"] == {}


def test_serve_runs_what_it_says(vllm, folder):
    """A document, a line on the screen and a process that differ."""
    vllm.install("vllm-cpu")
    done = vllm.run(folder, "--", "--chat-template", "a b")
    assert (done.returncode, done.stdout) == (0, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("flashhead: VLLM_CPU_KVCACHE_SPACE=4 ")
    assert line.endswith("--port 8000 --chat-template 'a b'")
    started = vllm.started()
    assert started["argv"] == ["--model", folder, *FLASH, *LOCAL, "--chat-template", "a b"]
    assert started["space"] == "4"
    vllm.record.unlink()
    assert vllm.run(folder, VLLM_CPU_KVCACHE_SPACE="9").returncode == 0
    assert vllm.started()["space"] == "9"


@pytest.mark.parametrize(
    ("args", "key", "warned"),
    [
        (("--host", "0.0.0.0"), "", True),
        (("--host", "example.org"), "", True),
        (("--host", ""), "", True),
        (("--host", "0.0.0.0", "--", "--api-key", "k"), "", False),
        (("--host", "0.0.0.0", "--", "--api_key=k"), "", False),
        (("--host", "0.0.0.0"), "k", False),
        (("--host", "127.0.0.2"), "", False),
        (("--host", "localhost"), "", False),
    ],
)
def test_serve_warns_of_an_open_server(vllm, folder, args, key, warned):
    """A server without authentication on all interfaces, unsaid; a warning where there is one."""
    done = vllm.run(folder, "--dry-run", *args, VLLM_API_KEY=key)
    assert done.returncode == 0
    assert [line[:26] for line in done.stderr.splitlines()] == (
        ["flashhead: warning: --host"] if warned else []
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("x.gguf",), "run `flashhead convert x.gguf FOLDER` first"),
        (("/nowhere",), "model '/nowhere': no such file or folder"),
        (("FOLDER", "--set", "proves=3"), "option 'proves' is unknown: wanted one of bits"),
        (("FOLDER", "--set", "bits=9"), "bits=9: wanted 1 to 4"),
        (("FOLDER", "--port", "0"), "argument --port: '0'"),
        (("FOLDER", "--", "--host", "0.0.0.0"), "--host after --: wanted before it"),
        (("FOLDER", "--", "--max_model_len=9"), "--max-model-len after --"),
        (("FOLDER", "--set", "bits=2", "--", "--hf-overrides.a", "1"), "--set and --hf-overrides"),
        (("FOLDER", "extra"), "unrecognized arguments: extra"),
    ],
)
def test_serve_mistakes(vllm, folder, args, message):
    """A minute of vLLM's start and a traceback for a mistyped argument."""
    done = vllm.run(*[folder if arg == "FOLDER" else arg for arg in args])
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert message in line
    assert not vllm.record.exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [("{", "not JSON"), ("[]", "wanted a JSON object"), ({"flashhead": {}}, "--set index=")],
)
def test_serve_folder_without_model(vllm, tmp_path, config, message):
    """A traceback of vLLM for a folder that is damaged or holds an index only."""
    done = vllm.run(model_folder(tmp_path / "damaged", config))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert message in done.stderr


def test_serve_without_vllm(monkeypatch, capsys, folder):
    """ModuleNotFoundError in the user's face."""

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert main(["serve", folder]) == 2
    assert capsys.readouterr() == (
        "",
        "flashhead: vllm is not installed: pip install 'flashhead[vllm]'\n",
    )


def test_serve_child_that_fails(vllm, folder):
    """A server that did not start, reported as done; a traceback of ours on top of vLLM's."""
    done = vllm.run(folder, does="3")
    assert done.returncode == 2
    assert done.stderr.splitlines()[1:] == ["flashhead: vllm serve ended with exit code 3"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_ends_with_its_child(vllm, folder, number):
    """A server or a worker of it that goes on, or hears Ctrl-C twice; an exit code of success."""
    process = vllm.start(folder, does="wait")
    try:
        pids = vllm.started()["pids"]
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert vllm.signals() == [number]
    assert "Traceback" not in stderr
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_serve_second_signal(vllm, folder):
    """A server that hangs at its end, and a command that only `kill -9` ends."""
    process = vllm.start(folder, does="nothing")
    try:
        (pid,) = vllm.started()["pids"]
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells children on Linux only")
def test_serve_killed(vllm, folder):
    """A server that holds the memory and the port after `kill -9` of the command."""
    process = vllm.start(folder, does="wait")
    worker = vllm.started()["pids"][1]
    process.kill()
    assert vllm.signals() == [signal.SIGTERM]
    os.kill(worker, signal.SIGKILL)  # of the fake: nobody is left to end it
    process.communicate(timeout=60)


def test_transcript():
    """A base model that is not shown whose turn it is."""
    turns = [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")]
    assert transcript(turns[:1]) == "User: a\nAssistant:"
    assert transcript(turns, "Be brief.") == (
        "Be brief.\n\nUser: a\nAssistant: b\nUser: c\nAssistant:"
    )


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    """Of words `w3` to `w514`, without a chat template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture
def templated(tokenizer):
    """The same with a chat template that has no place for a system prompt."""
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ m.role }} {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}w9{% endif %}"
    )
    yield tokenizer
    tokenizer.chat_template = None


def test_encode_turns(templated):
    """A history that the template does not see, or sees without the prompt for an answer."""
    turns = [Turn("user", "w3"), Turn("assistant", "w4"), Turn("user", "w5")]
    ids = encode_turns(templated, turns)["input_ids"][0].tolist()
    assert ids == [0, 3, 0, 4, 0, 5, 9]
    with pytest.raises(FlashHeadError, match="--system: the chat template does not take it"):
        encode_turns(templated, turns, "w6")


def test_fit_drops_the_oldest(tokenizer):
    """A conversation beyond the context, cut in the middle of a question and its answer."""
    turns = [Turn(("user", "assistant")[i % 2], f"w{i + 3} w{i + 3}") for i in range(5)]
    sizes = [encode_turns(tokenizer, turns[i:])["input_ids"].shape[1] for i in (0, 2, 4)]
    assert fit(tokenizer, turns, None)[0] == turns
    assert fit(tokenizer, turns, sizes[0])[0] == turns
    for limit, first in ((sizes[0] - 1, 2), (sizes[1], 2), (sizes[1] - 1, 4)):
        kept, inputs = fit(tokenizer, turns, limit)
        assert kept == turns[first:]
        assert inputs["input_ids"].shape[1] <= limit
    with pytest.raises(FlashHeadError, match="the context has room for"):
        fit(tokenizer, turns, sizes[2] - 1)


class Characters:
    """A tokenizer whose tokens are characters."""

    def decode(self, tokens, skip_special_tokens):
        """Text of tokens."""
        return "".join(map(chr, tokens))


def stream(answer: Answer, text: str) -> None:
    """What `generate` does: the prompt, then tokens until the answer is complete."""
    ids = torch.tensor([[0]])
    answer.put(ids)
    for character in text:
        token = torch.tensor([ord(character)])
        ids = torch.cat([ids, token[None]], dim=1)
        complete = answer.complete(ids)
        answer.put(token)
        if complete:
            break
    answer.end()


@pytest.mark.parametrize(
    ("generated", "shown"),
    [
        (" blue\nUser: and", "blue"),
        (" blue\nUse", "blue\nUse"),
        ("\nUser: x", ""),
        ("a\n\nUser:", "a\n"),
        ("a\nUs\nUser:", "a\nUs"),
    ],
)
def test_answer_stops_before_the_users_turn(capsys, generated, shown):
    """A model that speaks for the user, or the beginning of `User:` left on the screen."""
    answer = Answer(Characters(), sys.stdout, STOP)
    stream(answer, generated)
    assert capsys.readouterr().out == f"{shown}\n"
    assert answer.text == shown
    assert len(answer.tokens) == len(generated.partition(STOP)[0]) + 6 * (STOP in generated)


def test_ctrl_c_ends_the_answer_only():
    """Ctrl-C in an answer that ends the session; a handler that stays behind."""
    before = signal.getsignal(signal.SIGINT)
    answer = Answer(Characters())
    with interruptible(answer):
        signal.raise_signal(signal.SIGINT)
        stream(answer, "abc")
    assert (answer.text, answer.interrupted) == ("a", True)
    answer = Answer(Characters())
    with interruptible(answer):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second Ctrl-C did not end it")
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def chat(tiny_folder, tokenizer):
    """A session with the tiny model's own head, whose context is 256."""
    import flashhead

    model = flashhead.load(tiny_folder, "dense")
    return Chat(model, tokenizer, {"do_sample": False, "max_new_tokens": 100})


def test_chat_forgets_the_oldest(chat, capsys):
    """A second turn without the first, or a third that exceeds the context."""
    for i in range(3):
        chat.answer(" ".join([f"w{i + 3}"] * 40))
        assert chat.turns[-1].role == "assistant"
    assert len(chat.said) == 6
    assert [turn.text[:2] for turn in chat.turns[::2]] == ["w4", "w5"][-len(chat.turns) // 2 :]
    assert chat.totals()["new_tokens"] == sum(turn.new_tokens or 0 for turn in chat.said)
    assert capsys.readouterr().err.count("the context is full: the oldest 2 turns") >= 1
    turns = chat.turns
    chat.answer("w3 " * 300)
    assert "the context has room for 156" in capsys.readouterr().err
    assert chat.turns == turns
    chat.reset()
    assert chat.turns == []


def test_chat_keeps_an_answer_that_was_stopped(chat, monkeypatch, capsys):
    """A question left without its answer, so that the next prompt has two in a row."""
    put = Answer.put

    def put_and_interrupt(answer, ids):
        put(answer, ids)
        if len(answer.tokens) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Answer, "put", put_and_interrupt)
    chat.answer("w3 w4")
    assert [turn.role for turn in chat.turns] == ["user", "assistant"]
    tokens = chat.turns[1].new_tokens
    assert tokens in (2, 3)  # `generate` may ask whether to stop before it streams
    assert f"[stopped: {tokens} tokens" in capsys.readouterr().err


def test_chat_without_room(chat, tokenizer):
    """An answer as long as the context, found out in the middle of a conversation."""
    with pytest.raises(FlashHeadError, match="--max-new-tokens 256: wanted less than"):
        Chat(chat._model, tokenizer, {"max_new_tokens": 256})


def run_chat(folder: str, said: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """A conversation through a pipe."""
    command = [*CHAT, folder, *flags]
    return subprocess.run(command, input=said, capture_output=True, text=True, timeout=600)


def test_chat_commands(tiny_folder):
    """A command taken for a message, an unknown one that is silent, or lines after the end."""
    said = "/help\n\n/nope x\nw3\n/reset\nw4\n/exit\nw5\n"
    done = run_chat(tiny_folder, said, "--max-new-tokens", "4", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [turn["text"] for turn in document["turns"][::2]] == ["w3", "w4"]
    assert set(document["turns"][1]) == {"role", "text", "new_tokens", "tok_per_sec"}
    for line in ("[/reset  forget what was said]", "[/nope: no such command; wanted", "[forgotten"):
        assert done.stderr.count(line) == 1
    assert "> " not in done.stderr + done.stdout


def test_chat_ctrl_c_at_the_prompt(tiny_folder):
    """A traceback, or a session that cannot be left."""
    process = subprocess.Popen(
        [*CHAT, tiny_folder, "--max-new-tokens", "4"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        process.stdin.write("/nope\n")
        process.stdin.flush()
        while "/nope" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert stderr == "\ninterrupted\n"


@pytest.mark.model
def test_chat_remembers():
    """A model that answers each message as if it were the first, or figures in its text."""
    from flashhead.models import embedded_folder

    folder = str(embedded_folder("smollm2-135m"))
    said = "The secret word is banana.\nWhat is the secret word?\n"
    done = run_chat(folder, said, "--max-new-tokens", "8", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [turn["role"] for turn in document["turns"]] == ["user", "assistant"] * 2
    assert "banana" in document["turns"][3]["text"]
    assert document["totals"]["new_tokens"] <= 16
    assert len([line for line in done.stderr.splitlines() if "tok/s]" in line]) == 2
    plain = run_chat(folder, said, "--max-new-tokens", "8")
    assert plain.stdout.splitlines() == [turn["text"] for turn in document["turns"][1::2]]
