"""`edgepress status`: which stages are up to date, which are not and why, and what runs at this moment.

A stage is compared with its entry in dvc.lock as `dvc status` does it: inputs, code, parameters, command, outputs. Of
its code every file is named, also those that stage code has not listed yet. A stage whose input another one is yet to
make again still counts as up to date. DVC's locks are not taken, so it answers
while a run goes on; it changes nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvc.repo import Repo

from tasks.algorithms.errors import InputError
from tasks.cli import console
from tasks.nightly import worktree
from tasks.runtime import code, locks

if TYPE_CHECKING:
    from dvc.stage import Stage

STATES = ("up to date", "changed", "missing", "never run", "running")
UP_TO_DATE, CHANGED, MISSING, NEVER_RUN, RUNNING = STATES
"""States of a stage. `MISSING`: only files that aren't there make it differ; `dvc checkout` or a run brings them."""
GONE = ("deleted", "not in cache")
"""What DVC says of such files."""
SHOWN = 3
"""Reasons that a line names, of each kind."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="default: all of dvc.yaml")
    parser.add_argument("--json", action="store_true", help="every reason, and what runs, as an object")


def main(given: argparse.Namespace) -> None:
    """Print a line per stage, then what runs."""
    rows, running = stages(given.stages), runs()
    if given.json:
        console.show_json({"stages": rows, "running": running})
        return
    cells = [[row["stage"], row["state"], _why(row["why"])] for row in rows]
    counts = {state: sum(row["state"] == state for row in rows) for state in STATES}
    told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    console.show(console.table(["stage", "state", "why"], cells, left=["state", "why"]), told)
    console.show(*([_sentence(run) for run in running] or ["nothing runs"]))


def stages(names: list[str] | None = None) -> list[dict[str, Any]]:
    """stage, state, why (a list of {"what", "is"}), frozen; in the order of dvc.yaml.

    Raises:
        DvcException: no DVC project; no stage of a name.
    """
    with Repo() as repo:
        chosen = [stage for name in names for stage in repo.stage.collect(name)] if names else repo.index.stages
        return [_row(stage) for stage in chosen]


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


def _row(stage: Stage) -> dict[str, Any]:
    known = {"stage": stage.addressing, "frozen": stage.frozen}
    if locks.holder(_lock(Path(), stage.addressing)):
        return known | {"state": RUNNING, "why": []}
    if not all(out.hash_info for out in stage.outs):
        return known | {"state": NEVER_RUN, "why": []}
    why = list(_reasons(stage))
    gone = all(reason["is"] in GONE for reason in why)
    return known | {"state": UP_TO_DATE if not why else MISSING if gone else CHANGED, "why": why}


def _reasons(stage: Stage) -> Iterator[dict[str, str]]:
    """Whatever differs from dvc.lock: a path, a parameter ("params.yaml: wanda.keep") or the command."""
    edited = [] if stage.frozen else code.changed_code(stage, made=True)
    yield from ({"what": path, "is": "modified"} for path in edited)
    told = code.listed(stage) if edited else None
    for entry in [*(() if stage.frozen else stage.deps), *stage.outs]:
        for path, state in entry.status().items() if entry is not told else ():
            if isinstance(state, dict):
                yield from ({"what": f"{path}: {name}", "is": word} for name, word in state.items())
            else:
                yield {"what": path, "is": state}
    if stage.changed_stage():
        yield {"what": "its entry in dvc.yaml", "is": "modified"}


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


def _lock(folder: Path, stage: str) -> Path:
    return folder / locks.FLOW.with_name(f"{stage}.lock")


def _run(kind: str, stage: str | None, holder: locks.Holder) -> dict[str, Any]:
    since = holder.since.isoformat(timespec="seconds")
    return {"kind": kind, "stage": stage, "pid": holder.pid, "command": holder.command, "since": since}


def _sentence(run: dict[str, Any]) -> str:
    what = {"flow": "a flow runs", "stage": "a stage runs", "night": "a night or its retention is at work"}[run["kind"]]
    at = f", at stage {run['stage']}" if run["stage"] else ""
    return f"{what}{at}: process {run['pid']} ({run['command']}), since {run['since'].replace('T', ' ')}"
