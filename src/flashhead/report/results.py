"""Result files that a report is made of: which kind each is, and whether its figures hold together.

A report rests on its files, so a field that is missing, of another type, not finite, or at odds
with another field is an error that names the file and the field. Evaluations carry a checksum of
themselves.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flashhead.errors import FlashHeadError
from flashhead.report.documents import read_json

SCHEMA = 1
SLACK = 1e-9
_PROVENANCE = {"hardware": dict, "versions": dict, "argv": list}
_TASK = {
    "metric": str,
    "n": int,
    "base": float,
    "value": float,
    "agreement": float,
    "kl": dict,
    "examples": list,
    "seconds": dict,
}
_EXAMPLE = {
    "prompt": str,
    "common": str,
    "base": str,
    "value": str,
    "position": int,
    "candidates": list,
}
_CANDIDATE = {"text": str, "token": int, "base_logit": float, "value_logit": float}
_WANTED: dict[str, dict[str, type]] = {
    "evaluation": {"tasks": dict, "greedy": dict, "sides": dict, "model": str, "against": str},
    "decode": {"model": str, "eager": dict, "new_tokens": int, "repeats": int},
    "head": {"model": str, "rows": list, "impl": str},
    "frontier": {"model": str, "methods": dict, "positions": int, "data": str},
}
_SIDE = {"tok_per_sec": float, "tok_per_sec_p10": float, "tok_per_sec_p90": float}
_HEAD_ROW = {"batch": int, "method": str, "median_ms": float, "bytes_read": float, "ratio": float}
_METHOD = {"series": str, "point": str, "agreement": float, "bytes_fraction": float}


@dataclasses.dataclass(frozen=True)
class Result:
    """One file.

    Args:
        name: of the file.
        kind: "evaluation", "decode", "head" or "frontier".
        document: what it holds.
    """

    name: str
    kind: str
    document: dict[str, Any]


def read_results(paths: Sequence[Path]) -> list[Result]:
    """Read and check result files.

    Raises:
        FlashHeadError: not there, no JSON, of no known kind, or fields that do not hold.
    """
    results = []
    for path in paths:
        document = read_json(path)
        kind = _kind(document)
        if kind is None:
            raise FlashHeadError(
                f"{path}: wanted a document of flashhead eval MODEL --against BASE, eval frontier, "
                "eval head, bench decode or bench head"
            )
        check = _Check(path)
        check.fields(document, _WANTED[kind], "")
        check.fields(document, _PROVENANCE, "")
        check.finite(document, "")
        {"evaluation": _evaluation, "decode": _decode, "head": _head, "frontier": _frontier}[kind](
            check, document
        )
        results.append(Result(path.name, kind, document))
    return results


def document_sha256(document: dict[str, Any]) -> str:
    """Checksum of a document without its `sha256`."""
    rest = {name: value for name, value in document.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _kind(document: Any) -> str | None:
    if not isinstance(document, dict):
        return None
    if document.get("kind") == "evaluation":
        return "evaluation"
    for kind, mark in (("decode", "eager"), ("head", "rows"), ("frontier", "methods")):
        if mark in document:
            return kind
    return None


class _Check:
    """Complaints about one file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def require(self, holds: bool, where: str, wanted: str) -> None:
        """Raise unless a field holds."""
        if not holds:
            raise FlashHeadError(f"{self.path}: {where}: {wanted}; measure again")

    def fields(self, value: Any, wanted: Mapping[str, type], where: str) -> None:
        """Fields of an object, by name and type."""
        self.require(isinstance(value, dict), where.strip(".") or "the file", "wanted an object")
        for name, kind in wanted.items():
            place = f"{where}{name}"
            self.require(name in value, place, "is missing")
            kinds = (int, float) if kind is float else kind
            right = isinstance(value[name], kinds) and not isinstance(value[name], bool)
            self.require(right, place, f"wanted {kind.__name__}, got {value[name]!r:.40}")

    def share(self, value: Any, where: str) -> None:
        """A share lies between 0 and 1."""
        self.require(0 <= value <= 1, where, f"wanted 0 to 1, got {value}")

    def close(self, value: float, wanted: float, where: str) -> None:
        """A figure that follows from others."""
        near = math.isclose(value, wanted, rel_tol=SLACK, abs_tol=SLACK)
        self.require(near, where, f"is {value}, its parts give {wanted}")

    def finite(self, value: Any, where: str) -> None:
        """No number is infinite or NaN."""
        if isinstance(value, float):
            self.require(math.isfinite(value), where, f"wanted a finite number, got {value}")
        items: Any = ()
        if isinstance(value, dict):
            items = value.items()
        elif isinstance(value, list):
            items = enumerate(value)
        for name, item in items:
            self.finite(item, f"{where}.{name}".lstrip("."))


def _evaluation(check: _Check, document: dict[str, Any]) -> None:
    version = document.get("schema")
    check.require(version == SCHEMA, "schema", f"wanted {SCHEMA}, got {version!r}")
    check.require(bool(document["tasks"]), "tasks", "wanted one or more")
    for name in ("base", "value"):
        check.fields(document["sides"].get(name), {"dtype": str, "head": str}, f"sides.{name}.")
    for name, row in document["tasks"].items():
        _task(check, row, f"tasks.{name}.")
    greedy = document["greedy"]
    check.fields(greedy, {"tokens": int, "identical_tokens": int}, "greedy.")
    rows = document["tasks"].values()
    for name in ("tokens", "identical_tokens"):
        check.close(greedy[name], sum(row.get(name, 0) for row in rows), f"greedy.{name}")
    if greedy["tokens"]:
        share = greedy["identical_tokens"] / greedy["tokens"]
        check.fields(greedy, {"agreement": float}, "greedy.")
        check.close(greedy["agreement"], share, "greedy.agreement")
    sha256 = document.get("sha256")
    check.require(isinstance(sha256, str), "sha256", "is missing")
    same = sha256 == document_sha256(document)
    check.require(same, "sha256", "the file was changed after it was written")


def _task(check: _Check, row: Any, where: str) -> None:
    check.fields(row, _TASK, where)
    check.require(row["n"] > 0, f"{where}n", f"wanted 1 or more, got {row['n']}")
    check.share(row["agreement"], f"{where}agreement")
    check.fields(row["kl"], {"mean": float, "max": float, "positions": int}, f"{where}kl.")
    check.require(
        ("ratio" in row) != ("difference" in row), where, "wanted a ratio or a difference"
    )
    if "ratio" in row:
        check.require(row["base"] > 0, f"{where}base", f"wanted above 0, got {row['base']}")
        check.close(row["ratio"], row["value"] / row["base"], f"{where}ratio")
    else:
        check.close(row["difference"], row["value"] - row["base"], f"{where}difference")
        for name in ("base", "value"):
            check.share(row[name], f"{where}{name}")
    for name in ("stderr", "base_stderr", "interval"):
        check.require(name in row, f"{where}{name}", "is missing")
    for number, example in enumerate(row["examples"]):
        place = f"{where}examples.{number}."
        check.fields(example, _EXAMPLE, place)
        for i, candidate in enumerate(example["candidates"]):
            check.fields(candidate, _CANDIDATE, f"{place}candidates.{i}.")
    for context, part in row.get("by_context", {}).items():
        wanted = {"n": int, "base": float, "value": float, "difference": float}
        check.fields(part, wanted, f"{where}by_context.{context}.")
        check.close(part["difference"], part["value"] - part["base"], f"{where}{context}")


def _decode(check: _Check, document: dict[str, Any]) -> None:
    eager = document["eager"]
    check.fields(eager, {"speedup": float, "sides": dict, "agreement": float}, "eager.")
    for name in ("dense", "flash"):
        check.require(name in eager["sides"], f"eager.sides.{name}", "is missing")
    for name, side in eager["sides"].items():
        check.fields(side, _SIDE, f"eager.sides.{name}.")


def _head(check: _Check, document: dict[str, Any]) -> None:
    for number, row in enumerate(document["rows"]):
        check.fields(row, _HEAD_ROW, f"rows.{number}.")


def _frontier(check: _Check, document: dict[str, Any]) -> None:
    check.require(bool(document["methods"]), "methods", "wanted one or more")
    for name, row in document["methods"].items():
        check.fields(row, _METHOD, f"methods.{name}.")
        check.share(row["agreement"], f"methods.{name}.agreement")
        above = row["bytes_fraction"] > 0
        check.require(above, f"methods.{name}.bytes_fraction", "wanted above 0")
