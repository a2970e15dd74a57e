"""The nights' own git worktree, and the commits that are made there. Knows nothing of Prefect and needs no server.

A night runs in `.dvc/tmp/nights/worktree`, a worktree of the committed HEAD that shares DVC's cache with the workspace:
neither the workspace nor its branch, index or dvc.lock is touched, whatever lies there uncommitted. The worktree stays
from one night to the next, with its outputs, its dvc.lock and lineage records, and the journals of interrupted stages,
so that a night without changes has nothing to link and an interrupted one goes on. What stages note of this machine's
runs (`lineage.HERE`) is shared as the cache is: who restores what the other computed knows who made it. The list of
nights is `tasks.nightly.records`'s.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from dvc.repo import Repo
from dvc.repo.experiments.refs import EXEC_APPLY

from tasks.algorithms.errors import InputError
from tasks.runtime import files, git, lineage, locks, mend

FOLDER = Path(".dvc/tmp/nights")
"""Below DVC's temporary folder, which git and DVC ignore."""
WORKTREE = FOLDER / "worktree"
LOCK = FOLDER / "lock"
AUTHOR = git.signed({"NAME": "edgepress nightly", "EMAIL": "nightly@localhost"})


def root() -> Path:
    """The project's folder, which is the working folder; its git repository may be a larger one.

    Raises:
        InputError: the working folder is no project, or in no git repository that has a commit.
    """
    top = Path.cwd()
    if not (top / "dvc.yaml").exists():
        raise InputError(f"{top} has no dvc.yaml; run from the project's folder")
    try:
        git.trust(top)
        git.run(top, "rev-parse", "--verify", "--quiet", "HEAD")
    except git.Distrusted:
        raise
    except InputError as error:
        raise InputError("a night compresses a commit: run from the folder of a git repository with one") from error
    return top


def project(top: Path) -> Path:
    """The project's folder in the nights' worktree, which is one of the whole repository."""
    return top / WORKTREE / git.run(top, "rev-parse", "--show-prefix")


def locked(top: Path, wait: bool) -> contextlib.AbstractContextManager[None]:
    """Keep a second night, or retention, out.

    Args:
        wait: for the other one to end, instead of an error.

    Raises:
        InputError: on entering, another one holds the lock; says which process, and since when.
    """
    way_out = "wait for it, end it, or set nightly.overlap to queue"
    return locks.held(top / LOCK, "a night or its retention is at work", way_out, wait=wait)


def prepare(top: Path) -> Path:
    """Bring the nights' worktree to the workspace's HEAD; outputs, dvc.lock and records stay: they belong together.

    Returns:
        The project's folder in it.

    Raises:
        InputError: the project isn't committed.
    """
    folder, own, head = top / WORKTREE, project(top), git.run(top, "rev-parse", "HEAD")
    if _is_worktree(folder):
        kept = {path: path.read_bytes() for path in map(own.joinpath, _beside_head(own))}
        for stale in Path(git.run(folder, "rev-parse", "--absolute-git-dir")).glob("*.lock"):
            stale.unlink()  # git's, of a night that was killed: only nights work here, one at a time
        git.run(folder, "checkout", "--quiet", "--force", "--detach", head)
        git.run(folder, "clean", "--quiet", "--force", "-d")
        for path, content in kept.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_bytes(path, content)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        _forget(top, folder)
        git.run(top, "worktree", "prune")
        git.run(top, "worktree", "add", "--quiet", "--force", "--detach", str(folder), head)
    if not (own / "dvc.yaml").exists():
        raise InputError(f"dvc.yaml is not in commit {head[:10]}, which a night compresses; commit the project first")
    with contextlib.chdir(own):
        mend.mend()  # a dvc.lock that git or a full disk left half-written
    _share_cache(top, own)
    _share_records(top, own)
    return own


def _beside_head(folder: Path) -> list[str]:
    """What says what the outputs in a worktree are: dvc.lock, and the stages' records."""
    return [name for name in ("dvc.lock", *lineage.tracked(folder)) if (folder / name).exists()]


def _forget(top: Path, folder: Path) -> None:
    """Remove what git knows of a worktree: a kill in `git worktree add` leaves it locked, and half-written."""
    folder_of_git = Path(git.run(top, "rev-parse", "--path-format=absolute", "--git-common-dir"))
    for known in folder_of_git.glob("worktrees/*/gitdir"):
        if known.read_text(encoding="utf-8", errors="replace").strip() in ("", str(folder / ".git")):
            shutil.rmtree(known.parent)


def _is_worktree(folder: Path) -> bool:
    try:
        return folder.is_dir() and Path(git.run(folder, "rev-parse", "--show-toplevel")) == folder.resolve()
    except InputError:
        return False


def _share_cache(top: Path, folder: Path) -> None:
    """Give the worktree the workspace's own settings, and its cache."""
    own = top / ".dvc/config.local"
    if own.exists():
        shutil.copyfile(own, folder / ".dvc/config.local")
    with Repo(str(top)) as workspace, Repo(str(folder), uninitialized=True) as repo:
        # a relative path stays one, mostly of ".." alone: DVC can't write names that aren't ASCII (3.67.1)
        cache = os.path.relpath(workspace.cache.local_cache_dir)
        with repo.config.edit("local") as config:
            config.setdefault("cache", {})["dir"] = cache


def _share_records(top: Path, folder: Path) -> None:
    """Make the worktree's records of runs on this machine the workspace's."""
    own, shared = folder / lineage.HERE, (top / lineage.HERE).resolve()
    shared.mkdir(parents=True, exist_ok=True)
    own.parent.mkdir(parents=True, exist_ok=True)
    if not own.is_symlink():
        own.symlink_to(shared, target_is_directory=True)


def snapshot(folder: Path) -> str:
    """A commit on HEAD of the worktree's tracked files, dvc.lock and records; no ref names it yet."""
    return commit(folder, git.tree(folder, _beside_head(folder)), "candidate of a night")


def commit(folder: Path, tree: str, message: str) -> str:
    """A commit of the tree on HEAD."""
    head = git.run(folder, "rev-parse", "HEAD")
    return git.run(folder, "commit-tree", tree, "-p", head, "-F", "-", env=AUTHOR, text=message)


def uncommitted(top: Path) -> str:
    """Tracked files that differ from HEAD, in words; none where they are just what was brought back before."""
    changed = git.names(top, "diff", "--name-only", "HEAD")
    places = [f":(top,literal){name}" for name in changed]  # the repository may be larger than the project
    with contextlib.suppress(InputError):  # no such ref: nothing was brought back yet
        if changed and not git.names(top, "diff", "--name-only", EXEC_APPLY, "--", *places):
            return ""
    return ", ".join(changed)
