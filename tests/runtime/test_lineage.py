"""Lineage in a small repository of its own: who made what, and what is found when something was altered."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tasks.runtime import lineage
from tests.support.paths import ROOT

MAKE = '''
"""make.py NAME OUT TEXT: writes OUT, then the stage's record as tasks.runtime.execution does."""
import sys, time
from pathlib import Path
from types import SimpleNamespace
from dvc.repo import Repo
from tasks.runtime import lineage
started, (name, out, text) = time.time(), sys.argv[1:]
path = Path(out)
if path.suffix:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
else:
    path.mkdir(parents=True)
    for part in "ab":
        (path / f"{part}.txt").write_text(text + part)
seeded = SimpleNamespace(**{name: SimpleNamespace(seed=7)}) if name == "train" else SimpleNamespace()
stage = SimpleNamespace(address=name, name=name.partition("@")[0], params=seeded, dvc=Repo().stage.load_one(name=name))
lineage.record(stage, started=started, run_ids={"flow_run": "f-1"})
'''

DAG = """
stages:
  corpus:
    cmd: {python} make.py corpus data/corpus text
    deps: [source.txt, code.py]
    params: [corpus]
    outs: [data/corpus, data/lineage/corpus.json]
  train:
    frozen: {frozen}
    cmd: {python} make.py train data/train/model.txt weights
    deps: [data/corpus]
    params: [train.steps]
    outs: [data/train/model.txt, data/lineage/train.json]
  score:
    matrix:
      of: [train]
    cmd: {python} make.py score@${{item.of}} data/score/${{item.of}}.txt points
    deps: ["data/${{item.of}}/model.txt", data/corpus/a.txt]
    outs: ["data/score/${{item.of}}.txt", "data/lineage/score@${{item.of}}.json"]
  unused:
    cmd: {python} make.py unused data/unused.txt nothing
    deps: [source.txt]
    outs: [data/unused.txt]
"""


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "DVC_NO_ANALYTICS": "1", "GIT_CONFIG_GLOBAL": os.devnull}


def call(*arguments: str, cwd: Path) -> None:
    done = subprocess.run(arguments, cwd=cwd, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    (root / "make.py").write_text(MAKE)
    (root / "code.py").write_text("answer = 42\n")
    (root / "source.txt").write_text("once\n")
    (root / "params.yaml").write_text("corpus: {seed: 1, words: [a, b]}\ntrain: {steps: 3}\n")
    (root / "dvc.yaml").write_text(DAG.format(python=sys.executable, frozen="false"))
    call("git", "init", "-q", cwd=root)
    call(sys.executable, "-m", "dvc", "init", "-q", cwd=root)
    call("git", "add", "-A", cwd=root)
    call("git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "start", cwd=root)
    call(sys.executable, "-m", "dvc", "repro", "score@train", cwd=root)
    return root


@pytest.fixture
def repository(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "copy"
    shutil.copytree(made, root)
    monkeypatch.chdir(root)
    return root


def record(root: Path, address: str) -> dict:
    return json.loads((root / f"data/lineage/{address}.json").read_text())


def test_record_agrees_with_the_lock(made: Path) -> None:
    entry = record(made, "train")
    lock = yaml.safe_load((made / "dvc.lock").read_text())["stages"]["train"]
    assert entry["inputs"] == {item["path"]: item["md5"] for item in lock["deps"]}
    assert entry["inputs"]["data/corpus"].endswith(".dir")
    locked = {item["path"]: item["md5"] for item in lock["outs"]}
    assert entry["outputs"] == {"data/train/model.txt": locked["data/train/model.txt"]}
    assert entry["parameters"] == {"train.steps": 3}


def test_record_says_who_when_and_with_what(made: Path) -> None:
    entry = record(made, "train")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=made, capture_output=True, text=True, check=True)
    assert entry["git"] == {"revision": head.stdout.strip(), "dirty": False}  # dvc.lock alone is no change
    assert entry["seed"] == 7 and record(made, "corpus")["seed"] is None
    assert entry["run_ids"] == {"flow_run": "f-1"}
    assert entry["started"].endswith("+00:00") and entry["seconds"] >= 0
    assert entry["peak_memory_bytes"] > 2**20
    assert entry["packages"].keys() == set(lineage.PACKAGES) and entry["packages"]["dvc"]
    assert entry["machine"].keys() == {"platform", "cpus", "threads", "python"}


def test_code_hash_changes_with_the_code_alone() -> None:
    files = {"code.py": "1", "data.txt": "2"}
    assert lineage._code_hash(files) == lineage._code_hash(files | {"data.txt": "3"})
    assert lineage._code_hash(files) != lineage._code_hash(files | {"code.py": "3"})


def test_a_stage_without_a_record_gets_none(repository: Path) -> None:
    call(sys.executable, "-m", "dvc", "repro", "-q", "unused", cwd=repository)
    assert not (repository / "data/lineage/unused.json").exists()


def test_dirty_and_no_git(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repository / "code.py").write_text("answer = 43\n")
    assert lineage._git_state()["dirty"] is True
    monkeypatch.setenv("PATH", "")
    assert lineage._git_state() == {"revision": None, "dirty": None}


@pytest.mark.parametrize("path", ["data/score/train.txt", "data/score", "data/lineage/score@train.json"])
def test_show_reaches_the_first_inputs(repository: Path, capsys: pytest.CaptureFixture[str], path: str) -> None:
    assert lineage.main(["show", path]) == 0
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    assert lines[0] == path
    assert [word for word in ("score@train", "train  ", "corpus  ", "source source.txt") if word not in text] == []
    assert text.count("corpus  ") == 1 and "corpus (above)" in text  # score reads it too
    assert "parameters steps=3" in text and record(repository, "train")["started"] in text


def test_show_of_a_file_in_an_output_folder(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lineage.main(["show", "data/corpus/b.txt"]) == 0
    text = capsys.readouterr().out
    assert "corpus" in text and "train" not in text


def test_verify_ok(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lineage.main(["verify", "data/score/train.txt"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("hashed, ok\n") and len(out.splitlines()) == 1


def rewrite_keeping_size_and_time(path: Path) -> None:
    """As a disk or a careless tool would: DVC's own state, which goes by size and time, doesn't see it."""
    before = path.stat()
    path.chmod(0o644)
    path.write_bytes(b"X" + path.read_bytes()[1:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


ALTERATIONS = {
    "output": (
        lambda: rewrite_keeping_size_and_time(Path("data/train/model.txt")),
        "train: output data/train/model.txt was altered",
    ),
    "in a folder": (
        lambda: rewrite_keeping_size_and_time(Path("data/corpus/a.txt")),
        "corpus: output data/corpus was altered",
    ),
    "missing": (lambda: Path("data/train/model.txt").unlink(), "train: output data/train/model.txt is missing"),
    "source": (lambda: Path("source.txt").write_text("twice\n"), "corpus: input source.txt was altered"),
    "code": (lambda: Path("code.py").write_text("answer = 41\n"), "corpus: input code.py was altered"),
    "parameter": (
        lambda: Path("params.yaml").write_text("corpus: {seed: 1, words: [a, b]}\ntrain: {steps: 4}\n"),
        "train: parameter train.steps is 4 now, it was made with 3",
    ),
    "record": (
        lambda: Path("data/lineage/train.json").unlink(),
        "train: lineage record data/lineage/train.json is missing",
    ),
}


@pytest.mark.parametrize("kind", ALTERATIONS)
def test_verify_names_what_was_altered(repository: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    alter, sentence = ALTERATIONS[kind]
    alter()
    assert lineage.main(["verify", "data/score/train.txt"]) == 1
    out = capsys.readouterr().out
    assert sentence in out
    assert "ok" not in out.splitlines()[-1].split()


def test_verify_finds_a_lock_that_no_stage_made(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("data/train/model.txt")
    path.chmod(0o644)
    path.write_text("other weights")
    call(sys.executable, "-m", "dvc", "commit", "-f", "-q", "train", cwd=repository)
    assert lineage.main(["verify", "data/train/model.txt"]) == 1
    assert "train: output data/train/model.txt is" in capsys.readouterr().out


def test_verify_before_the_first_run(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lineage.main(["verify", "data/unused.txt"]) == 1
    assert "unused: never run here" in capsys.readouterr().out


def test_a_frozen_stage_may_lag_behind_its_inputs(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("dvc.yaml").write_text(DAG.format(python=sys.executable, frozen="true"))
    Path("params.yaml").write_text("corpus: {seed: 1, words: [a, b]}\ntrain: {steps: 4}\n")
    assert lineage.main(["verify", "data/train/model.txt"]) == 0
    assert "train: note: parameter train.steps" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["show", "verify"])
@pytest.mark.parametrize("path", ["data/nothing", "code.py", "../elsewhere"])
def test_a_path_that_no_stage_makes(
    repository: Path, capsys: pytest.CaptureFixture[str], command: str, path: str
) -> None:
    assert lineage.main([command, path]) == 2
    said = capsys.readouterr()
    assert (
        said.out == ""
        and said.err == f"no stage of dvc.yaml makes {path}; name a file or folder of data/ that one does\n"
    )


def test_outside_a_repository_and_broken_dag(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("dvc.yaml").write_text("stages: [")
    assert lineage.main(["show", "data/corpus"]) == 2
    monkeypatch.chdir(tmp_path)
    assert lineage.main(["show", "data/corpus"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(line.startswith("cannot read the lineage: ") for line in said)
