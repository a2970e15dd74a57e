"""`edgepress gate [REV] [--against REV]`: judge any two commits, experiments or nights by the gate's limits.

The limits are those of params.yaml. Nothing is promoted, and nothing is computed but the verdict: the figures are what
the revision's stages wrote. Exit codes: 0 ACCEPT, 3 REGRESSION, 4 ANOMALOUS, 5 INFEASIBLE, 6 UNDECIDED, as a night's.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from tasks.cli import console, exit_codes

if TYPE_CHECKING:
    from tasks.algorithms.statistics.gate import Verdict


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("rev", nargs="?", default="HEAD", metavar="REV", help="a commit, tag or night (default: HEAD)")
    parser.add_argument("--against", metavar="REV", help="the promoted model's revision (default: none)")
    parser.add_argument("--json", action="store_true", help="print verdict, checks and figures as an object")


def main(given: argparse.Namespace) -> int:
    """Judge one revision."""
    from tasks.nightly import judgement
    from tasks.parameters import schema

    promoted = judgement.read(Path.cwd(), given.against) if given.against else None
    candidate = judgement.read(Path.cwd(), given.rev)
    verdict = judgement.judge(candidate, promoted, schema.load().gate)
    if given.json:
        content = {"verdict": verdict.verdict, "reason": verdict.reason, "figures": judgement.described(candidate)}
        console.show_json(content | {"checks": [check.row() for check in verdict.checks]})
    else:
        console.show(table(verdict), sentence(verdict))
    return exit_codes.VERDICTS[verdict.verdict]


def table(verdict: Verdict) -> Table:
    """The checks, each with value, limit and margin; a night prints them, too."""
    rows = [check.row() for check in verdict.checks]
    cells = [[_cell(value) for value in row.values()] for row in rows]
    return console.table(list(rows[0]), cells, left=["leads_to", "outcome"])


def sentence(verdict: Verdict) -> str:
    """The verdict and its reason."""
    return f"{verdict.verdict}: {verdict.reason}"


def _cell(value: Any) -> str:
    if value is None or value != value:  # NaN
        return "-"
    return f"{value:.5g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
