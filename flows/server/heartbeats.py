"""An automation of the server: a flow run whose process was killed does not stay Running.

A killed process can't tell the server. Every flow run sends a heartbeat each 30 s (flows/server/settings.py); one that
misses three, and did not end, becomes Crashed. Prefect's own interval of 180 s would make healthy runs crash under this
window (3.8.8), so a flow that is started without flows/server/settings.py needs PREFECT_FLOWS_HEARTBEAT_FREQUENCY=30
too.
"""

from __future__ import annotations

from datetime import timedelta

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

NAME = "edgepress: flow runs without a heartbeat are Crashed"
HEARTBEAT = "prefect.flow-run.heartbeat"
ENDS = tuple(f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed"))
WINDOW = timedelta(seconds=100)
"""More than three heartbeats."""


def automation() -> AutomationCore:
    """After a heartbeat, another one or an end of the run is expected within the window."""
    return AutomationCore(
        name=NAME,
        trigger=EventTrigger(
            after={HEARTBEAT},
            expect={HEARTBEAT, *ENDS},
            match={"prefect.resource.id": ["prefect.flow-run.*"]},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=WINDOW,
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message=f"no heartbeat for {WINDOW.seconds} s")],
    )


def watch(client: SyncPrefectClient) -> None:
    """Make the server have the automation, once."""
    if not client.read_automations_by_name(NAME):
        client.create_automation(automation())
