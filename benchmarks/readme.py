"""README.md from README.md.j2: every measured figure in it is an expression on a result document.

    python benchmarks/readme.py             # writes README.md
    python benchmarks/readme.py --check     # exit code 1 and a diff if it would change
    python benchmarks/readme.py --figures   # the documents it reads, their commits and machines

`doc(NAME)` in the template is `benchmarks/results/NAME.json`. A field that is
not there is an error.
"""

import argparse
import difflib
import functools
import sys
import traceback
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError

from flashhead.errors import FlashHeadError
from flashhead.report.documents import read_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TEMPLATE = "README.md.j2"
ISA_NAMES = {"avx512_vnni": "AVX-512 VNNI", "amx_int8": "AMX", "i8mm": "I8MM"}
CPU_NAMES = ("AMD EPYC", "Intel Xeon")


class Documents:
    """Result documents by name; `read` keeps those that were asked for, in order."""

    def __init__(self, folder: Path = RESULTS) -> None:
        self.folder = folder
        self.read: dict[str, Any] = {}

    def __call__(self, name: str) -> Any:
        if name not in self.read:
            self.read[name] = read_json(self.folder / f"{name}.json")
        return self.read[name]


def rounded(value: float, digits: int = 0) -> str:
    """`1723.0` as `1,723`; halves are rounded up, as they are written in the document."""
    step = Decimal(1).scaleb(-digits)
    return f"{Decimal(repr(value)).quantize(step, ROUND_HALF_UP):,}"


def pct(share: float, digits: int = 1, sign: bool = False) -> str:
    """`0.0897` as `9.0%`."""
    text = rounded(float(Decimal(repr(share)) * 100), digits)
    return f"{'+' if sign and share > 0 else ''}{text}%"


def times(ratio: float, digits: int = 2) -> str:
    """`1.5139` as `1.51x`."""
    return f"{rounded(ratio, digits)}x"


def spread(low: float, high: float, digits: int = 2) -> str:
    """`1.60-2.03`; one number if both are written alike."""
    ends = rounded(low, digits), rounded(high, digits)
    return ends[0] if ends[0] == ends[1] else "-".join(ends)


def sci(value: float) -> str:
    """`7.1e-04`."""
    return f"{value:.1e}"


def row(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """The one row with these fields.

    Raises:
        FlashHeadError: none, or more than one.
    """
    found = [own for own in rows if all(own[name] == value for name, value in wanted.items())]
    if len(found) != 1:
        raise FlashHeadError(f"{len(found)} rows with {wanted}, wanted one")
    return found[0]


def claim(holds: bool) -> str:
    """Nothing, in front of words that are true only while `holds`.

    Raises:
        FlashHeadError: it does not hold: the words have to change.
    """
    if not holds:
        raise FlashHeadError("words no longer hold")
    return ""


def machine(document: dict[str, Any]) -> str:
    """`2 cores of an AMD EPYC (AVX-512 VNNI)`."""
    own = document["hardware"]
    name = own["cpu"].replace("(R)", "")
    name = next((known for known in CPU_NAMES if known in name), name)
    isa = ", ".join(text for flag, text in ISA_NAMES.items() if flag in own["isa"])
    article = "an" if name[0] in "AEIOU" else "a"
    return f"{own['cores']} cores of {article} {name}" + (f" ({isa})" if isa else "")


def gpu(document: dict[str, Any]) -> str:
    """`an H100`."""
    name = document["hardware"]["gpu"]
    if name is None:
        raise FlashHeadError("a document of a GPU names none")
    words = [word for word in name.split() if word not in ("NVIDIA", "GeForce", "Tesla")]
    return f"{'an' if words[0][0] in 'AEFHILMNORSX8' else 'a'} {words[0]}"


FUNCTIONS = (rounded, pct, times, spread, sci, row, claim, machine, gpu)


@functools.cache
def environment(folder: Path = ROOT) -> Environment:
    """Jinja with the functions of the template."""
    found = Environment(
        loader=FileSystemLoader(folder),
        undefined=StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.globals |= {function.__name__: function for function in FUNCTIONS}
    return found


def render(documents: Documents, folder: Path = ROOT) -> str:
    """The text of README.md.

    Raises:
        FlashHeadError: a document is missing, lacks a field, or no longer bears what is said.
    """
    try:
        return environment(folder).get_template(TEMPLATE).render(doc=documents)
    except FlashHeadError as error:
        raise FlashHeadError(f"{where(error)}: {error}") from error
    except (TemplateError, KeyError, TypeError, ZeroDivisionError) as error:
        raise FlashHeadError(f"{where(error)}: {type(error).__name__}: {error}") from error


def where(error: Exception) -> str:
    """The template and its line that an error comes from."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.endswith(TEMPLATE)
    ]
    return f"{TEMPLATE}:{lines[-1]}" if lines else TEMPLATE


def figures(documents: Documents) -> list[str]:
    """A line for each document that was read."""
    lines = []
    for name, document in documents.read.items():
        own = document.get("hardware", {})
        where = own.get("gpu") or own.get("cpu")
        lines.append(f"{name}  {str(document.get('git_sha'))[:9]}  {where}")
    return lines


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1: it would change")
    parser.add_argument("--figures", action="store_true", help="list the documents that it reads")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the documents")
    parser.add_argument("--out", type=Path, default=ROOT / "README.md")
    args = parser.parse_args(given)
    documents = Documents(args.results)
    try:
        text = render(documents)
    except FlashHeadError as error:
        print(f"readme.py: {error}", file=sys.stderr)
        return 2
    if args.figures:
        print("\n".join(figures(documents)))
        return 0
    before = args.out.read_text(encoding="utf-8") if args.out.exists() else ""
    if not args.check:
        args.out.write_text(text, encoding="utf-8")
        return 0
    names = args.out.name, f"{TEMPLATE}, rendered"
    pair = before.splitlines(keepends=True), text.splitlines(keepends=True)
    sys.stdout.writelines(difflib.unified_diff(*pair, *names))
    return 1 if before != text else 0


if __name__ == "__main__":
    sys.exit(main())
