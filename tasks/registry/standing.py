"""What follows from the registry's tags: which version is in use, which is a canary, which were rolled back.

It reads a history (`tasks.registry.tags`) and nothing else; what is done about it is `tasks.registry.versions`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.algorithms.errors import InputError
from tasks.registry.tags import CANARY, PROMOTED, Assignment, History

FOLDER = Path("data/registry")
"""A folder per version whose bytes are kept, and the manifest; ignored by git."""


@dataclass(frozen=True)
class Canary:
    """The candidate beside the promoted version.

    Attributes:
        share: of the requests, 0 to 1.
        folder: of its package, from the project's root.
    """

    version: str
    share: float
    since: str
    folder: str


@dataclass(frozen=True)
class Manifest:
    """What is in use; the content of current.json.

    Attributes:
        version: "v0.0.2".
        revision: the commit whose dvc.lock names the data.
        tag: the promotion, "edgepress#prod#3".
        promoted: when, ISO 8601.
        folder: of the package's files, from the project's root.
        package: path, md5 (DVC's), bytes, files: name -> bytes, md5, sha256.
        figures: what was measured, as `promote` was told.
        verdict: of the gate, as `promote` was told; empty where it was promoted by hand.
    """

    version: str
    revision: str
    tag: str
    promoted: str
    folder: str
    package: Mapping[str, Any]
    figures: Mapping[str, Any]
    verdict: Mapping[str, Any]
    canary: Canary | None


def manifest(history: History, name: str) -> Manifest:
    """What current.json says while this version is in use."""
    version, promotion = history.versions[name], history.of(PROMOTED)[-1]
    candidate = canary(history)
    return Manifest(
        version=name,
        revision=version.revision,
        tag=promotion.tag,
        promoted=promotion.date,
        folder=(FOLDER / name).as_posix(),
        package=version.record.get("package", {}),  # without, the folder can't be kept
        figures=latest(history, name, "figures"),
        verdict=latest(history, name, "verdict"),
        canary=described(history, candidate) if candidate else None,
    )


def described(history: History, name: str) -> Canary:
    """The canary with this version.

    Raises:
        InputError: its tag was made by hand, without a share.
    """
    since = next(event for event in reversed(history.of(CANARY)) if event.version == name and event.given)
    share = since.note.get("share")
    if type(share) is not float:
        raise InputError(f"{since.tag} was tagged by hand, without a share: `git tag -d '{since.tag}'`")
    return Canary(name, share, since.date, (FOLDER / name).as_posix())


def canary(history: History) -> str | None:
    """The version that is a canary; one that has been promoted is none any more."""
    stack, _ = promotions(history)
    last = history.of(CANARY)[-1:]
    active = [event.version for event in last if event.given and event.version not in stack[-1:]]
    return active[0] if active else None


def promotions(history: History) -> tuple[list[str], dict[str, str]]:
    """The promoted versions, the one in use last, without those that were rolled back; and these, with the reason."""
    stack: list[str] = []
    withdrawn: dict[str, str] = {}
    for event in history.assignments:
        if _failed(event):
            withdrawn[event.version] = str(event.note.get("reason"))
        if event.stage != PROMOTED or not event.given:
            continue
        if event.note.get("action") == "rollback" and event.version in stack:
            while stack[-1] != event.version:
                withdrawn[stack.pop()] = str(event.note.get("reason"))
        else:
            stack = [name for name in stack if name != event.version] + [event.version]
        withdrawn.pop(event.version, None)  # also of a canary that failed and was asked for by name
    return stack, withdrawn


def _failed(event: Assignment) -> bool:
    return event.stage == CANARY and not event.given and event.note.get("action") == "rollback"


def latest(history: History, name: str, what: str) -> dict[str, Any]:
    """The figures or the verdict of a version, as they were last given."""
    notes = [event.note[what] for event in history.assignments if event.version == name and what in event.note]
    return notes[-1] if notes else history.versions[name].record.get(what, {})


def stage(history: History, name: str) -> str:
    """What a version is, in a word; empty where it was never promoted."""
    stack, withdrawn = promotions(history)
    if name == canary(history):
        return f"canary {described(history, name).share:.3g}"
    if name in withdrawn:
        return "rolled back"
    return PROMOTED if name in stack[-1:] else "before" if name in stack else ""
