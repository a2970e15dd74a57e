"""`edgepress status` on a small project: each state with its reason, and what runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

from tasks.nightly import worktree
from tasks.runtime import estimates, locks, staleness
from tests.support.command import edgepress
from tests.support.paths import ROOT

LIST = """
from pathlib import Path
from tasks.runtime import code, files
Path("data/code").mkdir(parents=True)
files.write_json(Path("data/code/first.json"), code.listing("first", Path()))
"""
STAGES = {
    "code": {"cmd": f"PYTHONPATH={ROOT} {sys.executable} list.py", "deps": ["tasks"], "outs": ["data/code"]},
    "first": {
        "cmd": "cat source.txt > first.txt",
        "deps": ["source.txt", "data/code/first.json"],
        "params": ["words"],
        "outs": ["first.txt"],
    },
    "last": {"cmd": "cat first.txt > last.txt", "deps": ["first.txt"], "outs": ["last.txt"]},
    "later": {"cmd": "cat last.txt > later.txt", "deps": ["last.txt"], "outs": ["later.txt"]},
}


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A project in which all stages but the last have run."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}, sort_keys=False))
    (folder / "params.yaml").write_text("words: 1\n")
    (folder / "list.py").write_text(LIST)
    (folder / "tasks").mkdir()
    (folder / "tasks/first.py").write_text("")
    (folder / "source.txt").write_text("once\n")
    Repo.init(str(folder), no_scm=True).close()
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q", "last"], cwd=folder, check=True)
    return folder


@pytest.fixture
def project(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    subprocess.run(["cp", "-r", f"{template}/.", str(tmp_path)], check=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def states(capsys) -> dict[str, tuple[str, list[str]]]:
    code, out, errors = edgepress(capsys, "status", "--json")
    assert (code, errors) == (0, "")
    rows = json.loads(out)["stages"]
    return {row["stage"]: (row["state"], [reason["what"] for reason in row["why"]]) for row in rows}


def test_what_is_up_to_date_and_what_never_ran(project: Path, capsys) -> None:
    made = dict.fromkeys(("code", "first", "last"), (staleness.UP_TO_DATE, []))
    assert states(capsys) == made | {"later": (staleness.NEVER_RUN, [])}
    code, out, errors = edgepress(capsys, "status")
    assert (code, errors) == (0, "") and out.splitlines()[-2:] == ["3 up to date, 1 never run", "nothing runs"]
    assert edgepress(capsys, "status", "last")[1].splitlines()[2].split() == ["last", "up", "to", "date"]


def test_it_changes_nothing(project: Path, capsys) -> None:
    def kept() -> dict[str, bytes]:
        files = (path for path in project.rglob("*") if path.is_file() and "tmp" not in path.parts)
        return {str(path): path.read_bytes() for path in files}

    before = kept()
    edgepress(capsys, "status")
    assert kept() == before


ALTERATIONS = {
    "source": (lambda: Path("source.txt").write_text("twice\n"), {"first": (staleness.CHANGED, ["source.txt"])}),
    "parameter": (
        lambda: Path("params.yaml").write_text("words: 2\n"),
        {"first": (staleness.CHANGED, ["params.yaml: words"])},
    ),
    "code": (
        lambda: Path("tasks/first.py").write_text("more = 1\n"),
        {"code": (staleness.CHANGED, ["tasks"]), "first": (staleness.CHANGED, ["tasks/first.py"])},
    ),
    "command": (
        lambda: Path("dvc.yaml").write_text(Path("dvc.yaml").read_text().replace("cat source", "cat  source")),
        {"first": (staleness.CHANGED, ["its entry in dvc.yaml"])},
    ),
    "missing output": (
        lambda: Path("first.txt").unlink(),
        {"first": (staleness.MISSING, ["first.txt"]), "last": (staleness.MISSING, ["first.txt"])},
    ),
}


@pytest.mark.parametrize("what", ALTERATIONS)
def test_what_changed_is_named(project: Path, capsys, what: str) -> None:
    alter, expected = ALTERATIONS[what]
    alter()
    found = states(capsys)
    assert {name: row for name, row in found.items() if row[0] in (staleness.CHANGED, staleness.MISSING)} == expected
    out = edgepress(capsys, "status")[1]
    assert all(reason in out for _, reasons in expected.values() for reason in reasons)


def test_code_that_was_listed_and_not_run_yet_is_named(project: Path, capsys) -> None:
    Path("tasks/first.py").write_text("more = 1\n")
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q", "code"], check=True)
    found = states(capsys)
    assert found["code"] == (staleness.UP_TO_DATE, []) and found["first"] == (staleness.CHANGED, ["tasks/first.py"])


def test_what_runs_is_told_with_its_stage(project: Path, capsys) -> None:
    with locks.held(locks.FLOW.with_name("last.lock"), ""):
        assert states(capsys)["last"] == (staleness.RUNNING, [])
        assert "a stage runs, at stage last: process" in edgepress(capsys, "status")[1]
        with locks.held(locks.FLOW, ""):
            out = edgepress(capsys, "status")[1]
            assert "a flow runs, at stage last: process" in out and "a stage runs" not in out
    with locks.held(worktree.LOCK, ""), locks.held(worktree.WORKTREE / locks.FLOW.with_name("wanda.lock"), ""):
        (night,) = json.loads(edgepress(capsys, "status", "--json")[1])["running"]
    assert (night["kind"], night["stage"]) == ("night", "wanda") and night["since"] and night["command"]


def test_elsewhere_it_is_refused(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, errors = edgepress(capsys, "status")
    assert (code, out) == (1, "") and "run from the project's folder" in errors


def test_it_says_how_long_what_is_left_takes(project: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def of_run(_, stale, *, flow):
        asked.append(({stage.addressing for stage in stale}, flow))
        return estimates.Run({"later": 90.0, "last": 30.0}, 120.0, tuple(running))

    running: list[str] = []
    monkeypatch.setattr(estimates, "of_run", of_run)
    out = edgepress(capsys, "status")[1]
    assert out.splitlines()[-1] == "`dvc repro` would take about 2 min on this machine: later 1.5, last 0.5 min"
    running.append("last")
    with locks.held(locks.FLOW, ""):
        out = edgepress(capsys, "status")[1]
        assert out.splitlines()[-1] == "2 of 4 stages are done, 1 to come; about 2 min left (now last 30 s)"
        found = json.loads(edgepress(capsys, "status", "--json")[1])["left"]
    assert found == {"seconds": 120.0, "stages": {"later": 90.0, "last": 30.0}, "running": ["last"]}
    assert asked == [({"later"}, False), ({"later"}, True), ({"later"}, True)]
    assert "left" not in edgepress(capsys, "status", "last")[1]
