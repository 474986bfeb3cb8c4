"""Latent attention at several sizes, closed form and healed, beside rounded caches of the original.

    python benchmarks/latent_table.py smollm2-135m --data wiki.txt --cases 2:bf16,8:mixed \\
        --heal-tokens 10000000 --device cuda --out table.json

Every step is a `flashhead` command of its own (convert, eval, heal), printed before it runs. All
conversions run side by side; healing text is sampled once and shared. The document is written after
every step; what fails is in it, and the exit code is then 1.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from flashhead.environment import provenance

SHARED_TEXT = ".heal-text-0.safetensors"
LOG_TAIL = 1500


class Table:
    """The document, and how commands are run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.started = time.monotonic()
        self.document: dict[str, Any] = {"benchmark": "latent_table", "cases": {}, "failed": []}
        args.work.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, *command: str) -> subprocess.Popen[str]:
        """Start a command of flashhead; its output goes to a log."""
        line = [sys.executable, "-m", "flashhead", *command, "--json"]
        print(
            f"[{time.monotonic() - self.started:.0f} s] flashhead {' '.join(command)}", flush=True
        )
        log = (self.args.work / f"{name}.log").open("w")
        return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=log, text=True)

    def finish(self, name: str, process: subprocess.Popen[str]) -> Any:
        """Its document; None and a line in `failed` if it ended with an error."""
        out, _ = process.communicate()
        if process.returncode == 0:
            return json.loads(out.splitlines()[-1])
        tail = (self.args.work / f"{name}.log").read_text(errors="replace")[-LOG_TAIL:]
        print(f"{name} ended with {process.returncode}: {tail}", flush=True)
        self.document["failed"].append(name)
        return None

    def keep(self, case: str, **parts: Any) -> None:
        """Write the document with these parts of a case."""
        self.document["cases"].setdefault(case, {}).update(parts)
        self.document["seconds"] = round(time.monotonic() - self.started, 1)
        if self.args.out:
            self.args.out.write_text(json.dumps(self.document | _provenance(), indent=1) + "\n")

    def evaluate(self, case: str, folder: Path, step: str) -> None:
        """Perplexity through the cache."""
        name = f"{case}-{step}".replace(":", "-")
        command = ["eval", str(folder), "--against", self.args.model, "--data", str(self.args.data)]
        command += ["--limit", str(self.args.limit), "--device", self.args.device]
        document = self.finish(name, self.start(name, *command))
        if document is not None:
            task = document["tasks"]["perplexity"]
            rows = {row: round(own["ratio"], 4) for row, own in task["rows"].items()}
            print(case, step, rows, flush=True)
            self.keep(case, **{step: task})


def _provenance() -> dict[str, Any]:
    document = provenance()
    document["argv"] = [Path(a).name if Path(a).exists() else a for a in document["argv"]]
    return document


def convert_all(table: Table, cases: list[str]) -> dict[str, Path]:
    """Folders of all cases, made side by side."""
    args = table.args
    threads = max(1, (os.cpu_count() or 1) // max(1, len(cases)))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    running = {}
    for case in cases:
        ratio, kind = case.split(":")
        folder = args.work / f"latent-{ratio}x-{kind}"
        shutil.rmtree(folder, ignore_errors=True)
        command = ["convert", args.model, str(folder), "--attention", "latent", "--head", "dense"]
        command += ["--kv-ratio", ratio, "--kv-dtype", kind]
        running[case] = folder, table.start(folder.name, *command)
    folders = {}
    for case, (folder, process) in running.items():
        document = table.finish(folder.name, process)
        if document is not None:
            table.keep(case, convert=document.get("latent", document))
            folders[case] = folder
    os.environ.pop("OMP_NUM_THREADS")
    return folders


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cases", default="2:bf16,8:mixed", help="RATIO:KV_DTYPE, ...")
    parser.add_argument("--heal-cases", help="of these (default: all)")
    parser.add_argument("--heal-tokens", type=int, default=0, help="0: closed form only")
    parser.add_argument("--heal-arguments", default="--stage b", help="of flashhead heal")
    parser.add_argument("--limit", type=int, default=16352)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("latent-table"))
    parser.add_argument("--skip-convert", action="store_true", help="folders are in --work")
    parser.add_argument("--skip-closed-form", action="store_true", help="measured before")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    table = Table(args)
    cases = args.cases.split(",")
    if args.skip_convert:
        folders = {c: args.work / "latent-{}x-{}".format(*c.split(":")) for c in cases}
    else:
        folders = convert_all(table, cases)
    for case, folder in folders.items():
        if not args.skip_closed_form:
            table.evaluate(case, folder, "closed_form")
    healed = args.heal_cases.split(",") if args.heal_cases else cases
    text = args.work / SHARED_TEXT
    for case in [case for case in healed if args.heal_tokens and case in folders]:
        folder = folders[case]
        if text.exists():
            shutil.copy(text, folder / SHARED_TEXT)
        command = ["heal", str(folder), "--teacher", args.model, "--device", args.device]
        command += ["--tokens", str(args.heal_tokens), *args.heal_arguments.split()]
        name = f"{folder.name}-heal"
        document = table.finish(name, table.start(name, *command))
        if (folder / SHARED_TEXT).exists() and not text.exists():
            shutil.copy(folder / SHARED_TEXT, text)
        if document is not None:
            table.keep(case, heal=document)
            print(case, "heal", document["held_out"], document["seconds"], "s", flush=True)
            table.evaluate(case, folder, "healed")
    return 1 if table.document["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
