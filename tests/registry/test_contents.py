"""Packages at commits: which are refused, the commit of a folder's present state, names of files."""

from __future__ import annotations

import contextlib
import json

import pytest
from dvc.repo import Repo

from tasks import package
from tasks.algorithms.errors import InputError
from tasks.registry import contents, versions
from tests.support.registry_project import Night


def test_a_folder_s_present_state_becomes_a_commit_beside_the_branch(night: Night) -> None:
    head = night.commit("a")
    assert contents.snapshot(night.root) == head
    night.make("b", 39.0, keep=1)
    before = night.state()
    revision = contents.snapshot(night.root)
    assert night.state() == before and night.git("rev-parse", f"{revision}^") == head
    assert versions.promote(night.root, revision).name == "v0.0.1" and night.content() == "b"
    path = night.root / "data/package/model/model.bin"
    path.unlink()
    path.write_text("altered")
    with pytest.raises(InputError, match="is not the one that dvc.lock names"):
        contents.snapshot(night.root)


@pytest.mark.parametrize("content", ["[]", '{"files": []}', '{"files": {"model.bin": 5}}', "nope"])
def test_a_manifest_that_is_none_is_refused(night: Night, content: str) -> None:
    night.make("a", 40.0)
    path = night.root / "data/package/model/manifest.json"
    path.unlink()
    path.write_text(content)
    with contextlib.chdir(night.root), Repo() as repo:
        repo.commit(force=True)
    night.git("add", "-A")
    night.git("commit", "-qm", "one")
    with pytest.raises(InputError, match="manifest of .* can't be read"):
        versions.promote(night.root, "HEAD")


def test_a_package_that_is_not_its_own_manifest_s_is_refused(night: Night) -> None:
    night.make("a", 40.0)
    path = night.root / "data/package/model/manifest.json"
    path.unlink()
    path.write_text(json.dumps({"files": {"model.bin": {"bytes": 1, "sha256": "0" * 64}}}))
    with contextlib.chdir(night.root), Repo() as repo:
        repo.commit(force=True)
    night.git("add", "-A")
    night.git("commit", "-qm", "one")
    with pytest.raises(InputError, match="is not the file that the package's manifest names"):
        versions.promote(night.root, "HEAD")
    assert night.git("tag") == "" and not list((night.root / "data/registry").iterdir())


@pytest.mark.parametrize("name", ["../x", "/x", "a/../b", "a//b", "./a", "", ".", "a\\b", "a\nb", "a\0"])
def test_names_that_lead_out_of_a_folder(name: str) -> None:
    with pytest.raises(InputError, match="is no name of a file in a package"):
        contents.checked_name(name)


def test_the_manifest_s_name_is_the_package_s() -> None:
    assert contents.MANIFEST == package.MANIFEST
