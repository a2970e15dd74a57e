"""Speeds are taken for a model only where they are of its files and the workload."""

from __future__ import annotations

import pytest

from tasks.evaluation import measurements

WORKLOAD = {"threads": 1, "new_tokens": 64}
MODELS = {
    "measured": True,
    "engine": "an engine",
    "workload": WORKLOAD,
    "models": {"fetch": {"bytes": 9, "files": "f"}, "package": {"bytes": 3, "files": "p"}},
}
RECORD = {
    "started": "2026-11-20T10:00:00+00:00",
    "host": {"processor": "Xeon", "cores": 2},
    "workload": WORKLOAD,
    "measured": {"fetch": {"files": "f", "speed": 1.5}, "package": {"files": "p", "speed": 2.5}},
}


def test_a_model_has_its_figures_and_whose_they_are() -> None:
    found = measurements.hosts(MODELS, RECORD)
    assert list(found) == ["fetch", "package"]
    assert found["package"] == {
        **{"model": "package", "measured": True, "engine": "an engine", "bytes": 3, "speed": 2.5},
        **{"workload": WORKLOAD, "host": RECORD["host"], "when": RECORD["started"]},
    }
    assert measurements.source(found) == "Xeon, 2 cores, 2026-11-20"


@pytest.mark.parametrize(
    ("record", "known"),
    [
        (None, {"fetch": False, "package": False}),
        ({}, {"fetch": False, "package": False}),
        (RECORD | {"workload": {"threads": 2}}, {"fetch": False, "package": False}),
        (
            RECORD | {"measured": RECORD["measured"] | {"package": {"files": "other"}}},
            {"fetch": True, "package": False},
        ),
    ],
)
def test_figures_of_other_files_or_another_workload_are_none(record, known) -> None:
    found = measurements.hosts(MODELS, record)
    assert {name: one["measured"] for name, one in found.items()} == known
    assert found["package"]["why"] == measurements.UNKNOWN


def test_off_and_nothing_there() -> None:
    off = measurements.hosts({"measured": False, "models": {"fetch": {}}}, RECORD)
    assert off == {"fetch": {"model": "fetch", "measured": False, "why": measurements.OFF}}
    assert measurements.source(off) is None and measurements.hosts({}, RECORD) == {}
