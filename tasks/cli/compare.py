"""`edgepress compare A B`: figures, parameters, files by hash and bytes in which two packages differ.

A and B are versions, git revisions, or folders, which stand for their present state.
"""

from __future__ import annotations

import argparse
from typing import Any

from tasks.cli import console, project
from tasks.registry import overview


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("a", type=project.folder_or_revision, metavar="A", help="a version, a folder or a git revision")
    parser.add_argument("b", type=project.folder_or_revision, metavar="B", help="the other one")
    parser.add_argument("--json", action="store_true", help="print an object instead of tables")


def main(given: argparse.Namespace) -> None:
    """Print a table for each kind of difference."""
    found = overview.diff(project.ROOT, project.revision(given.a), project.revision(given.b))
    if given.json:
        console.show_json(found)
        return
    for title in ("figures", "parameters", "files"):
        rows = [[name, _value(old), _value(new), _change(old, new)] for name, (old, new) in found[title].items()]
        console.show(console.table([title, given.a, given.b, "change"], rows) if rows else f"{title}: none differs", "")
    old, new = found["bytes"]
    console.show(f"bytes: {_value(old)} -> {_value(new)} {_change(old, new)}".rstrip())


def _value(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.6g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def _change(old: Any, new: Any) -> str:
    numbers = all(type(value) in (int, float) for value in (old, new))
    return f"{(new - old) / abs(old):+.2%}" if numbers and old else ""
