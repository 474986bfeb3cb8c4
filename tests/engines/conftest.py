"""Tests in real engines; they run where vLLM is installed: `make test-vllm`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compare import PROMPTS, TOKENS, UNSET, inherited

from flashhead.integrations.vllm.serving import Server

HERE = Path(__file__).parent

SEARCHED_ROWS = 16
"""A crossover that is given: measured on a busy machine it could be 0, and nothing searched."""
LOG_LINES = 80


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A failed test shows the end of its server's log."""
    report = yield
    for server in getattr(item, "funcargs", {}).values():
        if report.failed and isinstance(server, Server) and server.log.exists():
            report.sections.append((f"log of {server.url}", server.log_tail(LOG_LINES)))
    return report


@pytest.fixture(scope="session")
def converted_folder(tmp_path_factory) -> Path:
    """SmolLM2-135M with an index, as `flashhead convert` writes it; the crossover is added."""
    out = tmp_path_factory.mktemp("converted") / "smollm2"
    command = [sys.executable, "-m", "flashhead.cli", "convert", "smollm2-135m", str(out)]
    kept = {name: value for name, value in os.environ.items() if name not in UNSET}
    done = subprocess.run(
        [*command, "--set", "calibration_tokens=1024"],
        env=kept,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "flashhead"}
    config["quantization_config"]["crossover"] = SEARCHED_ROWS
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.fixture(scope="session")
def start_server(converted_folder, tmp_path_factory):
    """A function that makes a server of the converted folder: plain `vllm serve FOLDER`."""

    def make(name: str, **environment: str) -> Server:
        return Server(
            converted_folder,
            *("--served-model-name", "model", "--enforce-eager", "--max-model-len", "1024"),
            log=tmp_path_factory.mktemp(name) / "server.log",
            environment={**dict.fromkeys(UNSET), **environment},
        )

    return make


@pytest.fixture
def generate(tmp_path):
    """Greedy texts of one engine in a process of its own."""

    def run(engine, *, dense=False, params=None, lora=None, prompts=PROMPTS, **environment):
        greedy = {"temperature": 0, "max_tokens": TOKENS}
        if dense:
            engine = {**engine, "logprobs_mode": "raw_logits"}
            greedy["logprobs"] = 5
        job = {
            "engine": {"quantization": "flashhead", **engine},
            "prompts": prompts,
            "params": params or [greedy] * len(prompts),
            "lora": lora or [None] * len(prompts),
        }
        out = tmp_path / "answer.json"
        out.unlink(missing_ok=True)
        kept = {"VLLM_CPU_KVCACHE_SPACE": "1", "FLASHHEAD_ENABLED": "0" if dense else "1"}
        done = subprocess.run(
            [sys.executable, str(HERE / "generate.py"), json.dumps(job), str(out)],
            env=inherited() | kept | environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        answer = json.loads(out.read_text()) | {"log": done.stdout + done.stderr}
        assert bool(answer["heads"]) != dense
        return answer

    return run
