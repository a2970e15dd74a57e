"""Which stages are up to date, which are not and why, and which of them a run would compute.

A stage is compared with its entry in dvc.lock as `dvc status` does it: inputs, code, parameters, command, outputs.
DVC's locks are not taken, so it answers while a run goes on; it changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.runtime import code, locks

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc.stage import Stage

STATES = ("up to date", "changed", "missing", "never run", "running")
UP_TO_DATE, CHANGED, MISSING, NEVER_RUN, RUNNING = STATES
"""States of a stage. `MISSING`: only files that aren't there make it differ; `dvc checkout` or a run brings them."""
NOWHERE = "not in cache"
"""What DVC says of an output that only a run brings back."""
GONE = ("deleted", NOWHERE)
"""What DVC says of files that are not there."""


def row(stage: Stage) -> dict[str, Any]:
    """stage, state, why (a list of {"what", "is"}), frozen."""
    known = {"stage": stage.addressing, "frozen": stage.frozen}
    if locks.holder(lock(Path(), stage.addressing)):
        return known | {"state": RUNNING, "why": []}
    if not all(out.hash_info for out in stage.outs):
        return known | {"state": NEVER_RUN, "why": []}
    why = list(_reasons(stage))
    gone = all(reason["is"] in GONE for reason in why)
    return known | {"state": UP_TO_DATE if not why else MISSING if gone else CHANGED, "why": why}


def to_run(repo: Repo, rows: Iterable[Mapping[str, Any]]) -> dict[Stage, list[Stage]]:
    """The stages that a run would compute, in its order, each with those of them that it waits for.

    They are those that differ, and all after them, though an output may turn out to be as it was. Of a list of code it
    is known already whether it is: what stage code is to make again makes nothing else stale by itself.

    Args:
        rows: of all stages.
    """
    graph = repo.index.graph
    differ = {
        found["stage"]
        for found in rows
        if found["state"] in (CHANGED, NEVER_RUN, RUNNING) or any(why["is"] == NOWHERE for why in found["why"])
    }
    stale: dict[Stage, list[Stage]] = {}
    seen: set[Stage] = set()

    def visit(stage: Stage) -> None:
        if stage in seen:
            return
        seen.add(stage)
        above = sorted(graph.successors(stage), key=lambda other: other.addressing)
        for other in above:
            visit(other)
        waits = [other for other in above if other in stale]
        below = any(other.name != code.STAGE for other in waits)
        if not stage.frozen and (stage.addressing in differ or below):
            stale[stage] = waits

    for stage in repo.index.stages:
        visit(stage)
    return stale


def lock(folder: Path, address: str) -> Path:
    """The file that a stage that runs in a project's folder has locked."""
    return folder / locks.FLOW.with_name(f"{address}.lock")


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
