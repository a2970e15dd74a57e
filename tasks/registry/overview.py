"""The registry at a glance: every version in a row, and what differs between two versions or commits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dvc.repo import Repo

from tasks.algorithms.errors import InputError
from tasks.registry import contents, standing, tags
from tasks.registry import versions as registry
from tasks.registry.tags import History, Version


def versions(root: Path) -> list[dict[str, Any]]:
    """Every version, the newest first: version, stage, date, bytes, figures, verdict, revision, data.

    data: "kept" in a folder of the registry, "cached" by DVC, or "gone".
    """
    registry.current(root, strict=False)
    history = tags.read(root)
    return [
        {
            "version": version.name,
            "stage": standing.stage(history, version.name),
            "date": version.date,
            "bytes": version.record.get("package", {}).get("bytes"),
            "figures": standing.latest(history, version.name, "figures"),
            "verdict": standing.latest(history, version.name, "verdict"),
            "revision": version.revision,
            "data": _data(root, version),
        }
        for version in reversed(history.versions.values())
    ]


def diff(root: Path, old: str, new: str) -> dict[str, Any]:
    """What differs between two versions or commits: figures, parameters, files by sha256, bytes.

    Returns:
        figures and parameters: name -> (old, new), None where one has none; files: name -> (bytes, bytes) of those that
        differ; bytes: (old, new), None where the package is unknown.

    Raises:
        InputError: no such version or commit, or the parameters of one can't be read.
    """
    history = tags.read(root)
    sides = [_side(root, history, rev) for rev in (old, new)]
    packages = [side["package"] or {"bytes": None, "files": {}} for side in sides]
    with Repo(str(root)) as repo:
        changed = repo.params.diff(a_rev=sides[0]["revision"], b_rev=sides[1]["revision"])
    for revision, why in changed.get("errors", {}).items():  # DVC goes on without what it can't read
        raise InputError(f"the parameters of commit {revision[:12]} can't be read: {why}")
    parameters = {
        name: (values["old"], values["new"])
        for file in changed.get("diff", {}).values()
        for name, values in sorted(file.items())
    }
    hashes = [{name: file["sha256"] for name, file in package["files"].items()} for package in packages]
    sizes = [{name: file["bytes"] for name, file in package["files"].items()} for package in packages]
    altered = {name for name in hashes[0] | hashes[1] if hashes[0].get(name) != hashes[1].get(name)}
    return {
        "revisions": tuple(side["revision"] for side in sides),
        "figures": _differing(*(side["figures"] for side in sides)),
        "parameters": parameters,
        "files": {name: (sizes[0].get(name), sizes[1].get(name)) for name in sorted(altered)},
        "bytes": (packages[0]["bytes"], packages[1]["bytes"]),
    }


def _data(root: Path, version: Version) -> str:
    if (root / standing.FOLDER / version.name).is_dir():
        return "kept"
    return "cached" if contents.present(root, version.revision) else "gone"


def _side(root: Path, history: History, rev: str) -> dict[str, Any]:
    """revision, package (None where its data is gone), figures of a version or commit."""
    version = history.versions.get(rev)
    revision = version.revision if version else tags.resolve(root, rev)
    version = version or history.at(revision)
    if version:
        package, figures = version.record.get("package"), standing.latest(history, version.name, "figures")
        return {"revision": revision, "package": package, "figures": figures}
    return {
        "revision": revision,
        "package": contents.described(root, revision),
        "figures": contents.figures(root, revision),
    }


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (old.get(name), new.get(name)) for name in sorted(old | new) if old.get(name) != new.get(name)}
