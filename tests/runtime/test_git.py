"""Git called from anywhere, and the tree of what lies in a folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tasks.algorithms.errors import InputError
from tasks.runtime import git

WHO = {f"GIT_{who}_{what}": "t@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with the committed files `a` and `sub/b`; `lock` is ignored."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    path = tmp_path / "project"
    (path / "sub").mkdir(parents=True)
    for name in ("a", "sub/b"):
        (path / name).write_text(f"{name}\n")
    (path / ".gitignore").write_text("lock\n")
    git.run(path, "init", "--quiet", "-b", "main")
    git.run(path, "add", ".")
    git.run(path, "commit", "--quiet", "-m", "start", env=WHO)
    return path


def test_a_failure_is_in_git_s_own_words(folder: Path) -> None:
    with pytest.raises(InputError, match="^git rev-parse --verify failed: fatal: Needed a single revision$"):
        git.run(folder, "rev-parse", "--verify", "nothing")


def test_the_repository_is_that_of_the_folder_also_within_a_hook(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "index"))
    assert git.run(folder, "rev-parse", "--show-toplevel") == str(folder)
    assert git.run(folder, "ls-files").split() == [".gitignore", "a", "sub/b"]


def test_hooks_do_not_run(folder: Path) -> None:
    hook = folder / ".git/hooks/pre-commit"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    git.run(folder, "commit", "--quiet", "--allow-empty", "-m", "again", env=WHO)


def test_the_tree_of_an_unchanged_folder_is_head_s(folder: Path) -> None:
    assert git.tree(folder) == git.run(folder, "rev-parse", "HEAD^{tree}")


def test_the_tree_has_tracked_files_as_they_lie_and_the_named_ones(folder: Path) -> None:
    (folder / "a").write_text("changed\n")
    (folder / "sub/b").unlink()
    (folder / "lock").write_text("locked\n")
    (folder / "new").write_text("not tracked\n")
    (folder / "staged").write_text("staged\n")
    git.run(folder, "add", "staged")
    before = git.run(folder, "status", "--porcelain"), git.run(folder, "rev-parse", "HEAD")
    tree = git.tree(folder, ["lock", "missing"])
    assert git.run(folder, "ls-tree", "-r", "--name-only", tree).split() == [".gitignore", "a", "lock"]
    assert git.run(folder, "show", f"{tree}:a") == "changed" and git.run(folder, "show", f"{tree}:lock") == "locked"
    assert (git.run(folder, "status", "--porcelain"), git.run(folder, "rev-parse", "HEAD")) == before


NAMES = ["Größe.md", "two words", 'a "quote"', "tab\there", "line\nbreak", "\udcff"]
"""The last one is no UTF-8."""


def test_names_are_what_they_are(folder: Path) -> None:
    for name in NAMES:
        (folder / name).write_text("x")
    git.run(folder, "add", ".")
    assert sorted(git.names(folder, "diff", "--name-only", "HEAD")) == sorted(NAMES)
    (folder / "deep").mkdir()
    assert git.names(folder / "deep", "ls-files") == []


def test_who_commits_is_whom_git_was_told_of_or_nobody(folder: Path, monkeypatch) -> None:
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")  # as a machine whose name has no domain
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "user.useConfigOnly")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "true")
    assert git.identity(folder) == git.NOBODY
    git.run(folder, "config", "user.email", "ö@example.org")
    assert git.identity(folder) == git.NOBODY  # half of one
    git.run(folder, "config", "user.name", "Ö Ü")
    assert git.identity(folder) == {"NAME": "Ö Ü", "EMAIL": "ö@example.org"}


def test_a_folder_of_another_user_is_told_in_git_s_words(folder: Path, monkeypatch) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own way to try it
    with pytest.raises(git.Distrusted, match=r"dubious ownership.*git config --global --add safe.directory"):
        git.run(folder, "rev-parse", "HEAD")
