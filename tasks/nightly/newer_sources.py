"""What a night compresses: the newest revision of model and corpora, and how they get into the nights' worktree.

A hub repository's revision is the commit of the branch that `nightly.upstream` follows, or the pinned one. A local
folder's is the hash of its content, as DVC has it. What another stage makes (the built-in corpus) has no upstream.

Parameters and code are those of the committed HEAD; a local source is taken as it lies at its path in the workspace,
for its content is what the night looks for. It runs and records nothing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dvc.repo import Repo
from dvc.utils.serialize import modify_yaml

from tasks.algorithms.errors import InputError
from tasks.nightly import worktree
from tasks.parameters import schema
from tasks.parameters.schema import Params
from tasks.parameters.source_sections import ModelSource
from tasks.runtime import git, lineage


class Source(NamedTuple):
    """One source and its newest revision.

    Attributes:
        name: "model", "corpora.test".
        where: repository of the hub, or path.
        revision: 40-hex commit, or DVC's hash of the content.
    """

    name: str
    where: str
    revision: str


def bring(top: Path, folder: Path) -> list[Source]:
    """Put every source into the worktree, pin the hub's newest commits in its params.yaml, and say what they are.

    Args:
        top: the workspace.
        folder: the worktree.

    Raises:
        InputError: a source is missing, or the hub does not answer.
    """
    own = schema.load(folder / "params.yaml")
    local = [source for _, source in _sources(own) if source.hub is None]
    for path in dict.fromkeys(source.path for source in local):
        _place(top, folder, Path(path))
    pinned = {name: _commit(name, source, own) for name, source in _sources(own) if source.hub is not None}
    _pin(folder / "params.yaml", own, pinned)
    hashes = _hashes(folder, {source.path for source in local})
    found = [Source(name, source.hub, pinned[name]) for name, source in _sources(own) if source.hub is not None]
    found += [
        Source(name, source.path, hashes[source.path])
        for name, source in _sources(own)
        if source.hub is None and source.path in hashes
    ]
    return sorted(found)


def digest(sources: list[Source]) -> str:
    """One hash of all revisions."""
    return hashlib.sha256("".join(f"{source.name} {source.revision}\n" for source in sources).encode()).hexdigest()


def _sources(own: Params) -> Iterator[tuple[str, ModelSource]]:
    yield "model", own.fetch.model
    for name in type(own.fetch.corpora).model_fields:
        yield f"corpora.{name}", getattr(own.fetch.corpora, name)


def _place(top: Path, folder: Path, path: Path) -> None:
    """Make a relative path lead to the same content in the worktree as in the workspace.

    What git has unchanged is there already, what it has otherwise is copied, what it doesn't have is linked.
    """
    if path.is_absolute() or not (top / path).exists():
        return
    target, spec = Path(os.path.normpath(folder / path)), f":(literal){path.as_posix()}"
    if not target.is_relative_to(top / worktree.WORKTREE):
        _place_outside(top, folder, path)
    elif not git.run(folder, "ls-files", "--", spec):
        if target.is_symlink() or not target.exists():  # what it leads to may have changed
            _link(target, (top / path).resolve())
    elif git.run(top, "status", "--porcelain", "--ignored", "--", spec):
        _copy(top / path, target)


def _place_outside(top: Path, folder: Path, path: Path) -> None:
    """Link the folder beside the repository that a path leads through, beside the worktree."""
    steps = next(place for place, part in enumerate(path.parts) if part != "..")
    first = Path(*path.parts[: steps + 1])
    target = Path(os.path.normpath(folder / first))
    if ".." in path.parts[steps:] or target.parent != top / worktree.FOLDER:
        raise InputError(f"{path} leads too far out of the project for a night; name it by an absolute path")
    _link(target, (top / first).resolve())


def _link(target: Path, source: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    target.symlink_to(source)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)


def _commit(name: str, source: ModelSource, own: Params) -> str:
    """The commit of the followed branch, or the pinned one."""
    follow = own.nightly.upstream.model if name == "model" else own.nightly.upstream.corpora
    if follow is None:
        return source.revision
    from huggingface_hub import HfApi

    from tasks.sources import hub  # imports the hub's client

    kind, what = ("model", "model") if name == "model" else ("dataset", "data set")
    with hub.failures(what, source.model_copy(update={"revision": follow})):
        return HfApi().repo_info(source.hub, revision=follow, repo_type=kind).sha


def _pin(path: Path, own: Params, pinned: dict[str, str]) -> None:
    """Write the commits into params.yaml where they differ; comments stay."""
    changes = {name: found for name, found in pinned.items() if found != dict(_sources(own))[name].revision}
    if not changes:
        return
    with modify_yaml(str(path)) as text:
        for name, found in changes.items():
            section = text["fetch"]
            for word in name.split("."):
                section = section[word]
            section["revision"] = found


def _hashes(folder: Path, paths: set[str]) -> dict[str, str]:
    """Path -> hash of those that stage fetch depends on and no stage makes anew."""
    with Repo(str(folder)) as repo:
        made = [out.fs_path for stage in repo.index.stages if not stage.frozen for out in stage.outs]
        found = {}
        for dep in repo.stage.load_one(str(folder / "dvc.yaml"), "fetch").deps:
            if dep.def_path not in paths:
                continue
            inside = any(Path(dep.fs_path).is_relative_to(path) for path in made)
            if not inside and (value := lineage.md5(dep)):
                found[dep.def_path] = value
    return found
