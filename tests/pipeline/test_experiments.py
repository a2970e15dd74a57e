"""DVC's experiments run in a copy of the project, by its own code and interpreter, and leave the workspace alone."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import yaml

from tests.support.project import Project


def test_an_experiment_in_a_copy(tmp_path: Path, tiny_llama) -> None:
    project = Project(tmp_path / "project", tiny_llama(tmp_path / "model"))
    before = project("git", "status", "--porcelain").stdout
    said = project(sys.executable, "-m", "dvc", "exp", "run", "--temp", "-S", "wanda.keep=1", "code").stdout
    assert "Ran experiment" in said, said
    ((found, name),) = re.findall(r"^([0-9a-f]{40}) refs/exps/(?!exec).*/(.+)$", shown(project), re.MULTILINE)
    assert name in said
    parameters = yaml.safe_load(project("git", "show", f"{found}:params.yaml").stdout)
    lock = yaml.safe_load(project("git", "show", f"{found}:dvc.lock").stdout)
    assert parameters["wanda"]["keep"] == 1 and list(lock["stages"]) == ["code"]
    assert project("git", "status", "--porcelain").stdout == before and not (project.path / "dvc.lock").exists()


def shown(project: Project) -> str:
    return project("git", "for-each-ref", "--format=%(objectname) %(refname)", "refs/exps").stdout
