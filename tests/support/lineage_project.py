"""A git and DVC repository whose stages leave lineage records, for tests of what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.paths import ROOT

START = f"""
import sys
sys.path.append({str(ROOT)!r})
from tasks.runtime import warm
if (code := warm.run("make")) is not None:
    sys.exit(code)
"""
"""Of make.py: with the test session's warm process, which has DVC in memory, the rest runs in that one's child."""
MAKE = '''
"""make.py NAME OUT TEXT: writes OUT, then the stage's record as tasks.runtime.execution does; says so in ran.txt."""
import json, sys, time
from pathlib import Path
from types import SimpleNamespace
from dvc.repo import Repo
from tasks.runtime import code, edits, files, lineage
started, (name, out, text) = time.time(), sys.argv[1:]
path, dvc, facts = Path(out), Repo().stage.load_one(name=name), {}
with open("ran.txt", "a") as ran:
    ran.write(name + " ")
lineage.keep_inputs(dvc)
if name == "speed":
    facts = {"measured": started}
if name == "report":
    text += repr(json.loads(Path("data/lineage/speed.json").read_text())["measured"])
if name in ("train", "speed"):
    text += Path("params.yaml").read_text().rpartition("steps: ")[2][0]
if path.suffix:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
elif name == "code":
    path.mkdir(parents=True)
    for module in ("corpus", "train"):
        files.write_json(path / f"{module}.json", code.listing(module, Path()))
else:
    path.mkdir(parents=True)
    for part in "ab":
        (path / f"{part}.txt").write_text(text + part)
seeded = SimpleNamespace(**{name: SimpleNamespace(seed=7)}) if name == "train" else SimpleNamespace()
names = {"address": name, "name": name.partition("@")[0]}
stage = SimpleNamespace(**names, params=seeded, dvc=dvc, facts=facts, start=edits.Start(dvc))
lineage.record(stage, started=started, run_ids={"flow_run": "f-1"})
'''

DAG = """
stages:
  code:
    cmd: {python} make.py code data/code ""
    deps: [tasks]
    outs: [data/code]
  corpus:
    cmd: {python} make.py corpus data/corpus text
    deps: [source.txt, data/code/corpus.json]
    params: [corpus]
    outs: [data/corpus]
  train:
    frozen: {frozen}
    cmd: {python} make.py train data/train/model.txt weights
    deps: [data/corpus, data/code/train.json]
    params: [train.steps]
    outs: [data/train]
  score:
    matrix:
      of: [train]
    cmd: {python} make.py score@${{item.of}} data/score/${{item.of}}.txt points
    deps: ["data/${{item.of}}/model.txt", data/corpus/a.txt]
    outs: ["data/score/${{item.of}}.txt"]
  speed:
    cmd: {python} make.py speed data/speed.txt models
    deps: [data/train/model.txt]
    outs: [data/speed.txt]
  report:
    cmd: {python} make.py report data/report.txt page
    deps: [data/speed.txt, data/lineage/speed.json]
    outs: [data/report.txt]
  unused:
    cmd: {python} make.py unused data/unused.txt nothing
    deps: [source.txt]
    outs: [data/unused.txt]
"""


def environment() -> dict[str, str]:
    return os.environ | {"DVC_NO_ANALYTICS": "1", "GIT_CONFIG_GLOBAL": os.devnull}


def call(*arguments: str, cwd: Path) -> None:
    done = subprocess.run(arguments, cwd=cwd, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def create(root: Path) -> None:
    """Write, commit and reproduce it, all but the stage `unused`.

    Stage `speed` notes a time in its record, which `report` writes down: as `measure` and `report` of the project.
    """
    (root / ".gitignore").write_text("/data/*\n!/data/lineage/\n/data/lineage/here\n/ran.txt\n__pycache__\n")
    (root / "make.py").write_text(START + MAKE)
    (root / "tasks/parts").mkdir(parents=True)
    (root / "tasks/corpus.py").write_text("from tasks.parts import answer\n")
    (root / "tasks/train.py").write_text("answer = 43\n")
    (root / "tasks/parts/answer.py").write_text("answer = 42\n")
    (root / "source.txt").write_text("once\n")
    (root / "params.yaml").write_text("corpus: {seed: 1, words: [a, b]}\ntrain: {steps: 3}\n")
    (root / "dvc.yaml").write_text(DAG.format(python=sys.executable, frozen="false"))
    call("git", "init", "-q", cwd=root)
    call(sys.executable, "-m", "dvc", "init", "-q", cwd=root)
    commit(root)
    repro(root)


def commit(root: Path) -> None:
    """Commit all that git doesn't ignore."""
    call("git", "add", "-A", cwd=root)
    call("git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "all", cwd=root)


def repro(root: Path, *arguments: str) -> list[str]:
    """`dvc repro` of all but `unused`; returns the stages that ran."""
    (root / "ran.txt").unlink(missing_ok=True)
    call(sys.executable, "-m", "dvc", "repro", *(arguments or ("score@train", "report")), cwd=root)
    return (root / "ran.txt").read_text().split() if (root / "ran.txt").exists() else []


def clone(root: Path, target: Path) -> Path:
    """A clone with a cache of its own, which is empty."""
    call("git", "clone", "-q", str(root), str(target), cwd=root)
    return target


def status(root: Path) -> str:
    """What git says of the files."""
    done = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout


def record(root: Path, address: str) -> dict:
    return json.loads((root / f"data/lineage/{address}.json").read_text())
