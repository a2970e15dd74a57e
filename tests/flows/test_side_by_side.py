"""The flow on toy stages that wait for each other: which run at once, and how a failure or a signal ends them."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from dvc.repo import Repo

from tests.flows.test_flow import FLOW, environment, run, summary
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow  # a server of its own each

SCRIPT = """
import os, signal, sys, time
from pathlib import Path

def end(*_):
    Path(f"ended-{name}").touch()
    sys.exit(1)

_, _, name, how = sys.argv
signal.signal(signal.SIGTERM, end)
assert not os.environ.get("EDGEPRESS_LOG") or os.environ["OMP_NUM_THREADS"] in ("1", "2")
running = Path(f"running-{name}")
running.touch()
until = time.monotonic() + 60
partner = {"left": "right", "right": "left"}[name] if how == "meet" else None
met = Path(f"met-{partner}")
while how == "wait" or (partner and not met.exists()):
    if Path(f"running-{partner}").exists():
        Path(f"met-{name}").touch()
    assert time.monotonic() < until
    time.sleep(0.05)
if partner:
    Path(f"met-{name}").touch()
if how == "fail":
    while not Path("running-right").exists():
        time.sleep(0.05)
    print("error: left: no such thing", file=open(os.environ["EDGEPRESS_LOG"], "a"))
    sys.exit(1)
if how == "finish":
    time.sleep(2)
if how == "alone":
    assert list(Path().glob("running-*")) == [running]
Path(f"{name}.txt").write_text(name)
running.unlink()
"""


def stage(name, how, deps, **more):
    command = f"python stage.py flows.stage {name} {how}"
    return {"cmd": command, "deps": ["stage.py", *deps], "outs": [f"{name}.txt"], **more}


def project(folder, left, right):
    """left and right, whose result is needed by both of the next; one of them measures time."""
    folder.mkdir(exist_ok=True)
    for name in ("flows", "tasks"):
        (folder / name).symlink_to(ROOT / name)
    stages = {"left": stage("left", left, []), "right": stage("right", right, [])}
    both = ["left.txt", "right.txt"]
    stages |= {"timed": stage("timed", "alone", both, meta={"alone": True}), "other": stage("other", "go", both)}
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}), encoding="utf-8")
    (folder / "stage.py").write_text(SCRIPT, encoding="utf-8")
    (folder / "value.yaml").write_text("", encoding="utf-8")
    Repo.init(str(folder), no_scm=True).close()
    return folder


TWO_CORES = f"import os; os.sched_getaffinity = lambda _: {{0, 1}}; os.environ.pop('OMP_NUM_THREADS', None)\n{FLOW}"


def runs(folder):
    return json.loads((folder / "runs.json").read_text())


def test_independent_stages_run_at_once_with_the_bytes_of_dvc_repro(tmp_path) -> None:
    flow, dvc = project(tmp_path / "flow", "meet", "meet"), project(tmp_path / "dvc", "go", "go")
    output = run(flow, "-c", TWO_CORES, json.dumps([""]))
    (found,) = runs(flow)
    assert found["failure"] is None, output
    assert sorted(summary(found)) == [(name, "Completed", "ran") for name in ("left", "other", "right", "timed")]
    assert [row["stage"] for row in found["rows"]][3] == "timed"
    for row in found["rows"]:
        assert row["computing"] > 0 and row["waiting"] >= 0
    assert "Running stage" not in run(flow, "-m", "dvc", "repro")
    shutil.copyfile(flow / "dvc.yaml", dvc / "dvc.yaml")
    for name in ("met-left", "met-right"):
        (dvc / name).touch()
    run(dvc, "-m", "dvc", "repro")
    assert (flow / "dvc.lock").read_text() == (dvc / "dvc.lock").read_text()


def test_a_failure_lets_end_what_runs_and_starts_nothing(tmp_path) -> None:
    folder = project(tmp_path / "flow", "fail", "finish")
    output = run(folder, "-c", TWO_CORES, json.dumps([""]))
    (found,) = runs(folder)
    assert summary(found) == [("left", "Failed", "left: no such thing"), ("right", "Completed", "ran")], output
    assert found["failure"] == "left: no such thing"
    assert "what runs is let end, and nothing is started: right" in output
    assert (folder / "right.txt").read_text() == "right"
    assert "right" in yaml.safe_load((folder / "dvc.lock").read_text())["stages"]


@pytest.mark.parametrize(
    ("sent", "shell"), [(signal.SIGTERM, "/bin/sh"), (signal.SIGINT, "/bin/sh"), (signal.SIGTERM, "/bin/bash")]
)
def test_a_signal_ends_all_that_runs_in_peace(tmp_path, sent, shell) -> None:
    """DVC starts a stage by $SHELL: where that is dash it waits for the stage, bash becomes the stage."""
    folder = project(tmp_path / "flow", "wait", "wait")
    flow = subprocess.Popen(
        [sys.executable, "-c", TWO_CORES, json.dumps([""])],
        cwd=folder,
        env=environment(folder) | {"SHELL": shell},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        until = time.monotonic() + 200
        while not ((folder / "running-left").exists() and (folder / "running-right").exists()):
            assert time.monotonic() < until and flow.poll() is None
            time.sleep(0.1)
        flow.send_signal(sent)
        output, _ = flow.communicate(timeout=100)
    finally:
        flow.kill()
    assert flow.returncode != 0
    assert (folder / "ended-left").exists() and (folder / "ended-right").exists(), output
    assert json.loads((folder / ".dvc/tmp/rwlock").read_text()) == {}
