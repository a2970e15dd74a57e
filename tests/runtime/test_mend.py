"""What a kill in the middle of DVC's own writing, or a flipped bit, leaves behind: found, named, and put right."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

from tasks.algorithms.errors import InputError
from tasks.runtime import locks, mend
from tests.support.command import edgepress
from tests.support.project import clean_environment

STAGES = {
    "first": {
        "cmd": "mkdir -p d && echo first > d/a && echo b > d/b && cat value > t",
        "deps": ["value"],
        "outs": ["d", "t"],
    },
    "last": {"cmd": "cat d/a t > last", "deps": ["d", "t"], "outs": ["last"]},
}


def dvc(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        env=clean_environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert not check or done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "project"
    path.mkdir()
    (path / "value").write_text("1")
    (path / "dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        dvc("init", "--no-scm", "-q")
        dvc("config", "cache.type", "hardlink,copy")
        dvc("repro", "-q")
        mend.keep_lock()
    return path


@pytest.fixture
def made(made_once, tmp_path, monkeypatch):
    """The working folder: two stages that have run."""
    path = shutil.copytree(made_once, tmp_path / "project")
    monkeypatch.chdir(path)
    with Repo() as repo:
        repo.checkout(relink=True)
    return path


def results() -> dict[str, str]:
    return {name: Path(name).read_text() for name in ("d/a", "d/b", "t", "last")}


def test_nothing_is_done_where_all_is_right(made):
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file() and "lock" not in path.name}
    assert mend.mend() == [] and list(mend.mend_cache()) == []
    assert {path: path.read_bytes() for path in before} == before


def test_dvc_lock_cut_off_anywhere_is_whole_again(made):
    whole = Path("dvc.lock").read_bytes()
    unreadable = 0
    for length in range(0, len(whole) - 1, 7):
        Path("dvc.lock").write_bytes(whole[:length])
        unreadable += "could not be read" in " ".join(mend.mend())
        assert yaml.safe_load(Path("dvc.lock").read_bytes()) == yaml.safe_load(whole), length
    assert unreadable > 3
    Path("dvc.lock").unlink()
    mend.mend()
    assert "up to date" in dvc("status") and "Running" not in dvc("repro")


def test_what_a_stage_left_that_was_killed_while_it_kept_the_copy_is_removed(made):
    left = mend.KEPT.with_name(f".{mend.KEPT.name}.1.tmp")
    left.touch()
    mend.keep_lock()
    assert not left.exists() and mend.KEPT.exists()


def test_without_a_copy_the_way_back_is_said(made):
    mend.KEPT.unlink()
    Path("dvc.lock").write_text("schema: '2.0'\nstages:\n  fi")
    assert "validation failed" in dvc("repro", check=False)
    assert "git checkout -- dvc.lock" in " ".join(mend.mend())
    assert Path("dvc.lock.damaged").exists() and "Running" not in dvc("repro")  # from the run cache


def test_a_newer_entry_is_not_put_back_to_the_older(made):
    content = yaml.safe_load(Path("dvc.lock").read_text())
    content["stages"]["last"]["outs"][0]["md5"] = "0" * 32
    Path("dvc.lock").write_text(yaml.safe_dump(content))
    assert mend.mend() == []
    assert yaml.safe_load(Path("dvc.lock").read_text()) == content
    mend.keep_lock()
    assert mend._entries(mend.KEPT)["last"]["outs"][0]["md5"] == "0" * 32


def test_a_list_of_users_that_is_cut_off_stops_dvc_until_it_is_mended(made):
    locks.DVC_USERS.write_text("")
    Path("t").unlink()
    assert "corrupted" in dvc("repro", "-f", check=False)
    assert [sentence.partition(" could")[0] for sentence in mend.mend()] == [".dvc/tmp/rwlock"]
    dvc("repro", "-f")


def test_dead_users_are_taken_from_the_list(made):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    mine = {"pid": os.getpid(), "cmd": "__main__.py"}
    users = {"read": {"d": [mine, {"pid": child.pid, "cmd": "dvc repro"}]}, "write": {}}
    locks.DVC_USERS.write_text(json.dumps(users))
    assert len(mend.mend()) == 1
    assert json.loads(locks.DVC_USERS.read_text()) == {"read": {"d": [mine]}, "write": {}}
    assert mend.mend() == []


def test_where_dvc_is_at_work_nothing_is_touched(made):
    with locks.held(locks.DVC_LOCK, ""), pytest.raises(InputError, match="DVC is working in this folder: process"):
        mend.mend()


def flip(path: Path) -> None:
    """One bit, as a failing disk does it: size and times stay."""
    before = path.stat()
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    path.chmod(before.st_mode)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("name", ["t", "d/a", "last"])
def test_a_bit_that_flips_in_output_and_cache_is_found_and_the_stage_runs_again(made, name):
    good = results()
    flip(Path(name))
    assert Path(name).stat().st_nlink == 2 and "up to date" in dvc("status")  # DVC doesn't see it
    found = list(mend.mend_cache())
    assert len(found) == 2 and not Path(name).exists()
    dvc("repro")
    assert results() == good and list(mend.mend_cache()) == [] and "up to date" in dvc("status")


def test_a_damaged_copy_in_the_cache_alone_is_removed_and_a_missing_one_made_again(made):
    good = results()
    (damaged,) = Path(".dvc/cache/files/md5").glob("*/*.dir")
    flip(damaged)
    assert str(damaged) in " ".join(mend.mend_cache())
    shutil.rmtree(".dvc/cache/files")
    shutil.rmtree("d")
    dvc("repro")
    assert results() == good


def test_the_command(made, capsys):
    assert edgepress(capsys, "mend") == (0, "nothing to mend\n", "")
    Path("dvc.lock").write_text("")
    code, out, errors = edgepress(capsys, "mend", "--cache")
    assert (code, errors) == (0, "") and "`dvc repro` goes on from here" in out


def git(*arguments: str) -> None:
    who = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    subprocess.run(["git", *who, *arguments], check=True, capture_output=True)


def test_an_older_commit_s_dvc_lock_stays_as_git_wrote_it(made) -> None:
    """Its entries are fewer, and none is lost; those of a commit that went away don't come back later either."""
    whole = yaml.safe_load(Path("dvc.lock").read_text())
    git("init", "-q")
    first = {"schema": "2.0", "stages": {"first": whole["stages"]["first"]}}
    for lock in (first, whole):
        Path("dvc.lock").write_text(yaml.safe_dump(lock))
        git("add", "-f", "dvc.lock", "dvc.yaml")
        git("commit", "-qm", "a run")
    mend.keep_lock()
    Path("dvc.lock").write_text(yaml.safe_dump(first) + "  las")  # a kill, on the same commit
    assert "are back" in " ".join(mend.mend())
    assert yaml.safe_load(Path("dvc.lock").read_text())["stages"] == whole["stages"]
    git("checkout", "-f", "-q", "HEAD~1")
    assert mend.mend() == [] and yaml.safe_load(Path("dvc.lock").read_text()) == first
    mend.keep_lock()
    other = {"schema": "2.0", "stages": {"other": whole["stages"]["last"], **first["stages"]}}
    Path("dvc.lock").write_text(yaml.safe_dump(other))  # a stage has run on the older commit
    assert mend.mend() == [] and yaml.safe_load(Path("dvc.lock").read_text()) == other
    mend.keep_lock()
    git("checkout", "-q", "--", "dvc.lock")
    assert mend.mend() == [] and yaml.safe_load(Path("dvc.lock").read_text()) == first
    git("checkout", "-q", "-")


@pytest.mark.parametrize("name", ["dvc.lock", "dvc.yaml"])
def test_git_s_conflict_marks_are_told_and_nothing_is_moved(made, capsys, name: str) -> None:
    text = Path(name).read_text()
    Path(name).write_text(f"schema: '2.0'\n<<<<<<< HEAD\n{text}=======\n{text}>>>>>>> other\n")
    before = Path(name).read_bytes()
    code, out, errors = edgepress(capsys, "mend")
    assert (code, out) == (1, "") and f"error: {name} has git's conflict marks (line 2): " in errors
    assert ("`git checkout --ours dvc.lock` (or --theirs)" in errors) == (name == "dvc.lock")
    assert Path(name).read_bytes() == before and not Path(f"{name}.damaged").exists()


def a_run() -> Path:
    """The folder of the run cache for stage last."""
    runs = Path(".dvc/cache/runs").glob("??/*")
    (found,) = (path for path in runs if "cat d/a" in next(path.iterdir()).read_text())
    return found.resolve()


def aged(*paths: Path, seconds: float = 100) -> None:
    for path in paths:
        os.utime(path, (path.stat().st_mtime - seconds,) * 2)


@pytest.mark.parametrize("left", [[], [".x.tmp"], [".x.tmp", "whole"]])
def test_a_run_that_dvc_began_to_note_is_forgotten(made, left):
    run = a_run()
    (noted,) = run.iterdir()
    whole = noted.read_bytes()
    noted.unlink()
    for name in left:
        (run / name).write_bytes(whole if name == "whole" else whole[: whole.index(b"outs")])
    Path("dvc.lock").unlink()
    Path(mend.KEPT).unlink()
    if "whole" not in left:
        assert "ERROR" in dvc("repro", check=False)  # DVC's own mistake: once it is gone, so can this be
    assert [sentence.split(" of DVC's")[0] for sentence in mend.mend()] == [str(run)]
    assert (os.listdir(run) == ["whole"]) if "whole" in left else not run.exists()
    assert mend.mend() == []
    dvc("repro")
    assert results()["last"] == "first\n1"


def test_what_another_folder_s_dvc_writes_just_now_to_a_shared_cache_stays(made, tmp_path):
    for run in (tmp_path / "shared/runs/ab/empty", tmp_path / "shared/runs/ab/pulled"):
        run.mkdir(parents=True)
    unfinished = tmp_path / "shared/runs/ab/pulled/.x.tmp"
    unfinished.touch()
    dvc("cache", "dir", str(tmp_path / "shared"))
    aged(unfinished.parent)
    assert mend.mend() == [] and unfinished.exists()
    aged(unfinished, tmp_path / "shared/runs/ab/empty")
    assert len(mend.mend()) == 2 and not os.listdir(tmp_path / "shared/runs/ab")


def test_a_run_that_is_being_noted_here_stays(made, monkeypatch):
    """A night's worktree writes to this cache, too."""
    (begun := a_run().with_name("begun")).mkdir()
    monkeypatch.setattr(mend.time, "sleep", lambda _: (begun / "whole").touch())
    assert mend.mend() == [] and os.listdir(begun) == ["whole"]


def test_another_user_s_part_of_a_shared_run_cache_is_passed_over(made, monkeypatch):
    (theirs := a_run().with_name("theirs")).mkdir()
    aged(theirs)
    monkeypatch.setattr(Path, "rmdir", lambda _: os.rmdir("/proc"))
    assert mend.mend() == [] and theirs.exists()
