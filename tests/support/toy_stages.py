"""A DVC project of two toy stages, `source` and `toy`, and what reads them, for tests of how stages run."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import yaml
from dvc.repo import Repo

from tasks.runtime.stage import Stage
from tests.support.paths import ROOT
from tests.support.project import clean_environment

OUTPUTS = {"data/toy/model/a": "1", "data/toy/model/sub/b": "b", "data/toy/table.csv": "1"}

DVC = {
    "stages": {
        "source": {
            "cmd": f"{sys.executable} run.py source",
            "deps": ["raw.txt"],
            "params": ["source"],
            "outs": ["data/source"],
        },
        "toy": {
            "cmd": f"{sys.executable} run.py toy",
            "deps": ["data/source/text.txt", "other/text.txt"],
            "params": ["toy.enabled", "toy.how", "toy.value"],
            "outs": ["data/toy"],
        },
        "reader": {"cmd": "false", "deps": ["data/toy/model"]},
    },
    "plots": [{"data/toy/table.csv": {"x": "step"}}],
}
PARAMS = {"source": {"enabled": True}, "toy": {"enabled": True, "how": "good", "value": 1}, "hidden": {"x": 1}}

RUN = f"""
import sys
from types import SimpleNamespace
import yaml
sys.path.insert(0, {str(ROOT)!r})
import tasks
tasks.__path__.append("toy_tasks")
from tasks.algorithms.errors import InputError
from tasks.runtime import execution, stage
text = open("params.yaml").read()
sections = {{name: SimpleNamespace(**values) for name, values in yaml.safe_load(text).items()}}
stage.schema.load = lambda: SimpleNamespace(**sections)
execution.preflight.check_workspace = lambda *_: None
execution.preflight.model_here = lambda *_: None
try:
    execution.execute(sys.argv[1])
except InputError as error:
    sys.exit(f"error: {{error}}")
"""
SOURCE = """
def run(stage):
    stage.output("text.txt").write_text("text")
"""
TOY = """
import time
from pathlib import Path

def run(stage):
    p = stage.params.toy
    folder = stage.output("model")
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_text(str(p.value))
    (folder / "sub/b").write_text("b")
    if p.how == "raise":
        raise RuntimeError("boom")
    if p.how == "wait":
        Path("started").touch()
        while not Path("go").exists():
            time.sleep(0.05)
    stage.output("table.csv").write_text(str(p.value))
"""


class Toy:
    """The project's folder, which is the working folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def set(self, **values: object) -> None:
        raw = PARAMS | {"toy": PARAMS["toy"] | values}
        (self.path / "params.yaml").write_text(yaml.safe_dump(raw))

    def __call__(self, *command: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *command],
            cwd=self.path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=clean_environment(),
            timeout=120,
        )

    def repro(self) -> subprocess.CompletedProcess:
        return self("-m", "dvc", "repro", "toy")

    def outputs(self) -> dict[str, str]:
        files = (path for path in (self.path / "data/toy").rglob("*") if path.is_file())
        return {path.relative_to(self.path).as_posix(): path.read_text() for path in sorted(files)}

    def left(self) -> list[Path]:
        return [path for path in (self.path / "data/.scratch").iterdir() if path.suffix not in (".lock", ".guard")]


def create(path: Path) -> None:
    """Write the project, nothing run yet."""
    files = {
        "dvc.yaml": yaml.safe_dump(DVC),
        "run.py": RUN,
        "toy_tasks/source.py": SOURCE,
        "toy_tasks/toy.py": TOY,
        "raw.txt": "raw",
        "other/text.txt": "other",
    }
    for name, text in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text)
    repo = Repo.init(str(path), no_scm=True)
    with repo.config.edit("repo") as config:
        config["cache"]["type"] = ["hardlink", "copy"]
        config["core"]["analytics"] = False
    Toy(path).set()


def write(stage: Stage, value: str = "2") -> None:
    stage.output("model").mkdir()
    (stage.output("model") / "a").write_text(value)
    stage.output("table.csv").write_text(value)


def raising(error: Exception):
    def run(stage: Stage) -> None:
        write(stage)
        raise error

    return run


def started(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not (path / "started").exists():
        assert time.monotonic() < deadline, "the stage did not start"
        time.sleep(0.05)
