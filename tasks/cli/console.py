"""Tables and JSON on stdout, the same for every command.

A table is as wide as its content where stdout is no terminal: nothing is wrapped, cropped or coloured, so that a file
or a pipe gets one line per row. On a terminal long cells are folded to its width.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from rich.box import Box
from rich.console import Console
from rich.table import Table
from rich.text import Text

RULED = Box("    \n    \n -- \n    \n -- \n    \n    \n    \n", ascii=True)
"""A rule below the heading and between sections, none elsewhere."""
WIDEST = 100_000
"""Characters of a line that is not for a terminal."""


def table(columns: Sequence[str], rows: Iterable[Sequence[str] | None], left: Collection[str] = ()) -> Table:
    """A table; a row that is None draws a rule.

    Args:
        left: columns of words, besides the first; the others are of numbers, whose ends are aligned.
    """
    made = Table(box=RULED, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        words = not index or column in left
        made.add_column(Text(column), justify="left" if words else "right", overflow="fold")
    for row in rows:
        if row is None:
            made.add_section()
        else:
            made.add_row(*map(Text, row))
    return made


def show(*parts: Table | str) -> None:
    """Print tables and sentences on stdout, each on lines of its own."""
    terminal = sys.stdout.isatty()
    for part in parts:
        if terminal and isinstance(part, Table):
            Console(file=sys.stdout, highlight=False).print(part)
        else:
            print(text(part))


def text(part: Table | str) -> str:
    """A table as plain text, without spaces at the ends of lines; a sentence as it is."""
    if isinstance(part, str):
        return part
    file = io.StringIO()
    Console(file=file, width=WIDEST, color_system=None).print(part)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def show_json(content: Any) -> None:
    """Print plain data as JSON, for a script; NaN and infinities, which JSON doesn't have, are null."""
    print(json.dumps(_finite(content), indent=1, sort_keys=True))


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def answer(given: argparse.Namespace, content: Any, sentence: str) -> None:
    """Print the sentence, or with --json what it says as an object."""
    if given.json:
        show_json(content)
    else:
        print(sentence)
