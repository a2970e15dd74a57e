"""Edits while a stage runs, and just after it: noticed, named, and never noted as what made the outputs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tasks.algorithms.errors import InputError
from tasks.runtime import edits, journal
from tasks.runtime.stage import Stage
from tests.support.paths import ROOT
from tests.support.project import clean_environment
from tests.support.toy_stages import OUTPUTS, Toy, started, write


def taken_back(path: Path) -> None:
    """Other bytes, and then the first ones again: what was read meanwhile nobody knows."""
    whole = path.read_bytes()
    for text in (b"else", whole):
        path.unlink()
        path.write_bytes(text)


MEND = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tasks.runtime import mend
print(*mend.mend(), sep="", end="")
"""
EDITS = {
    "parameter": (lambda toy: toy.set(value=3, how="wait"), "toy.value was 2 and is now 3"),
    "grown": (lambda _: Path("other/text.txt").write_text("other\nrow"), "other/text.txt was written"),
    "taken back": (lambda _: taken_back(Path("other/text.txt")), "other/text.txt was written"),
    "gone": (lambda _: Path("other/text.txt").unlink(), "other/text.txt was written"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_while_a_stage_runs(made: Toy, run_here, edit: str) -> None:
    change, sentence = EDITS[edit]
    made.set(value=2)

    def run(stage: Stage) -> None:
        write(stage)
        change(made)

    with pytest.raises(InputError, match=sentence):
        run_here(run)
    assert made.outputs() == OUTPUTS and made.left() == []


def test_of_a_section_that_is_declared_as_a_whole_the_value_that_changed_is_named(made: Toy, run_here) -> None:
    raw = yaml.safe_load(Path("dvc.yaml").read_text())
    raw["stages"]["toy"]["params"] = ["toy"]
    Path("dvc.yaml").write_text(yaml.safe_dump(raw))

    def run(stage: Stage) -> None:
        write(stage)
        made.set(value=7)

    with pytest.raises(InputError, match=r"^toy\.value was 1 and is now 7, edited while the stage ran"):
        run_here(run)


def test_under_dvc_nothing_is_noted_of_it(made: Toy) -> None:
    """The row that was appended, the value that was set: each counts from the next run on, and for that one alone."""
    lock = Path("dvc.lock").read_bytes()
    made.set(how="wait", value=2)
    running = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "toy"], stdout=subprocess.PIPE, text=True, env=clean_environment()
    )
    started(made.path)
    made.set(how="wait", value=3)
    Path("go").touch()
    assert running.wait(60) != 0
    assert Path("dvc.lock").read_bytes() == lock and made.outputs() == OUTPUTS
    ran = made.repro()
    assert "Running stage 'toy'" in ran.stdout and made.outputs()["data/toy/table.csv"] == "3"


def misnoted(toy: Toy) -> None:
    """Let value be 2 while toy runs, and 3 between its end and DVC's look."""
    edit = f"{sys.executable} -c \"p = 'params.yaml'; t = open(p).read(); open(p, 'w').write(t.replace(': 2', ': 3'))\""
    raw = yaml.safe_load(Path("dvc.yaml").read_text())
    raw["stages"]["toy"]["cmd"] += f" && {edit}"
    raw["stages"]["last"] = {
        "cmd": f"{sys.executable} run.py last",
        "deps": ["data/toy/table.csv"],
        "outs": ["data/last"],
    }
    Path("dvc.yaml").write_text(yaml.safe_dump(raw))
    Path("toy_tasks/last.py").write_text(Path("toy_tasks/source.py").read_text())
    toy.set(value=2)


def test_an_edit_just_after_a_stage(toy: Toy) -> None:
    misnoted(toy)
    refused = toy("-m", "dvc", "repro", "last")
    sentence = (
        "error: data/toy/table.csv can't be used: toy.value was 2 and is noted as 3, edited just when stage toy had"
    )
    assert refused.returncode != 0 and sentence in refused.stdout
    assert "Traceback" not in refused.stdout
    mended = toy("-c", MEND)
    assert "toy was noted by DVC with an edit that came after it (toy.value was 2 and is noted as 3)" in mended.stdout
    assert toy("-c", MEND).stdout == ""
    again = toy("-m", "dvc", "repro", "last")
    assert again.returncode == 0 and "is cached" not in again.stdout
    assert toy.outputs()["data/toy/table.csv"] == "3"
    assert toy("-c", MEND).stdout == ""


def test_what_a_kill_left_of_a_claim_goes_with_the_next_one(made: Toy, run_here) -> None:
    left = edits.CLAIMS / ".toy.json.1.tmp"
    left.parent.mkdir(parents=True, exist_ok=True)
    left.write_text("{")
    run_here(write)
    assert [path.name for path in edits.CLAIMS.iterdir()] == ["toy.json"]


def test_a_journal_is_of_what_the_stage_began_with(made: Toy, run_here) -> None:
    """Opened after an edit of a parameter it has the first value's name; after one of an input nothing is added."""
    folders = []

    def run(stage: Stage) -> None:
        write(stage)
        made.set(value=len(folders))
        stage.journal.interval = stage.journal.next = 0.0
        stage.journal.save("a", {"x": torch.zeros(1)})
        Path("other/text.txt").write_text("more")
        stage.journal.save("b", {"x": torch.zeros(1)})
        folders.append(stage.journal.folder.name)

    made.set(value=5)
    with pytest.raises(InputError, match="other/text.txt was written and toy.value was 5 and is now 0"):
        run_here(run)
    (kept,) = Path("data/.scratch/journal/toy").iterdir()
    assert [kept.name] == folders and [path.name.split(".")[0] for path in kept.iterdir()] == ["a"]
    Path("other/text.txt").write_text("other")
    with pytest.raises(InputError):
        run_here(run)
    assert folders[1] != folders[0]  # the value 0 was another one's


def test_what_is_not_pure_is_not_written(tmp_path: Path) -> None:
    saved = journal.Journal(tmp_path / "j", 0, pure=lambda: False)
    saved.save("a", {"x": torch.zeros(1)})
    assert os.listdir(tmp_path) == []
