"""`edgepress verify [REV]`: whether what is on disk is what the commit's dvc.lock names, every byte hashed again.

    edgepress verify         against HEAD
    edgepress verify v1      against another commit, tag or branch

A line per stage: same or not, and whether this machine computed it or it came from a cache. Then what differs: outputs
and by how much, parameters, code, stages that were not run. It runs nothing.

Exit codes: 0 the same; 1 something differs; 2 refused, or a wrong call.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dvc.exceptions import DvcException
from dvc.repo import Repo

from tasks.algorithms.errors import InputError
from tasks.cli import console, exit_codes
from tasks.runtime import verification
from tasks.runtime.verification import GOOD, HERE, Row


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("rev", nargs="?", default="HEAD", metavar="REV", help="a commit, tag or branch; default: HEAD")
    parser.add_argument("--json", action="store_true", help="every stage and what differs, as an object")


def main(given: argparse.Namespace) -> int:
    """Print the stages, what differs, and a last sentence."""
    try:
        with Repo() as repo:
            revision = verification.commit(Path(repo.root_dir), given.rev)
            rows = verification.verify(repo, revision)
    except (DvcException, OSError) as error:
        raise InputError(f"nothing can be verified here: {' '.join(str(error).split())}") from error
    differing = [row for row in rows if row.state not in GOOD]
    if given.json:
        found = {"revision": revision, "same": not differing, "stages": [row._asdict() for row in rows]}
        console.show_json(found)
    else:
        cells = [[row.stage, row.state, row.source] for row in rows]
        console.show(console.table(["stage", "state", "where from"], cells, left=["state", "where from"]))
        console.show(*(f"{row.stage}: {why}" for row in differing for why in row.why))
        print(_sentence(rows, differing, f"{given.rev} ({revision[:10]})"))
    return exit_codes.ALTERED if differing else exit_codes.DONE


def _sentence(rows: list[Row], differing: list[Row], commit: str) -> str:
    hashed, here = sum(row.hashed for row in rows), sum(row.source.startswith(HERE) for row in rows)
    counts = f"{hashed} files and folders hashed, {here} of {len(rows)} stages computed here"
    if not differing:
        return f"the same as {commit}: {counts}"
    return f"differs from {commit} in {len(differing)} stages ({', '.join(row.stage for row in differing)}): {counts}"
