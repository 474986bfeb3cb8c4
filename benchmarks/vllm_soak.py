"""Does a vLLM server with FlashHead stand minutes of everything at once, and stay right?

    python benchmarks/vllm_soak.py --model FOLDER --minutes 10 --out benchmarks/results/soak.json

Concurrent clients (OpenAI's) send random requests (`soak_requests.py`), go away in the middle, and
send malformed bodies. Among them are greedy requests of a fixed set, whose answers must be the
dense head's, or part from them at a tie of its bf16 logits, which is listed.

The server is started here, twice. With FLASHHEAD_ENABLED=0 it answers the fixed set one by one, and
then stands the same load for a shorter time (`--control-minutes`): a bf16 body rounds a row
differently in batches of other sizes, so the dense head has several answers to a request, and all
that it gave count. Its memory is the control of FlashHead's.

It passes if nothing crashed, every answer had the status and the form wanted, no greedy answer was
wrong, no request was left over, resident memory of all of the server's processes did not grow (the
median of the last quarter against the second's), and heads were searched with every winner
certified. Exit code: 0, 1 (it failed; a document is written unless the server ended), 2 (a
mistake).
"""

import argparse
import asyncio
import collections
import dataclasses
import importlib.metadata
import json
import random
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from soak_clients import Tally, ask, client_of
from soak_requests import COMPLETIONS, Request, draw, fixed_set
from tqdm import tqdm

import flashhead.evaluate
from flashhead.environment import provenance
from flashhead.errors import FlashHeadError
from flashhead.integrations.vllm.openai_answers import Answer, ask_for_tokens, read_answers
from flashhead.integrations.vllm.serving import Server, ServerError

SAMPLE_SECONDS = 10.0
QUIET_SECONDS = 20.0
"""Requests whose clients left have so long to end."""
MOST_GROWTH = 0.03
MOST_LISTED = 50
ARGUMENTS = ("--served-model-name", "model", "--quantization", "flashhead", "--enforce-eager")
CONTEXT_TOKENS = 2048
BLOCKS = 96
"""Of the KV cache: so few that requests wait, or are begun again, for want of room."""
BLOCK_TOKENS = 128
ENVIRONMENT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8", "LRU_CACHE_CAPACITY": "8"}
"""Caches of oneDNN and torch, 1,024 kernels each by default. With those the worker grew by 328 MB
in 200 s of this load, and by 259 MB in 150 s with the dense head; with these, by 10 and 17 MB.
Presumably each number of rows is a kernel of its own.
"""
DENSE = {"FLASHHEAD_ENABLED": "0"}


@dataclasses.dataclass(frozen=True)
class Load:
    """What the clients send.

    Args:
        fixed: the greedy requests.
        tokens: a text that prompts are cut from.
        concurrency: clients at once.
        seed: of all that is random.
    """

    fixed: list[Request]
    tokens: list[int]
    concurrency: int
    seed: int


async def soak(server: Server, tally: Tally, load: Load, minutes: float, name: str) -> None:
    """All clients at once, and the clock beside them; in the end the fixed set, one by one."""
    fill_cache(server, load.tokens)
    start = time.monotonic()
    end = start + 60 * minutes

    async def one_client(client: Any, number: int) -> None:
        rng = random.Random(f"{load.seed}-{number}")
        while time.monotonic() < end:
            await ask(client, draw(rng, load.fixed, load.tokens), tally, rng)
            server.require_running()

    async def watch() -> None:
        with tqdm(total=round(60 * minutes), unit="s", desc=name) as bar:
            while (now := time.monotonic()) < end:
                if now - start >= SAMPLE_SECONDS * len(tally.memory):
                    resident = await asyncio.to_thread(resident_bytes, server)
                    tally.memory.append({"seconds": round(now - start, 1), **resident})
                bar.set_postfix(
                    requests=tally.outcomes.total(),
                    wrong=len(tally.wrong),
                    failed=len(tally.failures),
                    rss_mb=tally.memory[-1]["rss_bytes"] // 10**6,
                    refresh=False,
                )
                bar.update(round(now - start) - bar.n)
                await asyncio.sleep(1)
            bar.update(bar.total - bar.n)

    async with client_of(server) as client:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(watch())
                for number in range(load.concurrency):
                    group.create_task(one_client(client, number))
        except* ServerError as errors:
            raise errors.exceptions[0] from None
        rng = random.Random(load.seed)
        for request in load.fixed:
            assert isinstance(request.body, dict)
            body = {**request.body, "stream": False}
            await ask(client, dataclasses.replace(request, body=body), tally, rng)


def resident_bytes(server: Server) -> dict[str, Any]:
    """Resident memory of the server's processes, in all and by their names."""
    found: dict[str, int] = collections.Counter()
    for pid in server.processes():
        try:
            process = psutil.Process(pid)
            name = (process.cmdline() or ["?"])[0].rpartition("/")[2]
            found[name] += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return {"rss_bytes": sum(found.values()), "processes": dict(found)}


def memory_growth(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the second and of the last quarter; the first one warms up."""
    values = [sample["rss_bytes"] for sample in samples]
    quarter = len(values) // 4
    if quarter < 2:
        return {"growth": None, "reason": f"{len(values)} samples are too few to tell"}
    second = statistics.median(values[quarter : 2 * quarter])
    last = statistics.median(values[-quarter:])
    most, least = max(values), min(values)
    return {
        "second_quarter_bytes": second,
        "last_quarter_bytes": last,
        "growth": last / second - 1,
        "most_bytes": most,
        "least_bytes": least,
    }


def ask_dense(server: Server, fixed: list[Request]) -> list[Answer]:
    """The reference, one request after the other."""
    found = []
    for request in tqdm(fixed, desc="dense reference", unit="request"):
        assert isinstance(request.body, dict)
        body = {"model": "model", **ask_for_tokens(request.path, request.body)}
        (answer,) = read_answers(server.post(request.path, body))
        found.append(answer)
    return found


def text_tokens(server: Server) -> list[int]:
    """Texts in several languages, in the model's vocabulary."""
    folder = Path(flashhead.evaluate.__file__).parent / "sample_texts"
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt")))
    body = {"model": "model", "prompt": text, "add_special_tokens": False}
    return list(server.post("/tokenize", body)["tokens"])


def fill_cache(server: Server, tokens: list[int]) -> None:
    """Write to all of the KV cache: its memory becomes resident when it is first written to."""
    length = CONTEXT_TOKENS - BLOCK_TOKENS
    for number in range(2 * BLOCKS * BLOCK_TOKENS // length):
        prompt = [tokens[(7 * number + i) % len(tokens)] for i in range(length)]
        server.post(COMPLETIONS, {"model": "model", "prompt": prompt, "max_tokens": 1})


def requests_left(server: Server) -> int:
    """Requests that the engine still has, once those of clients that left had time to end."""
    deadline = time.monotonic() + QUIET_SECONDS
    while True:
        metrics = server.send("GET", "/metrics")[1].decode()
        counts = re.findall(r"^vllm:num_requests_(?:running|waiting)\{.*\} (\S+)$", metrics, re.M)
        left = round(sum(map(float, counts)))
        if (counts and not left) or time.monotonic() > deadline:
            return left if counts else -1
        time.sleep(0.5)


def run(args: argparse.Namespace, log: Path) -> dict[str, Any]:
    """Dense, then FlashHead, then the verdict."""
    more = [*ARGUMENTS, "--max-model-len", str(CONTEXT_TOKENS)]
    more += ["--num-gpu-blocks-override", str(BLOCKS), "--block-size", str(BLOCK_TOKENS)]
    if args.crossover is not None:
        options = {"flashhead_options": {"crossover": args.crossover}}
        more += ["--hf-overrides", json.dumps(options)]
    with Server(args.model, *more, log=log, environment=ENVIRONMENT | DENSE) as server:
        tokens = text_tokens(server)
        load = Load(fixed_set(tokens), tokens, args.concurrency, args.seed)
        dense = [[answer] for answer in ask_dense(server, load.fixed)]
        control = Tally(dense, learns=True)
        asyncio.run(soak(server, control, load, args.control_minutes, "dense, under load"))
    tally = Tally(dense)
    with Server(args.model, *more, log=log, environment=ENVIRONMENT) as server:
        before = server.statistics()
        started = time.monotonic()
        asyncio.run(soak(server, tally, load, args.minutes, "FlashHead, under load"))
        seconds = time.monotonic() - started
        left = requests_left(server)
        after, healthy = server.statistics(), server.is_healthy()
    memory = memory_growth(tally.memory)
    failures = verdict(tally, memory, left, healthy, before, after)
    return {
        "passed": not failures,
        "failures": failures[:MOST_LISTED],
        "model": str(args.model),
        "minutes": args.minutes,
        "seconds": round(seconds, 1),
        "concurrency": args.concurrency,
        "seed": args.seed,
        "crossover": args.crossover,
        "environment": ENVIRONMENT,
        "requests": by_kind(tally.outcomes),
        "greedy": dict(tally.greedy),
        "ties": [
            {"request": number, **dataclasses.asdict(found), "times": times}
            for (number, found), times in sorted(tally.ties.items(), key=str)
        ],
        "wrong": tally.wrong[:MOST_LISTED],
        "memory": {**memory, "samples": tally.memory},
        "requests_left": left,
        "healthy": healthy,
        "statistics": {"before": before, "after": after},
        "control": {
            "minutes": args.control_minutes,
            "requests": by_kind(control.outcomes),
            "greedy": dict(control.greedy),
            "failures": control.failures[:MOST_LISTED],
            "memory": {**memory_growth(control.memory), "samples": control.memory},
        },
        **provenance(),
        "packages": {
            name: importlib.metadata.version(name) for name in ("openai", vllm_distribution())
        },
    }


def vllm_distribution() -> str:
    """The name under which vLLM is installed."""
    names = importlib.metadata.packages_distributions().get("vllm", [])
    return next(iter(names), "vllm")


def verdict(
    tally: Tally,
    growth: dict[str, Any],
    left: int,
    healthy: bool,
    before: list[dict[str, Any]],
    after: list[dict[str, Any]],
) -> list[str]:
    """Everything that is not as it should be."""
    failures = list(tally.failures)
    if tally.wrong:
        failures.append(f"{len(tally.wrong)} greedy answers are wrong")
    if not tally.greedy["equal"]:
        failures.append("no greedy answer was equal")
    if growth["growth"] is not None and growth["growth"] > MOST_GROWTH:
        failures.append(f"resident memory grew by {growth['growth']:.1%}")
    if left:
        failures.append(f"{left} requests were left over")
    if not healthy:
        failures.append("the server does not answer /health")
    rows = [sum(head["searched_rows"] for head in heads) for heads in (before, after)]
    if rows[1] <= rows[0]:
        failures.append("no row was searched")
    failures += [
        f"{head['layer']}: {head['certified_fraction']:.2%} of the searched rows are certified"
        for head in after
        if head["certified_fraction"] != 1
    ]
    return failures


def by_kind(outcomes: collections.Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """Counts of outcomes by the kind of request."""
    found: dict[str, dict[str, int]] = {}
    for (kind, outcome), count in sorted(outcomes.items()):
        found.setdefault(kind, {})[outcome] = count
    return found


def summary(document: dict[str, Any]) -> str:
    """A few lines for the screen."""
    lines = [f"{document['seconds']:.0f} s, {document['concurrency']} clients at once"]
    for kind, outcomes in document["requests"].items():
        lines.append(f"  {kind:10} {listed(outcomes)}")
    lines.append(f"greedy answers: {listed(document['greedy'])}")
    lines += [f"  tie: {tie}" for tie in document["ties"]]
    lines.append(f"dense control, greedy answers: {listed(document['control']['greedy'])}")
    lines.append(f"resident memory: {memory_line(document['memory'])}")
    lines.append(f"  of the dense control: {memory_line(document['control']['memory'])}")
    for head in document["statistics"]["after"]:
        lines.append(
            f"{head['layer']}: {head['searched_rows']} rows searched ({head['bytes_fraction']:.1%} "
            f"of the bytes, {head['certified_fraction']:.2%} certified), {head['dense_rows']} dense"
        )
    lines += [f"FAILED: {failure}" for failure in document["failures"]]
    return "\n".join([*lines, "passed" if document["passed"] else "failed"])


def listed(counts: dict[str, int]) -> str:
    """Names with their counts."""
    return ", ".join(f"{name}: {count}" for name, count in counts.items())


def memory_line(memory: dict[str, Any]) -> str:
    """Growth and range, for the screen."""
    if memory["growth"] is None:
        return str(memory["reason"])
    names = ("second_quarter_bytes", "last_quarter_bytes", "least_bytes", "most_bytes")
    second, last, least, most = (memory[name] / 1e6 for name in names)
    return (
        f"second quarter {second:.0f} MB, last {last:.0f} MB ({memory['growth']:+.2%}), "
        f"all {least:.0f} to {most:.0f} MB"
    )


def main() -> int:
    """Parse, soak, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument(
        "--control-minutes", type=float, help="of the dense server (default: a fifth of --minutes)"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--crossover", type=int, help="rows searched at once (default: measured)")
    parser.add_argument("--log", type=Path, help="file for what the servers print")
    args = parser.parse_args()
    if args.control_minutes is None:
        args.control_minutes = args.minutes / 5
    try:
        if not (args.model / "config.json").is_file():
            raise FlashHeadError(f"--model {args.model}: no config.json there; wanted a folder")
        if min(args.minutes, args.control_minutes) <= 0 or args.concurrency < 1:
            raise FlashHeadError("minutes and --concurrency: wanted more than 0")
        if not args.out.absolute().parent.is_dir():
            raise FlashHeadError(f"--out {args.out}: its folder does not exist")
        with tempfile.TemporaryDirectory() as folder:
            document = run(args, args.log or Path(folder) / "server.log")
    except (FlashHeadError, ServerError) as error:
        print(f"vllm_soak: {error}", file=sys.stderr)
        return 2 if isinstance(error, FlashHeadError) else 1
    except KeyboardInterrupt:
        print("vllm_soak: stopped; the server has ended, nothing is written", file=sys.stderr)
        return 130
    partial = args.out.with_name(f".{args.out.name}.partial")
    partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    partial.replace(args.out)
    print(summary(document))
    return 0 if document["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
