"""A toy DVC project as working folder, its stage `toy` run in this process; and a repository with lineage records."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from dvc.repo import Repo

from tasks.runtime import execution
from tasks.runtime import stage as stages
from tests.support import lineage_project, toy_stages
from tests.support.toy_stages import OUTPUTS, Toy


@pytest.fixture(scope="session")
def new_project(tmp_path_factory) -> Path:
    """The project, nothing run yet; to be copied."""
    path = tmp_path_factory.mktemp("new")
    toy_stages.create(path)
    return path


@pytest.fixture(scope="session")
def made_project(new_project: Path, tmp_path_factory) -> Path:
    """The project after `dvc repro`; to be copied."""
    path = shutil.copytree(new_project, tmp_path_factory.mktemp("made") / "project")
    done = Toy(path).repro()
    assert done.returncode == 0, done.stdout
    assert Toy(path).outputs() == OUTPUTS
    return path


@pytest.fixture
def toy(new_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """The project as working folder, nothing run yet."""
    path = shutil.copytree(new_project, tmp_path / "project")
    monkeypatch.chdir(path)
    return Toy(path)


@pytest.fixture
def made(made_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """The project as working folder, after `dvc repro`."""
    path = shutil.copytree(made_project, tmp_path / "project")
    monkeypatch.chdir(path)
    return Toy(path)


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch):
    """run_here(run, skip=None): execute stage toy in this process with these functions, after DVC's own removal."""

    def load() -> SimpleNamespace:
        raw = yaml.safe_load(Path("params.yaml").read_text())
        return SimpleNamespace(**{name: SimpleNamespace(**values) for name, values in raw.items()})

    monkeypatch.setattr(stages.schema, "load", load)
    monkeypatch.setattr(execution.preflight, "check_workspace", lambda *_: None)
    monkeypatch.setattr(execution.preflight, "model_here", lambda *_: None)
    monkeypatch.setattr(execution.parent, "end_with_it", lambda _: None)

    def go(run, skip=None) -> None:
        monkeypatch.setitem(sys.modules, "tasks.toy", SimpleNamespace(run=run, skip=skip))
        repo = Repo()
        with repo.lock:
            repo.stage.load_one(name="toy").remove_outs(ignore_remove=False, force=False)
        execution.execute("toy")

    return go


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with lineage records."""
    root = tmp_path_factory.mktemp("recorded")
    lineage_project.create(root)
    return root


@pytest.fixture
def repository(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as working folder."""
    root = tmp_path / "copy"
    shutil.copytree(recorded, root)
    monkeypatch.chdir(root)
    return root
