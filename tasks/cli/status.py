"""`edgepress status`: which stages are up to date, which are not and why, and what runs at this moment.

A stage is compared with its entry in dvc.lock as `dvc status` does it (`tasks.runtime.staleness`). Of its code every
file is named, also those that stage code has not listed yet. A stage whose input another one is yet to make again still
counts as up to date, but not in what is said of the time that a run takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dvc.repo import Repo

from tasks.algorithms.errors import InputError
from tasks.cli import console
from tasks.nightly import worktree
from tasks.runtime import estimates, locks, staleness
from tasks.runtime.staleness import GONE, STATES

SHOWN = 3
"""Reasons that a line names, of each kind."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="default: all of dvc.yaml")
    parser.add_argument("--json", action="store_true", help="every reason, and what runs, as an object")


def main(given: argparse.Namespace) -> None:
    """Print a line per stage, then what runs, and how long what is to be done takes."""
    running = runs()
    rows, left = _looked(given.stages, running)
    if given.json:
        told = left and {"seconds": left.left, "stages": left.seconds, "running": list(left.running)}
        console.show_json({"stages": rows, "running": running, "left": told})
        return
    cells = [[row["stage"], row["state"], _why(row["why"])] for row in rows]
    counts = {state: sum(row["state"] == state for row in rows) for state in STATES}
    told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    console.show(console.table(["stage", "state", "why"], cells, left=["state", "why"]), told)
    console.show(*([_sentence(run) for run in running] or ["nothing runs"]), *_time(rows, left))


def _looked(names: list[str], running: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], estimates.Run | None]:
    """A row of `staleness` per stage, in the order of dvc.yaml; and how long what is left of all takes.

    Raises:
        DvcException: no DVC project; no stage of a name.
    """
    with Repo() as repo:
        chosen = [stage for name in names for stage in repo.stage.collect(name)] if names else repo.index.stages
        rows = [staleness.row(stage) for stage in chosen]
        if names:
            return rows, None
        stale = staleness.to_run(repo, rows)
        return rows, estimates.of_run(repo, stale, flow=_flow(running)) if stale else None


def _flow(running: list[dict[str, Any]]) -> bool:
    """Whether stages run side by side: where a flow does, and not where DVC does."""
    return any(run["kind"] == "flow" for run in running)


def _time(rows: list[dict[str, Any]], left: estimates.Run | None) -> list[str]:
    """What is left of a run, or how long one would take; no line where nothing is to be done or nobody can tell."""
    if left is None:
        return []
    if not left.running:
        return [f"`dvc repro` would take {left.sentence()}"]
    now = [f"{name} {estimates.about(left.seconds[name]).removeprefix('about ')}" for name in left.running]
    done = f"{len(rows) - len(left.seconds)} of {len(rows)} stages are done"
    to_come = f"{len(left.seconds) - len(left.running)} to come"
    return [f"{done}, {to_come}; {estimates.about(left.left)} left (now {' and '.join(now)})"]


def runs() -> list[dict[str, Any]]:
    """What works in this folder now: kind ("flow", "stage", "night"), stage, pid, command, since."""
    found = []
    at_work = dict(_working(Path()))
    if holder := locks.holder(locks.FLOW):
        found.append(_run("flow", next(iter(at_work), None), holder))
    else:
        found += [_run("stage", name, holder) for name, holder in at_work.items()]
    if holder := locks.holder(worktree.LOCK):
        found.append(_run("night", next(iter(dict(_working(_nights()))), None), holder))
    return found


def _why(reasons: list[dict[str, str]]) -> str:
    """ "modified: tasks/wanda.py, params.yaml: wanda.keep and 3 more; 4 files are not there"."""
    gone = list(dict.fromkeys(reason["what"] for reason in reasons if reason["is"] in GONE))
    kinds = dict.fromkeys(reason["is"] for reason in reasons if reason["is"] not in GONE)
    told = [f"{kind}: {_some([r['what'] for r in reasons if r['is'] == kind])}" for kind in kinds]
    if gone:
        told.append(f"{len(gone)} paths are not there" if told else f"not there: {_some(gone)}")
    return "; ".join(told)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _working(folder: Path) -> Iterable[tuple[str, locks.Holder]]:
    """(stage, its process) of every stage that runs in a project's folder."""
    for path in sorted((folder / locks.FLOW.parent).glob("*.lock")):
        holder = locks.holder(path) if path.name != locks.FLOW.name else None
        if holder:
            yield path.stem, holder


def _nights() -> Path:
    try:
        return worktree.project(Path())
    except InputError:  # no git, so no night has run here
        return worktree.WORKTREE


def _run(kind: str, stage: str | None, holder: locks.Holder) -> dict[str, Any]:
    since = holder.since.isoformat(timespec="seconds")
    return {"kind": kind, "stage": stage, "pid": holder.pid, "command": holder.command, "since": since}


def _sentence(run: dict[str, Any]) -> str:
    what = {"flow": "a flow runs", "stage": "a stage runs", "night": "a night or its retention is at work"}[run["kind"]]
    at = f", at stage {run['stage']}" if run["stage"] else ""
    return f"{what}{at}: process {run['pid']} ({run['command']}), since {run['since'].replace('T', ' ')}"
