"""The way back from an artifact in a small repository: what is shown, and what is found when something was altered."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.command import edgepress
from tests.support.lineage_project import DAG, call, record


@pytest.mark.parametrize("path", ["data/score/train.txt", "data/score"])
def test_show_reaches_the_first_inputs(repository: Path, capsys: pytest.CaptureFixture[str], path: str) -> None:
    code, out, _ = edgepress(capsys, "lineage", "show", path)
    assert code == 0
    lines = out.splitlines()
    text = "\n".join(lines)
    assert lines[0] == path
    assert [word for word in ("score@train", "train  ", "corpus  ", "source source.txt") if word not in text] == []
    assert text.count("corpus  ") == 1 and "corpus (above)" in text  # score reads it too
    assert "parameters steps=3" in text and record(repository, "train")["started"] in text


def test_show_of_a_file_in_an_output_folder(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = edgepress(capsys, "lineage", "show", "data/corpus/b.txt")
    assert code == 0
    assert "corpus" in text and "train" not in text


def test_verify_ok(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = edgepress(capsys, "lineage", "verify", "data/score/train.txt")
    assert code == 0
    assert out.endswith("hashed, ok\n") and len(out.splitlines()) == 1


def rewrite_keeping_size_and_time(path: Path) -> None:
    """As a disk or a careless tool would: DVC's own state, which goes by size and time, doesn't see it."""
    before = path.stat()
    path.chmod(0o644)
    path.write_bytes(b"X" + path.read_bytes()[1:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def forget(name: str) -> None:
    """Remove every record of a stage."""
    Path(f"data/lineage/{name}.json").unlink()
    shutil.rmtree(f"data/lineage/here/{name}")


ALTERATIONS = {
    "output": (
        lambda: rewrite_keeping_size_and_time(Path("data/train/model.txt")),
        "train: output data/train/model.txt was altered",
    ),
    "in a folder": (
        lambda: rewrite_keeping_size_and_time(Path("data/corpus/a.txt")),
        "corpus: output data/corpus/a.txt was altered",
    ),
    "missing": (lambda: Path("data/train/model.txt").unlink(), "train: output data/train/model.txt is missing"),
    "source": (lambda: Path("source.txt").write_text("twice\n"), "corpus: input source.txt was altered"),
    "code": (
        lambda: Path("tasks/parts/answer.py").write_text("answer = 41\n"),
        "corpus: code tasks/parts/answer.py is not what it was made with",
    ),
    "list of the code": (
        lambda: rewrite_keeping_size_and_time(Path("data/code/train.json")),
        "train: input data/code/train.json was altered",
    ),
    "parameter": (
        lambda: Path("params.yaml").write_text("corpus: {seed: 1, words: [a, b]}\ntrain: {steps: 4}\n"),
        "train: parameter train.steps is 4 now, it was made with 3",
    ),
    "record": (
        lambda: forget("train"),
        "train: lineage record data/lineage/train.json is missing",
    ),
}


@pytest.mark.parametrize("kind", ALTERATIONS)
def test_verify_names_what_was_altered(repository: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    alter, sentence = ALTERATIONS[kind]
    alter()
    code, out, _ = edgepress(capsys, "lineage", "verify", "data/score/train.txt")
    assert code == 1
    assert sentence in out
    assert "ok" not in out.splitlines()[-1].split()


def test_the_record_of_a_run_here_does_where_the_tracked_one_is_of_another_result(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = record(repository, "train") | {"outputs": {"data/train": "0" * 32 + ".dir"}}
    Path("data/lineage/train.json").write_text(json.dumps(other))
    code, out, _ = edgepress(capsys, "lineage", "verify", "data/score/train.txt")
    assert code == 0 and "train: note: data/lineage/train.json is of another result" in out
    forget("train")
    Path("data/lineage/train.json").write_text(json.dumps(other))
    code, out, _ = edgepress(capsys, "lineage", "verify", "data/score/train.txt")
    assert code == 1 and "train: output data/train is 0000000000.dir in the lineage record" in out
    assert "train  (made elsewhere" in edgepress(capsys, "lineage", "show", "data/score/train.txt")[1]


def test_show_tells_the_first_run_and_this_machine_s(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("data/lineage/train.json")
    first = record(repository, "train")
    first |= {"started": "2026-01-02T03:04:05+00:00", "machine": {"platform": "Elsewhere-1", "cpus": 64}}
    path.write_text(json.dumps(first))
    _, out, _ = edgepress(capsys, "lineage", "show", "data/train/model.txt")
    (here,) = Path("data/lineage/here/train").iterdir()
    assert "train  2026-01-02T03:04:05+00:00" in out and "made on Elsewhere-1, 64 cores" in out
    assert f"and again here {json.loads(here.read_text())['started']}" in out


def test_verify_finds_a_lock_that_no_stage_made(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("data/train/model.txt")
    path.chmod(0o644)
    path.write_text("other weights")
    call(sys.executable, "-m", "dvc", "commit", "-f", "-q", "train", cwd=repository)
    code, out, _ = edgepress(capsys, "lineage", "verify", "data/train/model.txt")
    assert code == 1 and "train: output data/train is" in out


def test_verify_before_the_first_run(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = edgepress(capsys, "lineage", "verify", "data/unused.txt")
    assert code == 1 and "unused: never run here" in out


def test_a_frozen_stage_may_lag_behind_its_inputs(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("dvc.yaml").write_text(DAG.format(python=sys.executable, frozen="true"))
    Path("params.yaml").write_text("corpus: {seed: 1, words: [a, b]}\ntrain: {steps: 4}\n")
    code, out, _ = edgepress(capsys, "lineage", "verify", "data/train/model.txt")
    assert code == 0 and "train: note: parameter train.steps" in out


def test_the_code_of_a_frozen_stage_may_have_moved_since(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("dvc.yaml").write_text(DAG.format(python=sys.executable, frozen="true"))
    Path("tasks/train.py").write_text("answer = 44\n")
    code, out, _ = edgepress(capsys, "lineage", "verify", "data/train/model.txt")
    assert code == 0 and "train: note: code tasks/train.py is not what it was made with" in out
    call(sys.executable, "-m", "dvc", "repro", "-q", "code", cwd=repository)
    call(sys.executable, "-m", "dvc", "commit", "-f", "-q", "train", cwd=repository)  # the code that is there now
    code, out, _ = edgepress(capsys, "lineage", "verify", "data/train/model.txt")
    assert code == 0 and "train: note: input data/code/train.json is" in out
    rewrite_keeping_size_and_time(Path("data/train/model.txt"))
    assert edgepress(capsys, "lineage", "verify", "data/train/model.txt")[0] == 1


@pytest.mark.parametrize("command", ["show", "verify"])
@pytest.mark.parametrize("path", ["data/nothing", "make.py", "../elsewhere"])
def test_a_path_that_no_stage_makes(
    repository: Path, capsys: pytest.CaptureFixture[str], command: str, path: str
) -> None:
    code, out, errors = edgepress(capsys, "lineage", command, path)
    assert (code, out) == (2, "")
    assert errors == f"error: no stage of dvc.yaml makes {path}; name a file or folder of data/ that one does\n"


def test_outside_a_repository_and_broken_dag(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("dvc.yaml").write_text("stages: [")
    code, _, errors = edgepress(capsys, "lineage", "show", "data/corpus")
    assert code == 2 and errors.startswith("error: cannot read the lineage: ") and len(errors.splitlines()) == 1
    monkeypatch.chdir(tmp_path)
    code, _, errors = edgepress(capsys, "lineage", "show", "data/corpus")
    assert code == 2 and errors == f"error: {tmp_path} has no dvc.yaml; run from the project's folder\n"
