"""Lineage records in a small repository of its own: who made what, with what, when."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

from tasks.algorithms.errors import InputError
from tasks.runtime import lineage
from tests.support import lineage_project
from tests.support.command import edgepress
from tests.support.lineage_project import commit, record, repro, status


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


def test_what_a_stage_took_is_read_back(repository: Path) -> None:
    with Repo() as repo:
        stage = repo.stage.load_one(name="train")
        assert lineage.took(stage) == {"seconds": record(repository, "train")["seconds"]}
        listed = lineage.link(stage)
        assert listed["record"] == (repository / "data/lineage/train.json").as_uri()
        assert (record(repository, "train")["code"] or "")[:12] == listed["code"]
        lineage.record_path(stage).write_text("{")
        assert lineage.link(stage) == {}


def test_dirty_and_no_git(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repository / "make.py").write_text("answer = 43\n")
    assert lineage._git_state()["dirty"] is True
    monkeypatch.setenv("PATH", "")
    assert lineage._git_state() == {"revision": None, "dirty": None}


ALL = ["code", "corpus", "train", "score@train", "speed", "report"]


@pytest.fixture
def committed(repository: Path) -> Path:
    """The repository with dvc.lock and records in git."""
    commit(repository)
    return repository


def steps(root: Path, count: int) -> None:
    (root / "params.yaml").write_text(f"corpus: {{seed: 1, words: [a, b]}}\ntrain: {{steps: {count}}}\n")


def test_a_run_that_reproduces_leaves_git_clean_and_what_it_was_like_here(committed: Path, tmp_path: Path) -> None:
    root = lineage_project.clone(committed, tmp_path / "clone")
    assert sorted(repro(root)) == sorted(ALL)  # there is no cache
    assert status(root) == ""
    for name in ALL:
        (here,) = (root / "data/lineage/here" / name).iterdir()
        first, own = record(root, name), lineage.read(here)
        assert first == record(committed, name) and first["started"] < own["started"]
        assert all(first[key] == own[key] for key in lineage.RESULT)
    (here,) = (root / "data/lineage/here/speed").iterdir()
    assert str(record(root, "speed")["measured"]) in (root / "data/report.txt").read_text()
    assert lineage.read(here)["measured"] > record(root, "speed")["measured"]
    assert repro(root) == [] and status(root) == ""


def test_a_parameter_rewrites_the_records_below_it_and_going_back_brings_them_back(committed: Path) -> None:
    page, speed = Path("data/report.txt").read_text(), record(committed, "speed")
    steps(committed, 4)
    assert repro(committed) == ["train", "score@train", "speed", "report"]
    assert {line.split()[-1] for line in status(committed).splitlines()} == {
        *("params.yaml", "dvc.lock"),
        *(f"data/lineage/{name}.json" for name in ALL if name not in ("code", "corpus")),
    }
    assert record(committed, "train")["parameters"] == {"train.steps": 4} and record(committed, "speed") != speed
    assert str(record(committed, "speed")["measured"]) in Path("data/report.txt").read_text() != page
    steps(committed, 3)
    # DVC alone restores results without their records; the report asks for the one that it reads
    assert repro(committed) == ["report"]
    assert Path("data/report.txt").read_text() == page and record(committed, "speed") == speed
    with Repo() as repo:
        assert record(committed, "train")["parameters"] == {"train.steps": 4}
        assert all(lineage.keep(repo.stage.load_one(name=name)) for name in ALL)  # as the flow does for every stage
    assert status(committed) == ""


def test_going_back_to_what_was_never_committed_finds_what_this_machine_noted(repository: Path) -> None:
    first = {name: record(repository, name) for name in ALL}
    steps(repository, 4)
    repro(repository)
    steps(repository, 3)
    repro(repository)
    with Repo() as repo:
        stages = {name: repo.stage.load_one(name=name) for name in ALL}
        assert {name: lineage.find(stage) for name, stage in stages.items()} == first
        own = {name: lineage.local(stage) for name, stage in stages.items()}
        assert own.pop("report")["outputs"] == first.pop("report")["outputs"]  # which had to be made again
        assert own == first


def test_what_was_made_elsewhere_has_no_record(repository: Path) -> None:
    for path in Path("data/lineage").glob("**/train*"):
        path.unlink() if path.is_file() else shutil.rmtree(path)
    with Repo() as repo:
        stage = repo.stage.load_one(name="train")
        assert (lineage.find(stage), lineage.local(stage), lineage.keep(stage)) == (None, None, None)
        with pytest.raises(InputError, match="has not computed the outputs of train .*`dvc repro -s -f train` does"):
            lineage.adopt(stage)


def test_a_second_run_s_speeds_are_adopted_by_a_command(committed: Path, capsys) -> None:
    before = record(committed, "speed")["measured"]
    assert repro(committed, "-sf", "speed") == ["speed"]
    assert status(committed) == ""
    code, out, _ = edgepress(capsys, "lineage", "adopt", "speed")
    assert code == 0 and out.startswith("data/lineage/speed.json is that of 20")
    assert record(committed, "speed")["measured"] > before
    assert repro(committed) == ["report"]
    assert str(record(committed, "speed")["measured"]) in Path("data/report.txt").read_text()


def test_changes_of_results_alone_are_not_dirty(committed: Path) -> None:
    steps(committed, 4)
    commit(committed)
    repro(committed)  # dvc.lock and records differ from HEAD
    assert lineage._git_state()["dirty"] is False
