"""What a flow run would wait for without need, mended in Prefect's internals (prefect 3.8.8, pinned).

- The end of a flow waits until a thread that sends heartbeats wakes up, up to a second. It is told to stop all the
  same, and Prefect's asynchronous flows don't wait for it (`join_on_exit`).
- A first flow run imports what runs it only then: here that is imported with everything else, while the server starts.

tests/flows/test_prefect_internals.py holds Prefect to what is used of it here.
"""

from __future__ import annotations

import functools

import fastapi.encoders  # noqa: F401  what a flow's parameters are written with
from prefect import flow_engine, task_engine  # noqa: F401

SEND_HEARTBEATS = flow_engine._send_heartbeats


def apply() -> None:
    """To be called before a flow runs."""
    flow_engine._send_heartbeats = functools.partial(SEND_HEARTBEATS, join_on_exit=False)
