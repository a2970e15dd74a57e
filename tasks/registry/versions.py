"""The registry of models: versions, which of them is promoted, which is a canary; promotion, rollback, their folders.

Git tags in GTO's format are the truth (`tasks.registry.tags`): a version's tag holds the hashes of its files, its
figures and its verdict. `data/registry/current.json` follows from them: the one small file that a server or the nightly
reads to learn which model is in use and in which folder. It is replaced as a whole (`os.replace`), and it lies below
data/, out of git, since it is the state of this machine, while the tags are shared. Whatever was interrupted between a
tag and the file is completed by the next call, and a lost file is made anew.

Order of a promotion: bytes out of DVC's cache into `data/registry/<version>`, every hash checked; version tag; stage
tag (from here it is promoted); the file. So no tag names bytes that weren't there, and no reader sees half of it.

What follows from the tags is `tasks.registry.standing`'s, the list of versions and their differences
`tasks.registry.overview`'s. It judges no model (that is the gate's part), runs no stage and needs no Prefect.
"""

from __future__ import annotations

import errno
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tasks.algorithms.errors import InputError
from tasks.registry import contents, standing, tags
from tasks.registry.standing import FOLDER, Canary, Manifest
from tasks.registry.tags import CANARY, PROMOTED, History, Version
from tasks.runtime import files

MANIFEST = FOLDER / "current.json"
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
"""How the system refuses to write in somebody else's checkout."""


class Withdrawn(InputError):
    """The version was rolled back, and isn't promoted again unless asked for."""


def current(root: Path, *, strict: bool = True) -> Manifest | None:
    """What is promoted; None where nothing was yet. Completes what an interrupted call left.

    Args:
        strict: False: also where its data is gone.

    Raises:
        InputError: no git repository; the promoted version's data is gone.
    """
    try:
        with tags.locked(root):
            return settle(root, strict=strict)
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise
        return _standing(tags.read(root))  # this user completes nothing here


def settle(root: Path, *, strict: bool = True) -> Manifest | None:
    """Bring current.json to what the tags say.

    Args:
        strict: False: where the data is gone (as in a new clone) current.json stays as it is, instead of an error.
    """
    history = tags.read(root)
    path, manifest = root / MANIFEST, _standing(history)
    if manifest is None:
        path.unlink(missing_ok=True)
        return None
    text = files.json_text(asdict(manifest))
    folders = [root / manifest.folder] + ([root / manifest.canary.folder] if manifest.canary else [])
    same = path.exists() and path.read_text(encoding="utf-8", errors="replace") == text
    if not same or not all(map(Path.is_dir, folders)):
        try:
            for folder in folders:
                _keep_folder(root, history.versions[folder.name])
        except InputError:
            if strict:
                raise
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(path, text)
    return manifest


def _standing(history: History) -> Manifest | None:
    stack, _ = standing.promotions(history)
    return standing.manifest(history, stack[-1]) if stack else None


def promote(
    root: Path, rev: str, figures: dict | None = None, verdict: dict | None = None, *, again: bool = False
) -> Version:
    """Make the package of a commit the one in use; a commit that is no version yet becomes the next one.

    Neither branch, index nor workspace of `root` changes; the commit may lie outside of every branch. A package whose
    bytes were registered before keeps its first version.

    Args:
        root: the project's folder, whose DVC cache has the data.
        rev: a version ("v0.0.1"), or what git resolves to a commit.
        figures: what was measured, JSON; None: the commit's evaluation of its package.
        verdict: why it is promoted, JSON with at least "verdict"; None: by hand.
        again: promote it although it was rolled back.

    Raises:
        InputError: no such commit, no package there, or its data is gone or damaged.
        Withdrawn: it was rolled back.
    """
    with tags.locked(root):
        settle(root, strict=False)
        version = _register(root, rev, figures, verdict)
        history = tags.read(root)
        stack, withdrawn = standing.promotions(history)
        if version.name in withdrawn and not again:
            raise Withdrawn(
                f"{version.name} was rolled back ({withdrawn[version.name]}); promote it --again if it shall be used"
            )
        if stack[-1:] != [version.name]:
            tags.assign(root, version.name, PROMOTED, _note("promote", figures, verdict))
        _end_canary(root, version.name, "promote", only=version.name)
        settle(root)
    return version


def rollback(root: Path, version: str | None = None, reason: str = "by hand") -> Version:
    """Go back to the version that was promoted before, or to a named one of those; its bytes are verified first.

    What it goes back from counts as withdrawn: it isn't promoted again unless asked for.

    Raises:
        InputError: there is none, or its data is gone or damaged; then nothing changes.
    """
    with tags.locked(root):
        settle(root, strict=False)
        history = tags.read(root)
        stack, withdrawn = standing.promotions(history)
        if not stack:
            raise InputError("nothing is promoted, so there is nothing to roll back")
        target = version or next((name for name in reversed(stack[:-1]) if name not in withdrawn), None)
        if target is None:
            raise InputError(
                f"no version was promoted before {stack[-1]} and not withdrawn: name the one to go back to"
            )
        if target not in stack[:-1]:
            before = ", ".join(stack[:-1]) or "none"
            raise InputError(f"{target} was not promoted before {stack[-1]}; to choose from: {before}")
        _keep_folder(root, history.versions[target])
        note = {"action": "rollback", "from": stack[-1], "reason": reason}
        tags.assign(root, target, PROMOTED, note)
        settle(root)
    return history.versions[target]


def start_canary(
    root: Path, rev: str, share: float, figures: dict | None = None, verdict: dict | None = None
) -> Canary:
    """Give a candidate a share of the requests; a commit that is no version yet becomes the next one.

    A running canary's share can be changed; requests that were its own stay so while the share grows. Arguments as of
    `promote`.

    Raises:
        InputError: the share isn't between 0 and 1; nothing is promoted that it could be compared with; it is promoted
            itself, was rolled back, or another canary runs; as `promote`.
    """
    if not 0 < share < 1:
        raise InputError(f"share = {share} must be above 0 and below 1")
    with tags.locked(root):
        manifest = settle(root)
        if manifest is None:
            raise InputError("nothing is promoted that a canary could be compared with: promote a version first")
        running = manifest.canary.version if manifest.canary else None
        version = _register(root, rev, figures, verdict)
        if version.name == manifest.version:
            raise InputError(f"{version.name} is promoted itself; it can't be its own canary")
        if running not in (None, version.name):
            raise InputError(f"{running} is a canary already; `edgepress canary stop` ends it")
        _, withdrawn = standing.promotions(tags.read(root))
        if version.name in withdrawn:
            raise InputError(f"{version.name} was rolled back ({withdrawn[version.name]}); promote it --again")
        tags.assign(root, version.name, CANARY, _note("canary", figures, verdict) | {"share": share})
        return settle(root).canary


def stop_canary(root: Path, reason: str = "by hand", *, withdraw: bool = False) -> str:
    """End the canary; returns its version. `withdraw`: it failed, and isn't promoted unless asked for.

    Raises:
        InputError: there is none.
    """
    with tags.locked(root):
        manifest = settle(root, strict=False)
        if manifest is None or manifest.canary is None:
            raise InputError("there is no canary; `edgepress canary start VERSION` begins one")
        _end_canary(root, manifest.canary.version, "rollback" if withdraw else "stop", reason=reason)
        settle(root, strict=False)
        return manifest.canary.version


def kept(root: Path, keep: int) -> list[Version]:
    """The versions whose data stays: the promoted one, those promoted before it, `keep` in all, and the canary."""
    history = tags.read(root)
    stack, _ = standing.promotions(history)
    names = dict.fromkeys([*reversed(stack[-keep:]), *filter(None, [standing.canary(history)])])
    return [history.versions[name] for name in names]


def prune(root: Path, keep: int, dry: bool = False) -> list[Path]:
    """Remove the folders of versions that aren't `kept`; returns them."""
    with tags.locked(root):
        settle(root)
        names = {version.name for version in kept(root, keep)}
        folder = root / FOLDER
        paths = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.exists() else []
        gone = [path for path in paths if path.name not in names]
        for path in () if dry else gone:
            contents.remove(path)
    return gone


def verify(root: Path, name: str) -> Path:
    """Hash the files of a version's folder; returns it.

    Raises:
        InputError: a file is missing or altered; no such version or folder.
    """
    version, folder = find(root, name), root / FOLDER / name
    contents.check(folder, version.record.get("package", {}).get("files", {}))
    return folder


def find(root: Path, name: str) -> Version:
    """The version of this name.

    Raises:
        InputError: there is none.
    """
    history = tags.read(root)
    if name not in history.versions:
        known = ", ".join(history.versions) or "there are none yet"
        raise InputError(f"{name} is no version of the registry: {known}")
    return history.versions[name]


def folder_of(root: Path, version: Version) -> Path:
    """The folder with the files of a version, verified; made from DVC's cache where it isn't there.

    Raises:
        InputError: its data is gone or damaged.
    """
    with tags.locked(root):
        return _keep_folder(root, version)


def _register(root: Path, rev: str, figures: dict | None, verdict: dict | None) -> Version:
    """The version of a commit, registered where it wasn't; its folder is there and verified."""
    history = tags.read(root)
    version = history.versions.get(rev)
    revision = version.revision if version else tags.resolve(root, rev)
    version = version or history.at(revision)
    if version is None:
        version, package = _first_stored(root, history, revision)
        if version is None:
            version = _new_version(root, history, revision, package, figures, verdict)
    _keep_folder(root, version)
    return version


def _first_stored(root: Path, history: History, revision: str) -> tuple[Version | None, dict[str, Any]]:
    """Store a new commit's package under the next version's name, unless a version has the same bytes."""
    folder = root / FOLDER / history.following()
    scratch = folder.with_name(f".{folder.name}")
    contents.remove(scratch)
    try:
        package = contents.store(root, revision, scratch)
        known = [v for v in history.versions.values() if v.record.get("package", {}).get("md5") == package["md5"]]
        if known:
            return known[0], package
        contents.remove(folder)  # of a call that was interrupted before its tag
        os.replace(scratch, folder)
        return None, package
    finally:
        contents.remove(scratch)


def _new_version(
    root: Path, history: History, revision: str, package: dict, figures: dict | None, verdict: dict | None
) -> Version:
    record = {
        "package": package,
        "figures": contents.figures(root, revision) if figures is None else figures,
        "verdict": verdict or {},
    }
    name = history.following()
    tags.register(root, name, revision, record)
    return tags.read(root).versions[name]


def _keep_folder(root: Path, version: Version) -> Path:
    """The version's folder, verified; made from DVC's cache where it is missing or damaged."""
    package = version.record.get("package")
    if not package:
        raise InputError(
            f"{version.name} was tagged by hand, without hashes: `git tag -d {tags.ARTIFACT}@{version.name}`,"
            f" then promote {version.revision[:10]}"
        )
    folder = root / FOLDER / version.name
    try:
        contents.check(folder, package["files"])
    except InputError:
        scratch = folder.with_name(f".{folder.name}")
        contents.remove(scratch)
        try:
            contents.store(root, version.revision, scratch, package)
            contents.remove(folder)
            os.replace(scratch, folder)
        finally:
            contents.remove(scratch)
    return folder


def _end_canary(root: Path, name: str, action: str, reason: str = "", only: str | None = None) -> None:
    """Take the stage from the canary; `only`: if it is this version."""
    last = tags.read(root).of(CANARY)[-1:]
    if any(event.given and only in (None, event.version) for event in last):
        tags.unassign(root, name, CANARY, {"action": action, "reason": reason})


def _note(action: str, figures: dict | None, verdict: dict | None) -> dict[str, Any]:
    """What an assignment's tag says: figures and verdict where they are newer than the version's."""
    given = {"figures": figures, "verdict": verdict}
    return {"action": action} | {key: value for key, value in given.items() if value is not None}
