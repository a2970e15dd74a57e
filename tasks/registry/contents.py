"""The bytes of versions: read from DVC's cache at a commit, checked hash by hash, kept in folders of the registry.

A commit's dvc.lock names the package's files by md5, DVC's cache has them; `store` copies them to a folder of their own
(`data/registry/v0.0.1`) and checks every byte on the way. Folders are copies, so neither `dvc gc` nor an edit in
data/package reaches a promoted model. DVC reads the commit out of git: no branch, index or workspace is touched.

`snapshot` makes a commit of a workspace's present state, beside its branch. Nothing here removes from DVC's cache: that
is retention's part, which asks `tasks.registry.versions.kept` for the commits whose data stays.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from dvc.api import DVCFileSystem
from dvc.exceptions import DvcException
from dvc.output import Output
from dvc.repo import Repo
from dvc.scm import SCMError
from dvc.stage import Stage
from dvc_data.index import DataIndexError

from tasks.algorithms.errors import InputError
from tasks.runtime import files, git, lineage

STAGE = "package"
"""The stage whose model is shipped."""
MODEL = PurePosixPath("data/package/model")
"""Its place, which may lie in an output of the stage."""
MANIFEST = "manifest.json"
"""Of a package: its files by sha256; tasks.package.MANIFEST, without the import of torch."""
EVALUATION = "data/evaluate/package/metrics.json"
"""Of a commit: the figures of a version that is promoted without any."""
CHUNK = 2**20
"""Bytes that are copied at once."""
TRACKED = ("dvc.yaml", "dvc.lock", "params.yaml")
"""What `snapshot` adds even where git doesn't know it yet, beside the lineage records."""


def store(root: Path, revision: str, target: Path, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Copy the package of a commit to `target`, which doesn't exist, and say what it is.

    Args:
        known: what it must be.

    Returns:
        path (in the project), md5 (DVC's of the folder), bytes, and files: name -> bytes, md5, sha256.

    Raises:
        InputError: there is no package at that commit, its data is gone, it is not what the hashes say, or not `known`.
    """
    with _refusals(revision), _opened(root, revision) as fs:
        path, out = str(MODEL), _package(fs, revision)
        folder = out.get_obj(filter_info=fs.repo.fs.join(fs.repo.root_dir, path))
        if folder is None:
            raise FileNotFoundError(path)
        copied = {}
        for source, details in sorted(fs.find(path, detail=True).items()):
            name = checked_name(str(PurePosixPath(source.lstrip("/")).relative_to(path)))
            copied[name] = _copy(fs, source, target / name, details["dvc_info"]["md5"])
    _compare_with_manifest(target, copied, revision)
    package = {
        "path": path,
        "md5": folder.hash_info.value,
        "bytes": sum(file["bytes"] for file in copied.values()),
        "files": copied,
    }
    if known is not None and package != dict(known):
        raise InputError(f"the package of {revision[:10]} is not the one that was registered: its tag was altered")
    return package


def described(root: Path, revision: str) -> dict[str, Any] | None:
    """What `store` says of the package of a commit; None where there is none or its data is gone."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.suppress(InputError):
        return store(root, revision, Path(scratch) / "package")
    return None


def present(root: Path, revision: str) -> bool:
    """Whether DVC's cache (or remote) still has all of the package of a commit."""
    try:
        with _refusals(revision), _opened(root, revision) as fs:
            _package(fs, revision)
            return all(fs.exists(path) and _readable(fs, path) for path in fs.find(str(MODEL)))
    except InputError:
        return False


def check(folder: Path, package: Mapping[str, Mapping[str, Any]]) -> None:
    """Hash a folder's files.

    Args:
        package: name -> bytes and sha256 of every file.

    Raises:
        InputError: one is missing, altered, or too many.
    """
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    for name in sorted(present - set(package)):
        raise InputError(f"{folder / name} doesn't belong to the package: move it elsewhere")
    for name, expected in package.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise InputError(f"{path} is missing, or no ordinary file")
        if path.stat().st_size != expected["bytes"] or files.sha256(path) != expected["sha256"]:
            raise InputError(f"{path} was altered: its sha256 is not {expected['sha256'][:10]}…")


def checked_name(name: str) -> str:
    """A file's name below a folder, with forward slashes.

    Raises:
        InputError: it would lead out of the folder, or isn't in its plainest form.
    """
    path = PurePosixPath(name)
    if not name or name != str(path) or path.is_absolute() or ".." in path.parts or not name.isprintable():
        raise InputError(f"{name!r} is no name of a file in a package")
    if "\\" in name or name == ".":
        raise InputError(f"{name!r} is no name of a file in a package")
    return name


def read_json(root: Path, revision: str, path: str) -> dict[str, Any]:
    """A JSON file at a commit, from git or from DVC's cache; empty where it isn't there."""
    try:
        with _opened(root, revision) as fs:
            content = json.loads(fs.read_text(path))
    except (OSError, ValueError, DvcException):
        return {}
    return content if isinstance(content, dict) else {}


def figures(root: Path, revision: str) -> dict[str, float]:
    """perplexity_<split> and bits_per_byte_<split> of the package of a commit; empty where it was not evaluated."""
    metrics = read_json(root, revision, EVALUATION)
    return {
        f"{measure}_{split}": value
        for measure in ("perplexity", "bits_per_byte")
        for split, value in metrics.get(measure, {}).items()
    }


def snapshot(root: Path) -> str:
    """The commit of a workspace's present state: HEAD, or one beside the branch where tracked files differ from it.

    The commit has HEAD as its parent; branch and index stay as they are.

    Raises:
        InputError: no git repository, or the package on disk isn't the one that dvc.lock names.
    """
    _check_workspace(root)
    head, tree = git.run(root, "rev-parse", "HEAD"), git.tree(root, [*TRACKED, *lineage.tracked(root)])
    if tree == git.run(root, "rev-parse", "HEAD^{tree}"):
        return head
    message = "Workspace of a promoted package"
    return git.run(root, "commit-tree", tree, "-p", head, "-m", message, env=git.signed(git.identity(root)))


def _check_workspace(root: Path) -> None:
    try:
        with Repo(str(root)) as repo:
            outs = _outputs(_stage(repo))
            altered = [str(out) for out in outs if not out.hash_info or lineage.md5(out) != out.hash_info.value]
    except DvcException as error:
        raise InputError(f"{root} holds no package: {' '.join(str(error).split())}") from error
    if altered or not outs:
        raise InputError(
            f"the package in {root} is not the one that dvc.lock names; `dvc repro {STAGE}` makes it, or `dvc checkout`"
            " brings it back"
        )


def _stage(repo: Repo) -> Stage:
    """The stage of the repository's own dvc.yaml; without a path DVC takes that of the working folder."""
    return repo.stage.load_one(repo.fs.join(repo.root_dir, "dvc.yaml"), STAGE)


def _outputs(stage: Stage) -> list[Output]:
    """The output that is the model's folder, or that it lies in."""
    return [out for out in stage.outs if MODEL.is_relative_to(out.def_path)]


def _package(fs: DVCFileSystem, revision: str) -> Output:
    """The output with the package at a commit.

    Raises:
        InputError: there is no such stage, or it made none.
    """
    try:
        stage = _stage(fs.repo)
    except DvcException as error:
        raise InputError(
            f"{revision[:10]} has no stage {STAGE} in its dvc.yaml: it is no run of this project"
        ) from error
    for out in _outputs(stage):
        if out.hash_info:
            return out
    raise InputError(f"{revision[:10]} has no package in its dvc.lock: it was not made there")


@contextlib.contextmanager
def _opened(root: Path, revision: str) -> Iterator[DVCFileSystem]:
    with Repo(str(root)) as repo, repo.switch(revision):  # DVCFileSystem itself takes git's folder for the project's
        yield repo.dvcfs.fs


@contextlib.contextmanager
def _refusals(revision: str) -> Iterator[None]:
    """DVC's own exceptions for data that isn't there, in a sentence."""
    try:
        yield
    except (DvcException, DataIndexError, SCMError, OSError) as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise
        raise InputError(
            f"the data of {revision[:10]} is gone from DVC's cache; `dvc fetch` brings it from a remote, or check that"
            " commit out and `dvc repro`"
        ) from error


def _copy(fs: DVCFileSystem, source: str, target: Path, md5: str) -> dict[str, Any]:
    """Copy a file, hashing it; DVC itself doesn't look at what it reads from its cache."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digests, size = (hashlib.md5(usedforsecurity=False), hashlib.sha256()), 0
    with fs.open(source, "rb") as given, target.open("wb") as taken:
        while part := given.read(CHUNK):
            size += taken.write(part)
            for digest in digests:
                digest.update(part)
        taken.flush()
        os.fsync(taken.fileno())
    if digests[0].hexdigest() != md5:
        raise InputError(
            f"{source} in DVC's cache is damaged: its md5 is not {md5[:10]}…; delete that object, then `dvc fetch` or"
            " `dvc repro` brings it back"
        )
    return {"bytes": size, "md5": md5, "sha256": digests[1].hexdigest()}


def _readable(fs: DVCFileSystem, path: str) -> bool:
    with fs.open(path, "rb") as file:
        return file.read(1) is not None


def _compare_with_manifest(folder: Path, copied: Mapping[str, Mapping[str, Any]], revision: str) -> None:
    """The package's own manifest names its files by sha256, where the stage was switched on."""
    path = folder / MANIFEST
    try:
        named = json.loads(path.read_text(encoding="utf-8")).get("files", {}) if path.exists() else {}
        hashes = {name: described["sha256"] for name, described in named.items()}
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
        raise InputError(
            f"the package's manifest of {revision[:10]} can't be read: {MANIFEST} is no manifest"
        ) from error
    for name, expected in hashes.items():
        if copied.get(name, {}).get("sha256") != expected:
            raise InputError(f"{name} of {revision[:10]} is not the file that the package's manifest names")


def remove(folder: Path) -> None:
    """Remove a folder, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)
