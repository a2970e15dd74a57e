"""What each stage of a run cost: a table of seconds, so that whoever adds a stage sees what it adds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.table import Table

from tasks.cli import console

COLUMNS = ("waiting", "start_up", "computing", "bookkeeping", "cpu")
"""Seconds: until a lane was free; from the process's start to `run`; in `run`; the rest; of all cores together."""


def table(rows: Iterable[dict[str, Any]]) -> Table | None:
    """The stages that ran, in the order of their ends, and the sums; None where none ran.

    Args:
        rows: of `flows.reproduction.Reproduction`.
    """
    ran = [row for row in rows if row["why"] == "ran"]
    if not ran:
        return None
    lines: list[list[str] | None] = [[row["stage"], *(f"{row[name]:,.1f}" for name in COLUMNS)] for row in ran]
    sums = [f"{sum(row[name] for row in ran):,.1f}" for name in COLUMNS]
    return console.table(["seconds of", *(name.replace("_", "-") for name in COLUMNS)], [*lines, None, ["all", *sums]])
