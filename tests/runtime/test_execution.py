"""When a toy stage's outputs appear, what a failure leaves behind, and what comes back."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from tasks.algorithms.errors import InputError
from tasks.runtime import execution
from tasks.runtime.execution import execute
from tasks.runtime.stage import Stage
from tests.support.project import clean_environment
from tests.support.toy_stages import OUTPUTS, Toy, raising, started, write


def test_outputs_appear_only_when_all_are_written(made: Toy, run_here) -> None:
    def run(stage: Stage) -> None:
        write(stage)
        assert made.outputs() == {}

    run_here(run)
    assert made.outputs() == {"data/toy/model/a": "2", "data/toy/table.csv": "2"}
    assert json.loads(Path("data/lineage/toy.json").read_text())["outputs"].keys() == {"data/toy"}
    assert made.left() == []


def test_what_a_stage_notes_is_in_its_record_and_can_t_pose_as_anything_else(made: Toy, run_here) -> None:
    def run(stage: Stage) -> None:
        write(stage)
        stage.note(measured={"a": 1.5}, seconds="never")

    run_here(run)
    record = json.loads(Path("data/lineage/toy.json").read_text())
    assert record["measured"] == {"a": 1.5} and record["seconds"] >= 0


def test_what_a_killed_run_left_is_not_taken_for_an_output(made: Toy, run_here) -> None:
    stale = Path("data/.scratch/toy/data/toy/model/stale")
    stale.parent.mkdir(parents=True)
    stale.touch()
    run_here(write)
    assert made.outputs() == {"data/toy/model/a": "2", "data/toy/table.csv": "2"}


def test_a_failing_stage_under_dvc_leaves_everything_as_it_was(made: Toy) -> None:
    lock = Path("dvc.lock").read_bytes()
    record = Path("data/lineage/toy.json").read_bytes()
    made.set(how="raise", value=7)
    failed = made.repro()
    assert failed.returncode != 0
    assert "Traceback" in failed.stdout and "RuntimeError: boom" in failed.stdout  # a mistake of the code, not a user's
    assert Path("dvc.lock").read_bytes() == lock and Path("data/lineage/toy.json").read_bytes() == record
    assert made.outputs() == OUTPUTS and made.left() == []
    made.set()
    assert "up to date" in made("-m", "dvc", "status", "toy").stdout
    assert "Running stage" not in made.repro().stdout


def test_a_missing_output_is_an_error(made: Toy, run_here) -> None:
    with pytest.raises(RuntimeError, match="stage toy did not write data/toy/table.csv"):
        run_here(lambda stage: stage.output("model").mkdir())
    assert made.outputs() == OUTPUTS and made.left() == []


def test_a_failure_while_moving_brings_back_what_was_there(made: Toy, run_here, monkeypatch) -> None:
    replace = os.replace

    def fail_for_the_folder(source, target) -> None:
        if Path(target) == Path("data/toy"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(execution.os, "replace", fail_for_the_folder)
    with pytest.raises(InputError, match="the outputs of stage toy: the disk is full"):
        run_here(write)
    assert made.outputs() == OUTPUTS and made.left() == []


def test_a_failing_record_brings_the_previous_outputs_back(made: Toy, run_here, monkeypatch) -> None:
    def fail(*_, **__) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "data/lineage/toy.json")

    monkeypatch.setattr(execution.lineage, "record", fail)
    with pytest.raises(InputError, match="data/lineage/toy.json: the folder is read-only"):
        run_here(write)
    assert made.outputs() == OUTPUTS


def test_on_a_full_disk_the_previous_outputs_come_back_as_links(made: Toy, run_here, monkeypatch) -> None:
    def full(*_, **__) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("dvc.output.Output.checkout", full)
    with pytest.raises(InputError, match="the disk is full"):
        run_here(lambda _: full())
    assert made.outputs() == OUTPUTS
    assert Path("data/toy/model/sub/b").stat().st_nlink > 1
    monkeypatch.undo()
    os.chdir(made.path)
    assert "up to date" in made("-m", "dvc", "status", "toy").stdout


def test_what_cannot_be_brought_back_is_said(made: Toy, run_here, monkeypatch, capsys) -> None:
    def lost(*_, **__) -> None:
        raise OSError(errno.EIO, "lost")

    monkeypatch.setattr("dvc.output.Output.checkout", lost)
    monkeypatch.setattr(execution, "_link_back", lost)
    with pytest.raises(InputError):
        run_here(raising(InputError("x")))
    said = capsys.readouterr().err
    assert "`dvc checkout data/toy` will bring the previous one back, now: " in said


def test_without_memory_even_to_look_the_way_back_is_said(made: Toy, run_here, monkeypatch, capsys) -> None:
    monkeypatch.setattr(execution, "Repo", lambda: numpy.empty(2**55))
    with pytest.raises(InputError, match="stage toy ran out of memory"):
        run_here(write)
    assert "toy: `dvc checkout` brings the previous outputs back from DVC's cache" in capsys.readouterr().err


def test_an_unknown_stage_is_a_sentence(toy: Toy, run_here) -> None:
    with pytest.raises(InputError, match="'nothing'"):
        execute("nothing")


def test_a_stage_that_is_off_passes_links_on(made: Toy, run_here) -> None:
    made.set(enabled=False)
    source = Path("other/text.txt")

    def skip(stage: Stage) -> None:
        stage.pass_on(Path("other"), stage.output("model"))
        stage.pass_on(source, stage.output("table.csv"))

    run_here(None, skip)
    assert os.path.samefile("data/toy/model/text.txt", source) and os.path.samefile("data/toy/table.csv", source)


def test_two_runs_of_one_stage_at_once(toy: Toy) -> None:
    toy.set(how="wait")
    first = subprocess.Popen([sys.executable, "run.py", "toy"], cwd=toy.path, env=clean_environment())
    try:
        started(toy.path)
        second = toy("run.py", "toy")
        assert second.returncode == 1
        held = rf"error: stage toy is already running in this folder: process {first.pid} \(.*run.py toy\), since "
        assert re.fullmatch(rf"{held}20\d\d-\d\d-\d\d \d\d:\d\d:\d\d; wait for it or end it\n", second.stdout)
        (toy.path / "go").touch()
        assert first.wait(60) == 0
    finally:
        first.kill()
        first.wait()
    assert toy.outputs() == OUTPUTS
