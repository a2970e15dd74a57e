"""The flow of one night: sources, the DAG in the nights' worktree, the gate, the record, and the promotion.

It compresses the committed HEAD with the newest revision of its sources (`tasks.nightly.newer_sources`), in a worktree
of its own (`tasks.nightly.worktree`), by the same flow as `make`, which becomes its subflow. What did not change is
Cached. ACCEPT promotes through the registry; any other verdict leaves the promoted model as it is. One event per night
tells verdict and figures. `edgepress night` runs and schedules it.
"""

from __future__ import annotations

import contextlib
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from flows.server import settings

settings.apply()

from prefect import flow, get_run_logger  # noqa: E402  the settings must be in the environment before Prefect is imported
from prefect.artifacts import create_table_artifact  # noqa: E402
from prefect.events import emit_event  # noqa: E402
from prefect.runtime import flow_run  # noqa: E402
from prefect.states import Completed, Failed, State  # noqa: E402

from flows.compress import compress, counted  # noqa: E402
from flows.notification import EVENT  # noqa: E402
from flows.server import dead_runs  # noqa: E402
from tasks.algorithms.statistics.gate import ACCEPT  # noqa: E402
from tasks.cli import console, gate  # noqa: E402
from tasks.nightly import judgement, newer_sources, records, worktree  # noqa: E402
from tasks.nightly.records import FAILED, Night  # noqa: E402
from tasks.parameters import schema  # noqa: E402
from tasks.registry import versions  # noqa: E402
from tasks.runtime import failures  # noqa: E402


@flow(name="night", persist_result=False)
def night() -> State:
    """One night; the run's state is Completed and has the verdict as its name, or Failed."""
    dead_runs.sign()
    dead_runs.sweep()
    try:
        top = worktree.root()
        own = schema.load(top / "params.yaml").nightly
        with worktree.locked(top, wait=own.overlap == "queue"):
            return _night(top, datetime.now(ZoneInfo(own.timezone)))
    except failures.REFUSED as error:  # what couldn't even be recorded: no room on the disk, say
        return Failed(message=str(error))


def _night(top: Path, started: datetime) -> State:
    if changes := worktree.uncommitted(top):
        get_run_logger().warning("uncommitted changes are left out, a night compresses HEAD: %s", changes)
    folder = worktree.prepare(top)
    name = f"{records.PREFIX}{started:%Y%m%d-%H%M%S}"
    record = {"started": started.isoformat(timespec="seconds"), "flow_run": str(flow_run.id), "stages": "none ran"}
    try:
        sources = newer_sources.bring(top, folder)
        name += f"-{newer_sources.digest(sources)[:8]}"
        record["upstream"] = [source._asdict() for source in sources]
        with contextlib.chdir(folder):
            state = compress(return_state=True)
        record["stages"] = state.message
        if not state.is_completed():
            return _failed(folder, name, record, state.message)
        record["stages"] = counted(state)
        found = _judged(top, folder, name, record)
    except failures.REFUSED as error:
        return _failed(folder, name, record, str(error))
    verdict = found.record["verdict"]
    try:
        promoted = _promoted(top, found)
    except failures.REFUSED as error:  # its verdict stands, and the next night promotes it
        promoted = f"not promoted: {error}"
        _announce(found, promoted)
        return Failed(message=f"{name}: {verdict}, but {promoted}")
    _announce(found, promoted)
    return Completed(name=verdict.capitalize(), message=f"{name}: {verdict}: {found.record['reason']}; {promoted}")


def _failed(folder: Path, name: str, record: dict[str, Any], reason: str) -> State:
    """Record and announce that the night came to no verdict."""
    _announce(records.save(folder, name, None, record | {"verdict": FAILED, "reason": reason}))
    return Failed(message=f"{name}: {reason}")


def _judged(top: Path, folder: Path, name: str, record: dict[str, Any]) -> Night:
    """Judge and record what the worktree holds, by the limits of the commit that was compressed."""
    candidate = worktree.snapshot(folder)
    evidence, current = judgement.read(top, candidate), versions.current(top)
    limits = schema.load(folder / "params.yaml").gate
    verdict = judgement.judge(evidence, judgement.read(top, current.revision) if current else None, limits)
    record |= {
        "verdict": verdict.verdict,
        "reason": verdict.reason,
        "figures": judgement.described(evidence),
        "checks": [check.row() for check in verdict.checks],
        "against": current.version if current else None,
    }
    rows = [{key: "" if value is None else value for key, value in row.items()} for row in record["checks"]]
    create_table_artifact(key="gate", table=rows, description=f"{name}: {verdict.verdict}: {verdict.reason}")
    print(f"\n{name}\n{console.text(gate.table(verdict))}\n{gate.sentence(verdict)}")
    return records.save(folder, name, candidate, record)


def _promoted(top: Path, found: Night) -> str:
    """What became of the model, in words; an accepted one is promoted, unless somebody rolled it back before.

    Raises:
        InputError, OSError: it was accepted and can't be promoted.
    """
    before = found.record["against"]
    if found.record["verdict"] != ACCEPT:
        return f"{before} stays promoted" if before else "nothing is promoted"
    verdict = {key: found.record[key] for key in ("verdict", "reason", "checks")} | {"night": found.name}
    try:
        version = versions.promote(top, found.commit, found.record["figures"], verdict).name
    except versions.Withdrawn as error:
        return f"not promoted: {error}"
    return f"{version} stays promoted" if version == before else f"{version} is promoted"


def _announce(found: Night, promoted: str = "") -> None:
    """One event per night, for automations (flows/notification.py)."""
    record = found.record
    emit_event(
        event=f"{EVENT}.{record['verdict'].lower()}",
        resource={"prefect.resource.id": f"{EVENT}.{found.name}", "prefect.resource.name": found.name},
        related=[{"prefect.resource.id": f"prefect.flow-run.{flow_run.id}", "prefect.resource.role": "flow-run"}],
        payload={key: value for key, value in record.items() if key != "checks"}
        | {"night": found.name, "commit": found.commit, "promotion": promoted}
        | {"failed": [check for check in record.get("checks", []) if check["outcome"] in ("fails", "undecided")]},
    )
