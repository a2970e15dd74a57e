"""`edgepress report`: the report's table and verdict for the terminal, with the seconds that each stage took.

Figures are those of stages.csv, the sentence is the first of verdict.txt, seconds come from the stages' lineage records
(outputs hold no time): those of this machine's own runs, where there are any. Where files lie is asked of DVC. It runs
nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from dvc.exceptions import DvcException
from dvc.repo import Repo
from rich.table import Table

from tasks.cli import console
from tasks.evaluation import comparison
from tasks.runtime import lineage

SHOWN = (
    ("parameters", "parameters", ",.0f"),
    ("zeros", "zero_fraction", ".1%"),
    ("bytes", "bytes", ",.0f"),
    ("ppl test", "perplexity_test", ",.3f"),
    ("ppl ood", "perplexity_test_ood", ",.3f"),
    ("bpb test", "bits_per_byte_test", ".4f"),
    ("bpb ood", "bits_per_byte_test_ood", ".4f"),
    ("seconds", "seconds", ",.1f"),
)
"""Heading, column of `rows`, and format of what stands beside a stage's name (ppl: perplexity, bpb: bits per byte)."""
THIS_MACHINE = "this machine"
NOTHING = "There is no report yet: `dvc repro` makes it."


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--json", action="store_true", help="the rows with all their figures, and the verdict")


def main(given: argparse.Namespace) -> None:
    """Print the table and the verdict."""
    if given.json:
        console.show_json({"stages": rows(), "verdict": verdict()})
    else:
        console.show(*shown())


def rows(opened: Repo | None = None) -> list[dict[str, Any]]:
    """The report's rows, with the columns of its stages.csv, and those of `seconds`.

    A missing value is None; no row where there is no report yet.

    Args:
        opened: the project, where the caller has it open: to open it again takes a quarter of a second.
    """
    with contextlib.nullcontext(opened) if opened else Repo() as repo:
        path = _report(repo, "stages.csv")
        if path is None:
            return []
        table = pd.read_csv(path).astype(object)
        records = table.where(table.notna(), None).to_dict("records")
        return [record | seconds(repo, record["stage"]) for record in records]


def verdict(opened: Repo | None = None) -> str:
    """What the package scores against a plain model of its size, in a sentence; empty where there is no report."""
    with contextlib.nullcontext(opened) if opened else Repo() as repo:
        path = _report(repo, "verdict.txt")
        return path.read_text(encoding="utf-8").partition("\n")[0] if path else ""


def shown() -> list[Table | str]:
    """The table, plain models below a rule; then the protocol and the verdict. Without a report a sentence."""
    with Repo() as repo:
        known, sentence = rows(repo), verdict(repo)
    if not known:
        return [NOTHING]
    plain = [row["stage"] in comparison.PLAIN_MODELS for row in known]
    lines: list[list[str] | None] = [
        [comparison.title(row["stage"]), *(_text(row.get(name), form) for _, name, form in SHOWN)] for row in known
    ]
    if any(plain):
        lines.insert(plain.index(True), None)
    protocols = sorted({row["protocol"] for row in known if row["protocol"]})
    measured = f"perplexity by protocol {', '.join(protocols)}" if protocols else "not evaluated"
    table = console.table(["stage", *(title for title, _, _ in SHOWN)], lines)
    return [table, measured, *filter(None, [told(known), sentence])]


def _report(repo: Repo, name: str) -> Path | None:
    """The report's output of this name, None where it was not made yet."""
    return next((path for out in _outs(repo, "report") if (path := out / name).exists()), None)


def _outs(repo: Repo, name: str) -> list[Path]:
    try:
        return [Path(out.fs_path) for stage in repo.index.stages if stage.addressing == name for out in stage.outs]
    except DvcException:
        return []


def seconds(repo: Repo, name: str) -> dict[str, Any]:
    """`seconds` that the stage took, and `seconds_by`: "this machine", or the one that its record names; else None.

    This machine's own are those of the run that computed the present outputs here.
    """
    stage = next((stage for stage in repo.index.stages if stage.addressing == name), None)
    own = stage and lineage.local(stage)
    entry = own or (stage and lineage.find(stage))
    if not entry or not isinstance(entry.get("seconds"), int | float):
        return {"seconds": None, "seconds_by": None}
    return {"seconds": entry["seconds"], "seconds_by": THIS_MACHINE if own else lineage.machine(entry)}


def told(rows: Iterable[dict[str, Any]]) -> str:
    """On which machine the seconds of these rows were taken, in a sentence; empty where none are known."""
    by = [row["seconds_by"] for row in rows if row.get("seconds_by")]
    kinds = {machine: by.count(machine) for machine in sorted(by, key=lambda one: (one != THIS_MACHINE, one))}
    parts = [machine if len(kinds) == 1 else f"{machine} ({count} stages)" for machine, count in kinds.items()]
    return f"seconds: of {', '.join(parts)}" if parts else ""


def _text(value: Any, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)
