"""`flashhead report RESULTS... --out report.html`: one page from result files."""

import argparse
from pathlib import Path
from typing import Any

from flashhead.cli.arguments import Parser, command, existing_file, new_file


def add_parser(subparsers: Any) -> None:
    """Describe the subcommand."""
    parser: Parser = command(
        subparsers, "report", run, "one page of result files: may the model replace its original?"
    )
    parser.add_argument(
        "results",
        type=existing_file,
        nargs="+",
        metavar="RESULTS",
        help="JSON files of eval MODEL --against BASE, eval frontier, bench decode and bench head",
    )
    parser.add_argument("--out", type=new_file, required=True, metavar="FILE", help=".html file")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Check the files and write the page."""
    from flashhead.report.judgement import judge
    from flashhead.report.page import render, write_page
    from flashhead.report.results import read_results

    results = read_results(args.results)
    out: Path = args.out
    write_page(render(results), out)
    judgement = judge([r.document for r in results if r.kind == "evaluation"])
    print(judgement.sentence)
    print(f"wrote {out}")
    return {"answer": judgement.answer, "sentence": judgement.sentence, "out": out.name}
