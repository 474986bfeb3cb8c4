"""Answers kept on disk, so that an interrupted evaluation goes on where it stopped.

One file a task and model, one line an answer, appended as it comes. A line's key is the request;
its check holds for the key, the answer and what was evaluated (weights, index, dtype, versions). A
last line without its end was being written when the process died, and is dropped. Any other line
that does not check is an error: nobody's figures should rest on an edited file.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from flashhead.errors import FlashHeadError

FORMAT = 1
Answer = dict[str, Any]


class Answers:
    """Answers of one model to one task.

    Args:
        path: the file; its folder is made.
        fingerprint: of what is evaluated.
        resume: whether answers of an earlier run count.

    `resumed` is how many there were.

    Raises:
        FlashHeadError: the file cannot be read or written, or a line of it was changed.
    """

    def __init__(self, path: Path, fingerprint: str, *, resume: bool) -> None:
        self.path, self.fingerprint = path, fingerprint
        self.known: dict[str, Answer] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text(encoding="utf-8") if resume and path.exists() else ""
            whole = text[: text.rfind("\n") + 1]
            for number, line in enumerate(whole.splitlines(), start=1):
                self._take(number, line)
            self.resumed = len(self.known)
            if whole != text:
                os.truncate(path, len(whole.encode()))
            self._file = path.open("a" if resume else "w", encoding="utf-8")
        except UnicodeDecodeError as error:
            raise FlashHeadError(f"{path}: not a file of answers; remove it") from error
        except OSError as error:
            raise FlashHeadError(f"{path}: {error.strerror}; --cache moves it") from error

    def _take(self, number: int, line: str) -> None:
        try:
            record = json.loads(line)
            key, answer, check = record["key"], record["answer"], record["check"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise self._changed(number) from error
        if check != self._check(key, answer):
            raise self._changed(number)
        self.known[key] = answer

    def _changed(self, number: int) -> FlashHeadError:
        return FlashHeadError(
            f"{self.path}, line {number}: changed since it was written, or of another model; "
            "remove the file, or start again with --no-resume"
        )

    def add(self, key: str, answer: Answer) -> None:
        """Keep an answer, on disk at once."""
        self.known[key] = answer
        record = {"key": key, "answer": answer, "check": self._check(key, answer)}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _check(self, key: str, answer: Answer) -> str:
        text = json.dumps([FORMAT, self.fingerprint, key, answer], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def key_of(*request: Any) -> str:
    """What a request is known by."""
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()[:32]


def fingerprint(model: Any, index: Any, **settings: Any) -> str:
    """What an evaluated model is known by: all its weights, its index, and how it runs.

    Args:
        model: with a state dict.
        index: of its FlashHead, or None.
        settings: JSON-able.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        _add(digest, name, tensor)
    if index is not None:
        _add_fields(digest, index)
    return digest.hexdigest()


def _add_fields(digest: Any, value: Any) -> None:
    import dataclasses

    import torch

    if isinstance(value, torch.Tensor):
        _add(digest, "", value)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            digest.update(field.name.encode())
            _add_fields(digest, getattr(value, field.name))
    elif isinstance(value, (list, tuple)):
        for item in value:
            _add_fields(digest, item)
    else:
        digest.update(repr(value).encode())


def _add(digest: Any, name: str, tensor: Any) -> None:
    import torch

    plain = tensor.detach().contiguous().cpu()
    digest.update(f"{name}{plain.dtype}{list(plain.shape)}".encode())
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
