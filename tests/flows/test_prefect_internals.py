"""Prefect's internals that the flow mends: they are as it expects, and still need it."""

from __future__ import annotations

import inspect
import os
import threading
import time
from types import SimpleNamespace

from flows.server import settings
from tests.support.paths import ROOT

os.environ.setdefault("PREFECT_HOME", str(ROOT / settings.HOME))  # else importing Prefect makes a folder in ~

from prefect import flow_engine, flows  # noqa: E402

from flows import prefect_internals  # noqa: E402


def engine():
    """As much of one as its heartbeats need."""
    return SimpleNamespace(
        heartbeat_seconds=30,
        flow_run=None,
        logger=SimpleNamespace(debug=lambda *_, **__: None),
        _build_heartbeat_event_template=lambda: (None, None),
        _emit_flow_run_heartbeat=lambda *_: None,
    )


def seconds_to_end(send_heartbeats) -> float:
    """How long the end waits for the thread, which is asleep when it comes."""
    before = set(threading.enumerate())
    with send_heartbeats(engine()):
        assert set(threading.enumerate()) - before
        time.sleep(0.1)
        began = time.monotonic()
    took = time.monotonic() - began
    end = time.monotonic() + 5
    while set(threading.enumerate()) - before:  # told to stop in both cases
        assert time.monotonic() < end
        time.sleep(0.01)
    return took


def test_the_end_of_a_flow_does_not_wait_for_its_heartbeats(monkeypatch) -> None:
    monkeypatch.setattr(flow_engine, "_send_heartbeats", prefect_internals.SEND_HEARTBEATS)
    assert seconds_to_end(flow_engine._send_heartbeats) > 0.5  # Prefect's own still does
    prefect_internals.apply()
    assert seconds_to_end(flow_engine._send_heartbeats) < 0.5
    assert "with _send_heartbeats(self):" in inspect.getsource(flow_engine.FlowRunEngine.run_context)


def test_what_a_first_run_imports_is_there_before() -> None:
    assert "from fastapi.encoders import jsonable_encoder" in inspect.getsource(flows.Flow.serialize_parameters)
    assert "from prefect.flow_engine import run_flow" in inspect.getsource(flows.Flow.__call__)
