"""What the benchmarks share: the models, the command line, and a table that grows row by row.

Options of each script: `--model NAME` (again for more; default: all that are there), `--only REGEX` (rows whose name it
is found in), `--steps N` (fewer recovery steps, to try the script out: another file), `--threads N`, `--cache FOLDER`,
`--folder DIR` (where the one model that is named lies: smollm2-135m is nobody's part and has to be given).
A row is printed and written as soon as it is known. What was computed before comes from the cache of the stages, so a
script that was stopped is simply started again. `--only` leaves the other rows of the file as they are.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tasks.algorithms.errors import InputError
from tests.benchmarks.chain import CACHE, Chain
from tests.support.paths import SHARED

RESULTS = Path(__file__).parent / "results"
STORIES = SHARED / "data/tinystories"
NOTE = "note"
"""The last column of every table: why a row has no figures."""


ELSEWHERE = Path("--folder")
"""The folder of a model that the command line has to say."""


@dataclass(frozen=True)
class Subject:
    """A model with its corpora, and what differs from params.yaml for it.

    Attributes:
        folder: None: the built-in one.
        removed: the parameters that remove about a sixth of its blocks; None: it has too few.
    """

    folder: Path | None
    corpora: Mapping[str, Path] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    removed: Mapping[str, Any] | None = None

    @property
    def present(self) -> bool:
        paths = [*self.corpora.values(), *([self.folder] if self.folder else [])]
        return self.folder != ELSEWHERE and all(path.exists() for path in paths)


_STORIES = {
    "train": STORIES / "train.jsonl",
    "calibration": STORIES / "train.jsonl",
    "test": STORIES / "test.jsonl",
    "test_ood": SHARED / "data/wikitext2/test.jsonl",
}
_STORIES_PARAMS = {"calibrate.windows": 64, "lora.learning_rate": 0.01}
SUBJECTS = {
    "built-in": Subject(None, removed={"depth_prune.remove": 2}),
    "stories260k": Subject(
        SHARED / "models/stories260k",
        _STORIES,
        _STORIES_PARAMS,
        {"depth_prune.remove": 1, "depth_prune.protect_first": 2, "depth_prune.protect_last": 1},
    ),
    "story-656k": Subject(SHARED / "models/story-656k", _STORIES, _STORIES_PARAMS),
    "smollm2-135m": Subject(
        ELSEWHERE,
        {
            "train": SHARED / "data/c4/train.jsonl",
            "calibration": SHARED / "data/c4/train.jsonl",
            "test": SHARED / "data/wikitext2/test.jsonl",
            "test_ood": STORIES / "test.jsonl",
        },
        {"calibrate.windows": 32, "lora.steps": 50, "evaluate.max_windows": 16},  # 102,400 tokens of recovery
    ),
}
COMMON = {"depth_prune.remove": 0, "evaluate.new_tokens": 1}
"""No depth pruning where it isn't the subject; completions are of no interest here."""


def chain(subject: Subject, cache: Path = CACHE, steps: int | None = None) -> Chain:
    """A subject's chain, with the benchmarks' common parameters."""
    fewer = {} if steps is None else {"lora.steps": steps}
    return Chain(subject.folder, subject.corpora, cache, {**COMMON, **subject.params, **fewer})


class Table:
    """A CSV file and a Markdown table on standard output, of the same rows.

    Args:
        path: the file.
        columns: the first `identity` ones say which row it is; a column "note" is added.
        fresh: forget the rows that the file holds.
    """

    def __init__(self, path: Path, columns: Sequence[str], identity: int = 1, fresh: bool = True) -> None:
        self.path, self.columns, self.identity = path, [*columns, NOTE], identity
        self.rows: dict[tuple[str, ...], list[str]] = {}
        if path.exists() and not fresh:
            with path.open(encoding="utf-8", newline="") as file:
                header, *rows = csv.reader(file)
            if header != self.columns:
                raise InputError(f"{path} has columns {header}, expected {self.columns}: delete it")
            self.rows = {tuple(row[:identity]): row for row in rows}
        print("| " + " | ".join(self.columns) + " |\n|" + "---|" * len(self.columns), flush=True)

    def add(self, **values: Any) -> None:
        """Write and print one row; a row with the same identity is replaced, a value not given is left empty.

        Raises:
            LookupError: a value for a column that the table does not have.
        """
        unknown = sorted(set(values) - set(self.columns))
        if unknown:
            raise LookupError(f"the table has no column {unknown}, only {self.columns}")
        row = [_text(values.get(column)) for column in self.columns]
        self.rows[tuple(row[: self.identity])] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([self.columns, *self.rows.values()])
        shown = [_short(values.get(column)).replace("|", "\\|") for column in self.columns]
        print("| " + " | ".join(shown) + " |", flush=True)


Row = tuple[Mapping[str, str], Callable[[], Mapping[str, Any]]]
"""What identifies a row, and what computes the rest of it."""


def fill(table: Table, rows: Iterable[Row], only: str = "") -> None:
    """Compute the rows whose identity `only` is found in; what a stage refuses becomes the row's note."""
    for identity, compute in rows:
        if not re.search(only, " ".join(identity.values())):
            continue
        try:
            figures = compute()
        except InputError as error:
            figures = {NOTE: " ".join(str(error).split())}
        table.add(**identity, **figures)


def main(
    script: str,
    columns: Sequence[str],
    rows: Callable[[Chain, Subject], Iterable[Row]],
    identity: int = 1,
    arguments: Sequence[str] | None = None,
) -> None:
    """The command line of a script: one table per model.

    Args:
        script: its name, the first part of the file's.
        columns, identity: of the table.
        rows: a chain and its subject -> the rows of that model.
    """
    parser = argparse.ArgumentParser(prog=f"python -m tests.benchmarks.{script}")
    parser.add_argument("--model", action="append", choices=[*SUBJECTS], help="default: all that are there")
    parser.add_argument("--folder", type=Path, help="of the model that --model names")
    parser.add_argument("--only", default="", help="regular expression that a row's name has to contain")
    parser.add_argument("--steps", type=int, help="recovery steps, to try it out")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    for name in given.model or [name for name, subject in SUBJECTS.items() if subject.present]:
        subject = replace(SUBJECTS[name], **({"folder": given.folder} if given.folder else {}))
        if not subject.present:
            print(f"{name} is not there: {subject.folder} or its corpora in {SHARED}", file=sys.stderr)
            continue
        suffix = "" if given.steps is None else f"-{given.steps}-steps"
        print(f"\n**{script}, {name}**\n")
        table = Table(given.results / f"{script}-{name}{suffix}.csv", columns, identity, fresh=not given.only)
        fill(table, rows(chain(subject, given.cache, given.steps), subject), given.only)


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.9g}" if isinstance(value, float) else str(value)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else _text(value)
