"""The registry's tags: GTO's form, their order, tags by hand, revisions that are none."""

from __future__ import annotations

from pathlib import Path

import gto.api
import pytest

from tasks.algorithms.errors import InputError
from tasks.registry import overview, tags, versions
from tests.support.registry_project import Night


def test_the_tags_are_gto_s(night: Night) -> None:
    import gto.api

    for letter in "ab":
        versions.promote(night.root, night.commit(letter))
    assert night.git("tag").split() == ["edgepress#prod#1", "edgepress#prod#2", "edgepress@v0.0.1", "edgepress@v0.0.2"]
    assert {row["version"] for row in gto.api.show(str(night.root), "edgepress")} == {"v0.0.1", "v0.0.2"}


def test_tags_by_hand_are_named(night: Night) -> None:
    versions.promote(night.root, night.commit("a"))
    night.git("tag", "-a", "-m", "by hand", "edgepress#canary#2", "HEAD")
    night.commit("b")
    night.git("tag", "-a", "-m", "by hand", "edgepress@v0.0.9", "HEAD")
    night.git("tag", "-a", "-m", "by hand", "edgepress#prod#9", "HEAD")
    with pytest.raises(InputError, match="edgepress#canary#2 was tagged by hand"):
        overview.versions(night.root)
    night.git("tag", "-d", "edgepress#canary#2")
    assert [row["version"] for row in overview.versions(night.root)] == ["v0.0.9", "v0.0.1"]
    with pytest.raises(InputError, match="v0.0.9 was tagged by hand"):
        versions.current(night.root)


def test_a_number_is_given_once(night: Night) -> None:
    for letter in "ab":
        versions.promote(night.root, night.commit(letter))
    versions.rollback(night.root)
    gto.api.deregister(str(night.root), tags.ARTIFACT, version="v0.0.2")
    assert versions.promote(night.root, night.commit("c")).name == "v0.0.3"


@pytest.mark.parametrize("revision", ["HEAD:params.yaml", "HEAD^{tree}"])
def test_what_is_no_commit_is_refused(night: Night, revision: str) -> None:
    night.commit("a")
    with pytest.raises(InputError, match="is no version, folder or git revision"):
        versions.promote(night.root, revision)


def test_order_is_by_counter_though_the_clock_went_back(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = [night.commit(letter) for letter in "ab"]
    versions.promote(night.root, commits[0])
    versions.promote(night.root, commits[1])
    night.git("update-ref", "-d", "refs/tags/edgepress#prod#2")
    monkeypatch.setenv("GIT_COMMITTER_DATE", "2001-01-01T00:00:00Z")
    night.git("tag", "-a", "edgepress#prod#2", "-m", '{"action":"promote"}', commits[1])
    assert versions.current(night.root).version == "v0.0.2"


def test_no_git_repository(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is in no git repository"):
        versions.current(tmp_path)
