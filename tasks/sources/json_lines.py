"""The one reader of JSON lines: a value per line, blank lines are skipped, errors have the number of the line.

Documents are values of the form {"text": str}, as fetch writes them. What else a value has to be is the caller's: a
`BadLine` has number and reason for one with a better sentence. It writes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.algorithms.errors import InputError


class BadLine(InputError):
    """A line that can't be read.

    Attributes:
        number: of the line, from 1.
        reason: what the parser said.
    """

    def __init__(self, sentence: str, number: int, reason: Exception) -> None:
        super().__init__(sentence)
        self.number, self.reason = number, reason


class NoText(BadLine):
    """A line that is no UTF-8."""


def read(path: Path) -> list[str]:
    """The documents of a corpus, in order."""
    return list(documents(path))


def documents(path: Path) -> Iterator[str]:
    """The documents of a corpus one by one, for one that isn't held."""
    for _, row in rows(path):
        yield row["text"]


def rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Number and value of each line that isn't blank.

    Raises:
        BadLine: a line is no UTF-8 or no JSON.
    """
    for number, line in lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            sentence = f"{path}, line {number}: not valid JSON ({error}); a line is one object"
            raise BadLine(sentence, number, error) from error
        yield number, value


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line, its end included; a byte order mark is none of it.

    Raises:
        NoText: a line is no UTF-8.
    """
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:  # strict decoding would lose the number
        for number, line in enumerate(file, 1):
            if not line.isascii():
                _refuse_bytes(path, number, line)
            yield number, line


def _refuse_bytes(path: Path, number: int, line: str) -> None:
    try:
        line.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeDecodeError as error:
        sentence = f"{path}: not valid UTF-8 after line {number - 1}; save it as UTF-8"
        raise NoText(sentence, number, error) from error
