"""`edgepress verify`: what is on disk against a commit, in a small repository and its clones."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.support import lineage_project
from tests.support.command import edgepress
from tests.support.lineage_project import call, commit, repro, status

PARAMETERS = "corpus: {{seed: 1, words: [a, b]}}\ntrain: {{steps: {}}}\n"


@pytest.fixture
def committed(repository: Path) -> Path:
    """The repository with dvc.lock and records in git."""
    commit(repository)
    return repository


def rewrite(path: str, text: str) -> None:
    """Other bytes, not in DVC's cache."""
    Path(path).unlink()
    Path(path).write_text(text)


def states(out: str) -> dict[str, str]:
    """Stage -> the rest of its line."""
    table = out.partition("\n-")[2].splitlines()[:-1]
    return {
        line.split()[0]: " ".join(line.split()[1:])
        for line in table
        if re.match(r"\S+ +(same|differs|not |never )", line)
    }


def test_a_run_here_is_the_same_as_its_commit(committed: Path, capsys) -> None:
    code, out, errors = edgepress(capsys, "verify")
    assert (code, errors) == (0, "")
    found = states(out)
    assert found["unused"] == "never run -"  # on no machine
    assert all(re.match(r"same computed here, 20\d\d-", found[name]) for name in ("corpus", "train", "speed", "report"))
    repro(committed, "unused")
    code, out, _ = edgepress(capsys, "verify")
    assert code == 1 and "unused: the commit's dvc.lock has no entry for it" in out
    commit(committed)
    code, out, _ = edgepress(capsys, "verify")
    assert code == 0
    assert re.match(
        r"the same as HEAD \([0-9a-f]{10}\): 7 files and folders hashed, 7 of 7 stages", out.splitlines()[-1]
    )


def test_what_differs_is_named_with_by_how_much(committed: Path, capsys) -> None:
    rewrite("data/train/model.txt", "other")
    rewrite("data/corpus/a.txt", "one\nmore\n")
    Path("data/corpus/new.txt").touch()
    Path("data/speed.txt").unlink()
    Path("tasks/parts/answer.py").write_text("answer = 43\n")
    Path("params.yaml").write_text(PARAMETERS.format(5))
    code, out, _ = edgepress(capsys, "verify")
    assert code == 1
    for line in (
        "train: output data/train/model.txt: 1 of 1 lines",
        "train: parameter train.steps is 5, committed 3",
        "corpus: output data/corpus/a.txt: 3 of 3 lines",
        "corpus: output data/corpus/new.txt is not in the commit",
        "corpus: code tasks/parts/answer.py differs",
        "speed: output data/speed.txt is not there",
    ):
        assert line in out.splitlines()
    found = states(out)
    assert (found["train"], found["speed"]) == ("differs from a cache", "not run -")
    assert found["report"].startswith("same computed here")
    last = out.splitlines()[-1]
    assert last.startswith("differs from HEAD (") and "in 4 stages (code, corpus, train, speed)" in last
    assert not Path("ran.txt").exists() or "train" not in Path("ran.txt").read_text().split()[5:]  # it runs nothing


def test_a_run_of_other_parameters_differs_from_an_older_commit_and_not_from_its_own(committed: Path, capsys) -> None:
    Path("params.yaml").write_text(PARAMETERS.format(4))
    repro(committed)
    repro(committed, "unused")
    commit(committed)
    assert edgepress(capsys, "verify")[0] == 0
    code, out, _ = edgepress(capsys, "verify", "HEAD~1", "--json")
    found = json.loads(out)
    assert code == 1 and found["same"] is False and len(found["revision"]) == 40
    rows = {row["stage"]: row for row in found["stages"]}
    assert rows["corpus"]["state"] == "same" and rows["train"]["why"] == [
        *("output data/train/model.txt: 1 of 1 lines", "parameter train.steps is 4, committed 3"),
    ]
    assert rows["report"]["why"][-1] == "source data/lineage/speed.json differs"


def test_a_clone_that_pulls_is_the_same_from_a_cache(committed: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    call(sys.executable, "-m", "dvc", "remote", "add", "-d", "store", str(tmp_path / "store"), cwd=committed)
    repro(committed, "unused")
    commit(committed)
    call(sys.executable, "-m", "dvc", "push", "-q", cwd=committed)
    root = lineage_project.clone(committed, tmp_path / "clone")
    call(sys.executable, "-m", "dvc", "pull", "-q", cwd=root)
    monkeypatch.chdir(root)
    code, out, _ = edgepress(capsys, "verify")
    assert code == 0 and set(states(out).values()) == {"same from a cache"}
    assert out.splitlines()[-1].endswith("0 of 7 stages computed here")
    code, out, _ = edgepress(capsys, "lineage", "verify", "data/report.txt")
    assert code == 0 and len(out.splitlines()) == 1  # by the records that git brought
    assert repro(root) == [] and status(root) == ""


def test_bytes_that_no_cache_has_are_told_by_their_hashes(committed: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    root = lineage_project.clone(committed, tmp_path / "clone")
    monkeypatch.chdir(root)
    Path("data/score").mkdir(parents=True)
    Path("data/score/train.txt").write_text("other")
    Path("data/corpus").mkdir()
    _, out, _ = edgepress(capsys, "verify")
    assert re.search(
        r"score@train: output data/score/train.txt: 795f3202b1 on disk, \w{10} committed, whose bytes no", out
    )
    assert re.search(r"corpus: output data/corpus: \w{10}.dir on disk, \w{10}.dir committed, whose files no cache", out)


def test_what_can_not_be_compared_is_a_sentence(repository: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    code, out, errors = edgepress(capsys, "verify", "nothing")
    assert (code, out) == (2, "") and errors.startswith("error: nothing names no commit; name a commit, a tag")
    code, out, errors = edgepress(capsys, "verify")
    assert (code, out) == (2, "") and "has no dvc.lock, so nothing was computed there" in errors
    monkeypatch.chdir(tmp_path)
    code, out, errors = edgepress(capsys, "verify")
    assert (code, out) == (2, "") and errors.startswith("error: ") and errors.count("\n") == 1
