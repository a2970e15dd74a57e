"""Where a command is called: in the project's folder, in one below it, elsewhere; with an account or without one."""

from __future__ import annotations

import getpass
import json
import os
import pwd
import shutil
from pathlib import Path

import pytest
from dvc.repo import Repo

from tasks.cli import account
from tasks.cli.commands import COMMANDS
from tests.support import lineage_project
from tests.support.command import edgepress

FREE = ("fit", "size", "profile", "export", "update")
"""Commands that need no project."""
CALLS = {
    "canary": ["stop"],
    "compare": ["HEAD", "HEAD"],
    "lineage": ["show", "data"],
    "night": ["list"],
    "notify": ["--webhook", "http://127.0.0.1:9"],
    "registry": ["list"],
    "stage": ["fetch"],
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("recorded")
    lineage_project.create(root)
    return root


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in FREE])
def test_outside_of_a_project_a_command_says_so_and_leaves_nothing(tmp_path, monkeypatch, capsys, name) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, errors = edgepress(capsys, name, *CALLS.get(name, []))
    assert code == COMMANDS[name].refused and not out
    assert errors == f"error: {tmp_path} has no dvc.yaml; run from the project's folder\n"
    assert not list(tmp_path.iterdir())


def test_below_the_project_s_folder_paths_are_those_of_the_working_folder(recorded, monkeypatch, capsys) -> None:
    monkeypatch.chdir(recorded)
    out = Path("data/corpus")
    above = edgepress(capsys, "lineage", "show", str(out), "--json")
    assert above[0] == 0 and json.loads(above[1])["stages"]
    monkeypatch.chdir(recorded / "data")
    before = sorted(Path().rglob("*"))
    assert edgepress(capsys, "lineage", "show", out.name, "--json") == above
    monkeypatch.chdir(recorded / "data")
    assert edgepress(capsys, "lineage", "show", str(recorded / out), "--json")[0] == 0
    monkeypatch.chdir(recorded / "data")
    assert sorted(Path().rglob("*")) == before


def test_what_dvc_add_made_is_no_stage_of_attribution(recorded, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.chdir(shutil.copytree(recorded, tmp_path / "copy"))
    Path("model.bin").write_text("x")
    with Repo() as repo:
        repo.add("model.bin")
    assert edgepress(capsys, "attribution")[::2] == (0, "")


def test_a_user_without_an_entry_gets_a_home_and_a_name(monkeypatch) -> None:
    def none(*_):
        raise KeyError("uid not found")

    monkeypatch.setattr(pwd, "getpwuid", none)
    monkeypatch.setattr(os, "environ", {})
    account.complete()
    assert (Path.home(), getpass.getuser()) == (Path("/"), str(os.getuid()))


def test_an_account_stays_as_it_is(monkeypatch) -> None:
    before = dict(os.environ)
    account.complete()
    assert dict(os.environ) == before
