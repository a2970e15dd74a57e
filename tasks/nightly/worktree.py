"""The nights' own git worktree, and their record as DVC experiments. Knows nothing of Prefect and needs no server.

A night runs in `.dvc/tmp/nights/worktree`, a worktree of the committed HEAD that shares DVC's cache with the workspace:
neither the workspace nor its branch, index or dvc.lock is touched, whatever lies there uncommitted. The worktree stays
from one night to the next, with its outputs, its dvc.lock and the journals of interrupted stages, so that a night
without changes has nothing to link and an interrupted one goes on.

Each night is one commit on top of the HEAD that it compressed, under `refs/exps/…/night-DATE-TIME-UPSTREAM`, the form
in which DVC keeps experiments (`dvc exp show`, `apply`, `diff`, `branch`, `push`). The commit holds dvc.lock,
params.yaml and whatever source in git had changed; its message holds the verdict and the figures as JSON. It is written
with git's plumbing: `dvc exp save` takes the refs refs/exps/exec/*, which all worktrees share, and would meet a
`dvc exp run` of the user's there (dvc 3.67.1).
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.repo.experiments.refs import EXEC_APPLY, EXPS_NAMESPACE, ExpRefInfo

from tasks.algorithms.errors import InputError
from tasks.runtime import files, git, locks

FOLDER = Path(".dvc/tmp/nights")
"""Below DVC's temporary folder, which git and DVC ignore."""
WORKTREE = FOLDER / "worktree"
LOCK = FOLDER / "lock"
PREFIX = "night-"
FAILED = "FAILED"
"""In place of a verdict where a stage failed: there is nothing to judge and nothing to bring back."""
AUTHOR = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "edgepress nightly"), ("EMAIL", "nightly@localhost"))
}


class Night(NamedTuple):
    """A recorded night.

    Attributes:
        name: night-DATE-TIME-UPSTREAM.
        commit: what DVC calls the experiment's revision.
        record: the JSON of its message: verdict, reason, figures, checks, upstream, ….
    """

    name: str
    ref: str
    commit: str
    record: dict[str, Any]


def root() -> Path:
    """The project's folder, which is git's and DVC's alike.

    Raises:
        InputError: the working folder is not in such a project, or it has no commit.
    """
    try:
        top = Path(git.run(Path.cwd(), "rev-parse", "--show-toplevel"))
        git.run(top, "rev-parse", "--verify", "--quiet", "HEAD")
    except InputError as error:
        raise InputError("a night compresses a commit: run from the folder of a git repository with one") from error
    if not (top / "dvc.yaml").exists():
        raise InputError(f"{top} has no dvc.yaml; run from the project's folder")
    return top


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
    """Bring the nights' worktree to the workspace's HEAD; its outputs and dvc.lock stay, as they belong together."""
    folder, head = top / WORKTREE, git.run(top, "rev-parse", "HEAD")
    if _is_worktree(folder):
        lock = folder / "dvc.lock"
        kept = lock.read_bytes() if lock.exists() else None
        for stale in Path(git.run(folder, "rev-parse", "--absolute-git-dir")).glob("*.lock"):
            stale.unlink()  # git's, of a night that was killed: only nights work here, one at a time
        git.run(folder, "checkout", "--quiet", "--force", "--detach", head)
        git.run(folder, "clean", "--quiet", "--force", "-d")
        if kept is not None:
            lock.write_bytes(kept)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        _forget(top, folder)
        git.run(top, "worktree", "prune")
        git.run(top, "worktree", "add", "--quiet", "--force", "--detach", str(folder), head)
    _share_cache(top, folder)
    return folder


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
        cache = workspace.cache.local_cache_dir
        with repo.config.edit("local") as config:
            config.setdefault("cache", {})["dir"] = cache


def snapshot(folder: Path) -> str:
    """A commit on HEAD of the worktree's tracked files and dvc.lock; no ref names it yet."""
    return commit(folder, git.tree(folder, ["dvc.lock"]), "candidate of a night")


def commit(folder: Path, tree: str, message: str) -> str:
    """A commit of the tree on HEAD."""
    head = git.run(folder, "rev-parse", "HEAD")
    return git.run(folder, "commit-tree", tree, "-p", head, "-F", "-", env=AUTHOR, text=message)


def save(folder: Path, name: str, candidate: str | None, record: dict[str, Any]) -> Night:
    """Record a night under its name.

    Args:
        candidate: of `snapshot`; None records a failed night on HEAD as it was.
    """
    tree = git.run(folder, "rev-parse", f"{candidate or 'HEAD'}^{{tree}}")
    found = commit(folder, tree, f"{name}: {record['verdict']}\n\n{files.json_text(record)}")
    ref = str(ExpRefInfo(git.run(folder, "rev-parse", "HEAD"), name))
    git.run(folder, "update-ref", ref, found)
    return Night(name, ref, found, record)


def listing(top: Path) -> list[Night]:
    """Every recorded night, the oldest first."""
    form = "%(refname)%00%(objectname)%00%(contents:body)%01"
    entries = git.run(top, "for-each-ref", f"--format={form}", EXPS_NAMESPACE).split("\1")
    nights = []
    for ref, found, body in (entry.strip("\n").split("\0") for entry in entries if entry.strip()):
        name = ref.rpartition("/")[2]
        if name.startswith(PREFIX):
            with contextlib.suppress(ValueError):  # not one of ours, or written by hand
                nights.append(Night(name, ref, found, json.loads(body)))
    return sorted(nights)


def find(top: Path, name: str) -> Night:
    """The night of this name, or the only one that it begins.

    Raises:
        InputError: there is none, or there are several.
    """
    known = listing(top)
    exact = [night for night in known if night.name == name]
    found = exact or [night for night in known if night.name.startswith(name)]
    if len(found) != 1:
        names = ", ".join(night.name for night in (found or known)[-5:]) or "none"
        raise InputError(f"{'several nights are' if found else 'no night is'} called {name}; there are {names}")
    return found[0]


def changed_parameters(top: Path, nights: list[Night]) -> dict[str, dict[str, Any]]:
    """Of every night the parameters in which the nights differ: name -> {"section.key": value}."""
    texts = {night.name: git.run(top, "show", f"{night.commit}:params.yaml") for night in nights}
    flat = {name: dict(_flatten(yaml.safe_load(text))) for name, text in texts.items()}
    keys = sorted({key for values in flat.values() for key in values})
    differ = [key for key in keys if len({json.dumps(values.get(key)) for values in flat.values()}) > 1]
    return {name: {key: values.get(key) for key in differ} for name, values in flat.items()}


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key in value:
            yield from _flatten(value[key], f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def apply(top: Path, name: str, force: bool = False) -> Night:
    """Bring a night back into the workspace: params.yaml, dvc.lock, code, and from the cache every output.

    Args:
        force: even where uncommitted changes get lost.

    Raises:
        InputError: no such night, a failed one, uncommitted changes, or outputs that the cache no longer has.
    """
    night = find(top, name)
    if night.record["verdict"] == FAILED:
        raise InputError(f"{night.name} failed ({night.record['reason']}); there is nothing to bring back")
    if not force and (changes := uncommitted(top)):
        raise InputError(
            f"the workspace has uncommitted changes ({changes}); commit them first, or lose them by --force"
        )
    with Repo(str(top), _wait_for_lock=True) as repo:
        try:
            repo.experiments.apply(night.commit)
        except DvcException as error:
            raise InputError(f"{night.name} can't be brought back: {' '.join(str(error).split())}") from error
    return night


def uncommitted(top: Path) -> str:
    """Tracked files that differ from HEAD, in words; none where they are just what was brought back before."""
    changed = git.run(top, "diff", "--name-only", "HEAD").splitlines()
    with contextlib.suppress(InputError):  # no such ref: nothing was brought back yet
        if changed and not git.run(top, "diff", "--name-only", EXEC_APPLY, "--", *changed):
            return ""
    return ", ".join(changed)
