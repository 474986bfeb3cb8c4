"""The command line as a user meets it: fresh processes, exit codes, one line for a mistake."""

import functools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flashhead.cli import inspect, main
from flashhead.errors import FlashHeadError

COMMANDS = (
    (),
    ("demo",),
    ("generate",),
    ("convert",),
    ("verify",),
    ("push",),
    ("inspect",),
    ("tune",),
    ("serve",),
    ("chat",),
    ("playground",),
    ("eval",),
    ("eval", "head"),
    ("eval", "logprobs"),
    ("eval", "sampling"),
    ("eval", "frontier"),
    ("eval", "model"),
    ("report",),
    ("bench",),
    ("bench", "head"),
    ("bench", "decode"),
)
GENERATE = ("generate", "--model", "gemma-3-270m", "--prompt", "x")
MISTAKES = {
    (): "COMMAND",
    ("nonsense",): "invalid choice: 'nonsense'",
    ("eval",): "WHAT",
    ("generate",): "--model",
    (
        "demo",
        "--max-new-tokens",
        "1",
    ): "argument --max-new-tokens: '1': wanted an integer, 2 or more",
    ("demo", "--repeats", "x"): "argument --repeats: 'x': wanted an integer",
    (
        "demo",
        "--model",
        "./nowhere",
    ): "model './nowhere': no such file or folder; wanted gemma-3-270m",
    ("demo", "--set", "bits"): "argument --set: 'bits': wanted NAME=VALUE",
    ("demo", "--set", "bits=many"): "--set bits=many: wanted float",
    ("demo", "--set", "bits=99"): "bits=99.0: wanted 1 to 4, or None",
    ("demo", "--set", "probes=9"): "unknown option 'probes'",
    ("demo", "--head", "clusters", "--set", "always=1,x"): "wanted token ids",
    ("demo", "--head", "dense"): "argument --head: invalid choice: 'dense'",
    ("demo", "--mod", "smollm2-135m"): "unrecognized arguments: --mod",
    (*GENERATE, "--temperature", "-1"): "argument --temperature: '-1': wanted 0 (greedy) or more",
    (*GENERATE, "--temperature", "nan"): "argument --temperature: 'nan'",
    (*GENERATE, "--top-p", "1.5"): "argument --top-p: '1.5': wanted above 0 and at most 1",
    (*GENERATE, "--top-p", "0.5"): "--top-p without --temperature",
    (*GENERATE, "--seed", "-1"): "argument --seed: '-1'",
    (*GENERATE[:3], "--prompt", " "): "the prompt is empty",
    GENERATE[:3]: "the prompt is empty",
    ("inspect", "gemma-3-270m", "--context", "0"): "argument --context: '0'",
    ("inspect", "/nowhere"): "model '/nowhere': no such file or folder",
    ("inspect", "x.gguf"): "model 'x.gguf': no such file or folder",
    ("tune",): "one of the arguments --model --list --clear is required",
    ("tune", "--list", "--clear"): "argument --clear: not allowed with argument --list",
    ("tune", "--list", "--head", "codes"): "--head without --model",
    ("tune", "--model", "/nowhere"): "model '/nowhere': no such file or folder",
    ("tune", "--model", "x", "--repeats", "8"): "argument --repeats: '8': wanted an integer, 9",
    ("convert",): "MODEL",
    ("convert", "x", "--quantize", "w3a16"): "argument --quantize: invalid choice: 'w3a16'",
    ("convert", "x", "--head", "dense", "--set", "bits=2"): "--head dense with --set",
    ("verify",): "OUT",
    ("verify", "/nowhere"): "argument OUT: '/nowhere': no such folder",
    ("verify", ".", "--positions", "1"): "argument --positions: '1': wanted an integer, 2 or more",
    ("verify", ".", "--data", "no.txt"): "argument --data: 'no.txt': no such file",
    ("push", "."): "REPO",
    ("push", "/nowhere", "a/b"): "argument OUT: '/nowhere': no such folder",
    ("push", ".", "a/b", "--token-file", "no"): "argument --token-file: 'no': no such file",
    ("convert", "gemma-3-270m", "."): ". exists: nothing is written over",
    ("eval", "head", "--model", "gemma-3-270m", "--data", "no.txt"): "'no.txt': no such file",
    ("eval", "sampling", "--temperatures", "0.5,0"): "argument --temperatures: '0': wanted above 0",
    ("eval", "sampling", "--top-p", "1"): "argument --top-p: '1': wanted above 0 and below 1",
    ("eval", "head", "--model", "gemma-3-270m", "--methods", "int8,int3"): (
        "argument --methods: 'int3': wanted all, flashhead"
    ),
    ("eval", "head", "--model", "x", "--data", "README.md", "--failure-probability", "0"): (
        "--failure-probability without --certified"
    ),
    ("eval", "head", "--model", "x", "--failure-probability", "0.5"): (
        "argument --failure-probability: '0.5'"
    ),
    (
        "eval",
        "frontier",
        "--model",
        "x",
        "--data",
        "README.md",
        "--methods",
        "bf16",
        "--skip",
        "bf16,int8",
    ): "--skip leaves no",
    ("report",): "RESULTS",
    ("report", "no.json", "--out", "x.html"): "argument RESULTS: 'no.json': no such file",
    ("report", "README.md"): "--out",
    ("eval", "frontier"): "--model is missing: wanted --model and --data, or --from JSON",
    ("eval", "frontier", "--model", "gemma-3-270m"): "--data is missing",
    ("eval", "frontier", "--from", "no.json"): "argument --from: 'no.json': no such file",
    ("eval", "frontier", "--from", "README.md", "--model", "x"): "--model and --data are not",
    ("eval", "frontier", "--from", "README.md"): "README.md: not JSON",
    ("eval", "frontier", "--out-dir", "nowhere"): "argument --out-dir: 'nowhere': no such folder",
    ("bench", "head", "--model", "gemma-3-270m", "--batches", "1,0"): "argument --batches",
}


def flashhead(*args: str, code: str = "", **kwargs) -> subprocess.CompletedProcess[str]:
    """Run the command line in a fresh process; `code` runs before it."""
    program = (
        f"import sys\n{code}\nfrom flashhead.cli import main\n"
        "try:\n    status = main()\nexcept SystemExit as stop:\n    status = stop.code\n"
        "if 'torch' in sys.modules: print('TORCH', file=sys.stderr)\n"
        "sys.exit(status)"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *args],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=600,
        **kwargs,
    )


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_without_torch(command):
    """A help page that takes seconds, or a `%` in a help text that breaks it."""
    done = flashhead(*command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {' '.join(['flashhead', *command])}".rstrip())


def test_version():
    """Two version sources that part."""
    done = flashhead("--version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "flashhead")


@pytest.mark.parametrize("args", MISTAKES, ids=" ".join)
def test_mistake_is_one_line(args):
    """A traceback, a usage page, or the wait for torch, for a mistyped argument."""
    done = flashhead(*args)
    assert done.returncode == 2
    assert done.stdout == ""
    assert MISTAKES[args] in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_missing_extra_names_the_fix(tmp_path):
    """ModuleNotFoundError in the user's face."""
    (tmp_path / "config.json").write_text("{}")
    done = flashhead(
        *("generate", "--model", str(tmp_path), "--prompt", "x"),
        code="sys.modules['transformers'] = None",
    )
    assert done.returncode == 2
    assert "flashhead: transformers is not installed: pip install 'flashhead[transformers]'" in (
        done.stderr
    )
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback():
    """A mistake that cannot be traced to its place."""
    done = flashhead("inspect", "/nowhere", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("flashhead: model '/nowhere'")


def command_that(action, monkeypatch, *flags: str) -> int:
    """`main` with a subcommand that does something else."""
    monkeypatch.setattr(inspect, "run", action)
    return main(["inspect", "gemma-3-270m", *flags])


def raising(error):
    """A subcommand that fails."""

    def run(_args):
        raise error

    return run


@pytest.mark.parametrize(
    "error", [ZeroDivisionError(), ImportError("no", name="secrets"), OSError()]
)
def test_a_bug_stays_a_bug(monkeypatch, error):
    """A broad except that turns our bugs into the user's mistakes."""
    with pytest.raises(type(error)):
        command_that(raising(error), monkeypatch)


def test_mistake_inside_is_one_line(monkeypatch, capsys):
    """An error text of several lines."""
    assert command_that(raising(FlashHeadError("two\nlines")), monkeypatch) == 2
    assert capsys.readouterr() == ("", "flashhead: two lines\n")


def test_ctrl_c(monkeypatch, capsys):
    """A traceback after Ctrl-C."""
    assert command_that(raising(KeyboardInterrupt()), monkeypatch) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_json_is_all_of_stdout(monkeypatch, capsys):
    """A library that prints into the document."""

    def run(_args):
        print("for people")
        return {"value": 1.5}

    assert command_that(run, monkeypatch, "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"value": 1.5}
    assert captured.out.count("\n") == 1
    assert captured.err == "for people\n"


def test_reader_that_has_seen_enough(tmp_path):
    """BrokenPipeError after `flashhead inspect ... | head -1`."""
    model_folder(tmp_path)
    done = subprocess.run(
        f"{sys.executable} -m flashhead.cli inspect {tmp_path} | true",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""


def model_folder(folder: Path, tied: bool = True, **config) -> None:
    """A model with V = 1000, d = 64, two layers: headers, and a hole where the weights would be."""
    shapes = {
        "embed.weight": [1000, 64],
        "layer.0.weight": [64, 256],
        "layer.1.weight": [256, 64],
        "norm.weight": [64],
    }
    if not tied:
        shapes["out.weight"] = [1000, 64]
    header = {
        name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]}
        for name, shape in shapes.items()
    }
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    weights = sum(2 * math.prod(shape) for shape in shapes.values())
    os.truncate(folder / "model.safetensors", 8 + len(text) + weights)
    known = {
        "vocab_size": 1000,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    (folder / "config.json").write_text(json.dumps({**known, **config}))


@pytest.mark.parametrize("tied", [True, False])
def test_inspect_counts_bytes_from_headers(tmp_path, tied):
    """The input embedding counted as body, or weights loaded to measure them."""
    model_folder(tmp_path, tied)
    done = flashhead("inspect", str(tmp_path), "--context", "100", "--json")
    assert done.returncode == 0, done.stderr
    assert "TORCH" not in done.stderr
    document = json.loads(done.stdout)
    assert document["bytes_per_token"] == {
        "head": 1000 * 64 * 2,
        "kv": 2 * 100 * 2 * 2 * 16 * 2,
        "body": (2 * 64 * 256 + 64 + 64) * 2,  # and one row of the embedding table
        "total": 128_000 + 25_600 + 65_792,
    }
    assert document["tied"] is tied
    assert sum(document["share"].values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "no config.json"),
        ("config.json", "{", "not JSON"),
        ("config.json", "{}", "the config names no vocab_size"),
        ("model.safetensors", None, "no model*.safetensors"),
        ("model.safetensors", "short", "not a safetensors file"),
        ("model.safetensors", "a" * 100, "not a safetensors file"),
    ],
)
def test_inspect_damaged_folder(tmp_path, file, content, message):
    """A traceback of json or struct."""
    model_folder(tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    done = flashhead("inspect", str(tmp_path))
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_inspect_a_download_that_stopped(tmp_path):
    """Catches figures of a file whose header is all there and whose weights are not."""
    model_folder(tmp_path)
    file = tmp_path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    done = flashhead("inspect", str(tmp_path))
    assert done.returncode == 2
    assert "model.safetensors: " in done.stderr
    assert "(truncated?)" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_inspect_gguf(tmp_path):
    """Shapes of a GGUF read the wrong way round, or its quantized size taken for the loaded one."""
    gguf = pytest.importorskip("gguf")
    import numpy as np

    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_tensor("token_embd.weight", np.zeros((1000, 64), dtype=np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((64, 32), dtype=np.float32))
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    done = flashhead("inspect", str(tmp_path / "a.gguf"), "--context", "10", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes_per_token"] == {
        "head": 128_000,
        "kv": 2 * 10 * 2 * 2 * 16 * 2,
        "body": (64 * 32 + 64) * 2,
        "total": 128_000 + 2560 + 4224,
    }
    (tmp_path / "b.gguf").write_bytes(b"no gguf")
    done = flashhead("inspect", str(tmp_path / "b.gguf"))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "not a GGUF file" in done.stderr


def last_document(done: subprocess.CompletedProcess[str]) -> dict:
    """The JSON document of a run that went well."""
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def smollm2() -> str:
    """The smallest real model, in the user's cache."""
    from flashhead.models import embedded_folder

    return str(embedded_folder("smollm2-135m"))


@pytest.fixture(scope="module")
def converted(smollm2, tmp_path_factory) -> Path:
    """The same with an index, written by the command line."""
    out = tmp_path_factory.mktemp("convert") / "out"
    done = flashhead("convert", smollm2, str(out), "--set", "calibration_tokens=1024", "--json")
    report = last_document(done)
    assert report["index_bytes"] > 0
    return out


@pytest.mark.model
def test_convert_inspect_generate(converted):
    """A folder that one command writes and the next cannot use."""
    document = last_document(flashhead("inspect", str(converted), "--json"))
    assert document["index"]["measured"]
    assert document["index"]["kind"] == "codes"
    assert 0.05 < document["index"]["bytes_fraction"] < 0.25
    prompt = ("generate", "--model", str(converted), "--prompt", "Name a colour.", "--json")
    # a busy machine may measure that the dense product is faster: here the search must run
    flash = last_document(flashhead(*prompt, "--max-new-tokens", "8", "--crossover", "8"))
    dense = last_document(flashhead(*prompt, "--max-new-tokens", "8", "--dense"))
    assert (flash["head"], dense["head"]) == ("codes", "dense")
    assert 0 < flash["bytes_fraction"] < 1
    assert "bytes_fraction" not in dense
    assert flash["text"]
    done = flashhead("convert", str(converted), str(converted))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


@pytest.mark.model
def test_generate_streams_and_reads_stdin(converted):
    """Text on stderr, figures on stdout, or a prompt from a pipe that is not read."""
    sampled = ("--temperature", "1", "--top-p", "0.9", "--seed", "7", "--max-new-tokens", "8")
    command = [sys.executable, "-m", "flashhead.cli", "generate", "--model", str(converted)]
    runs = [
        subprocess.run([*command, *sampled], input="Name a colour.", capture_output=True, text=True)
        for _ in range(2)
    ]
    assert runs[0].returncode == 0, runs[0].stderr
    assert runs[0].stdout == runs[1].stdout
    assert runs[0].stdout.strip()
    assert "8 tokens" in runs[0].stderr or "tok/s" in runs[0].stderr


@pytest.mark.model
def test_generate_interrupted(converted):
    """A traceback, or a run that goes on, after Ctrl-C in the middle of a text."""
    command = [sys.executable, "-m", "flashhead.cli", "generate", "--model", str(converted)]
    command += ["--prompt", "Tell a long story.", "--max-new-tokens", "2000"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background job, as CI may be, hands down an ignored SIGINT
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert stderr.endswith("interrupted\n")


@pytest.mark.model
def test_demo(smollm2):
    """A demo that does not end in its document."""
    short = ("--max-new-tokens", "4", "--repeats", "1", "--set", "calibration_tokens=1024")
    short += ("--crossover", "8")
    document = last_document(flashhead("demo", "--model", smollm2, *short, "--json"))
    wanted = {"model", "dense_tok_per_sec", "flash_tok_per_sec", "speedup", "agreement"}
    assert wanted | {"bytes_fraction", "certified_fraction"} <= set(document)
    assert document["new_tokens"] == 4
    assert document["speedup"] == pytest.approx(
        document["flash_tok_per_sec"] / document["dense_tok_per_sec"]
    )
    assert len(document["differing_steps"]) == round((1 - document["agreement"]) * 4)
    done = flashhead("demo", "--model", smollm2, *short)
    assert done.returncode == 0
    assert "little to gain" in done.stdout


@pytest.mark.model
def test_eval_and_bench(converted, tmp_path):
    """Arguments that the evaluation and the benchmarks do not take."""
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog near the old river bank. " * 40)
    out = tmp_path / "out.json"
    model = ("--model", str(converted))
    common = ("--data", str(text), "--positions", "64", "--out", str(out), "--json")
    document = last_document(flashhead("eval", "head", *model, *common))
    assert document == json.loads(out.read_text())
    assert {"agreement", "kl", "tv", "bytes_fraction", "methods"} <= set(document)
    short = ("--batches", "1,2", "--repeats", "2", "--json")
    assert last_document(flashhead("bench", "head", *model, *short))["rows"]
    short = ("--new-tokens", "4", "--repeats", "1", "--json")
    assert last_document(flashhead("bench", "decode", *model, *short))["speedup"] > 0


def test_convert_tells_the_choice(tiny_folder, tmp_path, capsys):
    """A choice of bits that nobody can look up afterwards, or a table of another index."""
    few = ("--set", "calibration_tokens=128")
    assert main(["convert", tiny_folder, str(tmp_path / "a"), *few, "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    expected, built = report["expectation"], report["parameters"]["options"]
    for name in ("bits", "planes", "kl_budget"):
        assert expected[name] == built[name]
    assert expected["chosen"] in expected["table"]
    assert (expected["chosen"]["bits"], expected["chosen"]["planes"]) == (
        *(built["bits"], built["planes"]),
    )
    (line,) = (line for line in captured.err.splitlines() if line.endswith("  built"))
    assert line.split()[:2] == [f"{built['bits']:g}", str(built["planes"])]
    assert f"KL at most {built['kl_budget']:.1e}" in captured.err
    options = ("--head", "clusters", "--set", "probes=2")
    assert main(["convert", tiny_folder, str(tmp_path / "b"), *few, *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["expectation"] is None


def test_eval_head_certified(tiny_folder, tmp_path, capsys):
    """A mode that runs with another failure probability than the one asked for."""
    text = tmp_path / "words.txt"
    text.write_text(" ".join(f"w{3 + 7 * i % 500}" for i in range(400)))
    command = ["eval", "head", "--model", tiny_folder, "--set", "calibration_tokens=128"]
    command += ["--data", str(text), "--positions", "20", "--certified", "--json"]
    fractions = []
    for options in ([], ["--failure-probability", "0"]):
        assert main([*command, *options]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["failure_probability"] == (0 if options else 1e-6)
        assert (document["certified_agreement"], document["certified_wrong"]) == (1, 0)
        assert 0 <= document["fallback_fraction"] <= 1
        fractions.append(document["certified_bytes_fraction"])
    assert fractions[0] < fractions[1]
