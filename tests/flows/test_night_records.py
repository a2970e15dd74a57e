"""Lineage records on the way from the workspace to the nights and back: nothing is computed twice, nothing is lost."""

from __future__ import annotations

import json
import sys

import pytest

from flows import retention
from tasks.nightly import records
from tests.support.nightly_project import NightlyProject, workspace

ONCE = ("-m", "tasks", "night", "--once")
CACHED = "0 of 8 stages ran"


@pytest.fixture
def plain(tmp_path):
    """The project without a server."""
    return NightlyProject(tmp_path)


@pytest.fixture
def served(plain):
    """The project, with a server of its own."""
    with plain.served() as found:
        yield found


def last(project):
    return records.listing(project.path)[-1]


@pytest.mark.slow  # a flow and three nights
def test_a_night_after_a_run_computes_nothing_and_records_go_with_the_nights(served) -> None:
    served.python("-m", "tasks", "run")
    served.commit("as make leaves it")
    record = served.path / "data/lineage/measure.json"
    first, before = record.read_bytes(), workspace(served)
    served.python(*ONCE)
    night = last(served)
    assert (night.record["verdict"], night.record["stages"]) == ("ACCEPT", CACHED)
    assert night.record["figures"]["seconds_per_token"] == 0.01  # which no output holds
    assert workspace(served) == before
    served.weights(0.001)
    served.python(*ONCE)
    changed = last(served)
    assert changed.record["figures"]["seconds_per_token"] == 0.01
    latency = [check for check in changed.record["checks"] if check["value"] == 1.0 and "token" in check["check"]]
    assert record.read_bytes() == first and latency
    served.weights(0.0)
    served.python(*ONCE)
    assert last(served).record["stages"] == CACHED
    assert served.run("git", "show", f"{last(served).commit}:data/lineage/measure.json").encode() == first
    served.weights(0.001)
    served.commit("the source of that night")
    served.python("-m", "tasks", "night", "apply", changed.name)
    entry = json.loads(record.read_bytes())
    assert record.read_bytes() != first and entry["measured"].keys() == {"package"}
    assert (served.path / "data/report/report.html").read_bytes() == record.read_bytes()
    assert "up to date" in served.run(sys.executable, "-m", "dvc", "status")


def test_a_record_goes_with_the_data_that_it_is_of(plain) -> None:
    def repro():
        plain.python("-m", "dvc", "repro", "measure")

    repro()
    (old,) = plain.path.glob("data/lineage/here/measure/*.json")
    plain.commit("first")
    commits = [plain.run("git", "rev-parse", "HEAD").strip()]
    plain.weights(0.5)
    repro()
    assert retention._cache(plain.path, commits) == []  # a commit and the workspace name all of it
    items = {item.kind: item for item in retention._cache(plain.path, [])}
    assert items["record"].what == str(old.relative_to(plain.path)) and items["record"].bytes == old.stat().st_size
    for item in items.values():
        item.remove()
    assert not old.exists() and len(list(plain.path.glob("data/lineage/here/measure/*.json"))) == 1
    assert retention._cache(plain.path, []) == []
