"""Lineage records in a small repository of its own: who made what, with what, when."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tasks.runtime import lineage
from tests.support.lineage_project import call, record


def test_record_agrees_with_the_lock(recorded: Path) -> None:
    entry = record(recorded, "train")
    lock = yaml.safe_load((recorded / "dvc.lock").read_text())["stages"]["train"]
    assert entry["inputs"] == {item["path"]: item["md5"] for item in lock["deps"]}
    assert entry["inputs"]["data/corpus"].endswith(".dir")
    locked = {item["path"]: item["md5"] for item in lock["outs"]}
    assert entry["outputs"] == {"data/train": locked["data/train"]}
    assert entry["code"] == entry["inputs"]["data/code/train.json"]
    assert entry["parameters"] == {"train.steps": 3}


def test_record_says_who_when_and_with_what(recorded: Path) -> None:
    entry = record(recorded, "train")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=recorded, capture_output=True, text=True, check=True)
    assert entry["git"] == {"revision": head.stdout.strip(), "dirty": False}  # dvc.lock alone is no change
    assert entry["seed"] == 7 and record(recorded, "corpus")["seed"] is None
    assert entry["run_ids"] == {"flow_run": "f-1"}
    assert entry["started"].endswith("+00:00") and entry["seconds"] >= 0
    assert entry["peak_memory_bytes"] > 2**20
    assert entry["packages"].keys() == set(lineage.PACKAGES) and entry["packages"]["dvc"]
    assert entry["machine"].keys() == {"platform", "cpus", "threads", "python"}


def test_a_stage_without_a_record_gets_none(repository: Path) -> None:
    call(sys.executable, "-m", "dvc", "repro", "-q", "unused", cwd=repository)
    assert not (repository / "data/lineage/unused.json").exists()


def test_dirty_and_no_git(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repository / "make.py").write_text("answer = 43\n")
    assert lineage._git_state()["dirty"] is True
    monkeypatch.setenv("PATH", "")
    assert lineage._git_state() == {"revision": None, "dirty": None}
