"""Which process a flow run belongs to, and the end of those whose process is gone.

A process that is killed (SIGKILL, power loss) can't tell the server, and its run stays Running: it is drawn as alive,
and holds the deployment's only slot. So every flow of this project signs its run with process, start and boot, as
labels, and `make` and a night begin with a sweep. Runs of another host, and unsigned ones, are left to an automation
that watches their heartbeat.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.states import Crashed

PID, STARTED, BOOT, HOST = (f"edgepress.{word}" for word in ("pid", "started", "boot", "host"))
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
ALIVE = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
PAGE = 200


def sign() -> None:
    """Note on the current flow run which process it runs in; a server that refuses is no reason to fail."""
    try:
        with get_client(sync_client=True) as client:
            client.update_flow_run_labels(flow_run.id, _own())
    except httpx.HTTPError as error:
        logging.getLogger("prefect").warning("if this process is killed, only its heartbeat will tell: %s", error)


def sweep() -> list[FlowRun]:
    """Set every run whose process is gone to Crashed, which frees its slot; returns them."""
    with get_client(sync_client=True) as client:
        dead = [run for run in _alive(client) if _is_dead(run.labels)]
        for run in dead:
            message = f"its process {run.labels[PID]} is gone"
            client.set_flow_run_state(run.id, Crashed(message=message), force=True)
            logging.getLogger("prefect").warning("flow run %s was left as running: %s", run.name, message)
    return dead


def drop_missed(deployment: str) -> int:
    """Of the scheduled runs that were due while nobody served the deployment, keep the last one; returns how many go.

    Those that somebody asked for stay.

    Args:
        deployment: "flow/deployment".
    """
    with get_client(sync_client=True) as client:
        try:
            known = client.read_deployment_by_name(deployment)
        except ObjectNotFound:  # it was never served
            return 0
        due = {"before_": datetime.now(UTC)}
        only = FlowRunFilter(
            deployment_id={"any_": [known.id]}, state={"type": {"any_": [StateType.SCHEDULED]}}, expected_start_time=due
        )
        runs = client.read_flow_runs(flow_run_filter=only, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=PAGE)
        missed = [run for run in runs if run.auto_scheduled][1:]
        for run in missed:
            client.delete_flow_run(run.id)
    return len(missed)


def _alive(client: SyncPrefectClient) -> list[FlowRun]:
    only = FlowRunFilter(state={"type": {"any_": ALIVE}})
    found: list[FlowRun] = []
    while page := client.read_flow_runs(flow_run_filter=only, limit=PAGE, offset=len(found)):
        found += page
    return found


def _own() -> dict[str, Any]:
    process = psutil.Process()
    return {PID: process.pid, STARTED: process.create_time(), BOOT: _boot(), HOST: socket.gethostname()}


def _is_dead(labels: Mapping[str, Any]) -> bool:
    if labels.get(HOST) != socket.gethostname() or PID not in labels:
        return False
    if labels.get(BOOT) != _boot():
        return True
    try:
        process = psutil.Process(labels[PID])
        reused = abs(process.create_time() - labels[STARTED]) > 1  # seconds
        return reused or process.status() == psutil.STATUS_ZOMBIE  # killed, and its parent has not noticed (yet)
    except psutil.NoSuchProcess:
        return True


def _boot() -> str:
    return BOOT_ID.read_text(encoding="utf-8").strip() if BOOT_ID.exists() else str(int(psutil.boot_time()))
