"""The registry's events as git tags, in GTO's format: which commit is which version, which version is in which stage.

`edgepress@v0.0.1` registers a version at a commit, `edgepress#prod#2` assigns the stage `prod` to the version of its
commit, `edgepress#canary!#3` ends an assignment; each tag's message is a JSON object. Tags travel with `git push
--tags`, keep their commit and so its dvc.lock from git's own clean-up, and GTO's tools read them (`gto show`).

Assignments are ordered by the counter in the tag's name, where GTO goes by the tag's time: two of one second, or a
clock that was set back, would otherwise give another order. It knows nothing of packages, and moves no branch or index.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gto.api
import semver
from gto.constants import Action
from gto.exceptions import GTOException
from gto.tag import find, parse_name
from scmrepo.exceptions import SCMError
from scmrepo.git import Git

from tasks.algorithms.errors import InputError
from tasks.runtime import git, locks

ARTIFACT = "edgepress"
PROMOTED = "prod"
"""The stage of the version that is in use."""
CANARY = "canary"
"""The stage of a candidate that has a share of the requests."""
LOCK = "edgepress-registry.lock"
"""In git's folder, since all worktrees of a repository have the same tags."""


@dataclass(frozen=True)
class Version:
    """A registered version.

    Attributes:
        name: "v0.0.1".
        revision: the commit, 40 hex digits.
        date: of the registration, ISO 8601.
        record: the tag's message: package (path, md5, bytes, files), figures, verdict.
    """

    name: str
    revision: str
    date: str
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Assignment:
    """A stage was given to a version, or taken from it.

    Attributes:
        number: the counter of the tag's name, rising over all stages.
        tag: "edgepress#prod#2".
        given: False where the stage was taken.
        note: the tag's message: action, and what belongs to it.
    """

    number: int
    tag: str
    stage: str
    version: str
    given: bool
    date: str
    note: Mapping[str, Any]


@dataclass(frozen=True)
class History:
    """All versions by rising number, all assignments in their order, and the last number that was ever given."""

    versions: Mapping[str, Version]
    assignments: tuple[Assignment, ...]
    last: str | None

    def at(self, revision: str) -> Version | None:
        """The version of a commit."""
        return next((version for version in self.versions.values() if version.revision == revision), None)

    def following(self) -> str:
        """The name of the next version."""
        return f"v{_number(self.last).bump_patch()}" if self.last else "v0.0.1"

    def of(self, stage: str) -> list[Assignment]:
        """The assignments of a stage."""
        return [each for each in self.assignments if each.stage == stage]


def read(root: Path) -> History:
    """The history of the git repository of a folder.

    Raises:
        InputError: it is in no git repository.
    """
    with _git(root) as scm:
        tags = find(scm=scm, name=ARTIFACT)
    parsed = [(tag, parse_name(tag.name)) for tag in tags]
    gone = {name["version"] for _, name in parsed if name["action"] == Action.DEREGISTER}
    versions = {
        name["version"]: Version(name["version"], tag.target, _date(tag), _message(tag))
        for tag, name in parsed
        if name["action"] == Action.REGISTER and name["version"] not in gone
    }
    ordered = dict(sorted(versions.items(), key=lambda item: _number(item[0])))
    names = {version.revision: name for name, version in ordered.items()}
    assignments = [
        Assignment(
            name["counter"],
            tag.name,
            name["stage"],
            names[tag.target],
            name["action"] == Action.ASSIGN,
            _date(tag),
            _message(tag),
        )
        for tag, name in parsed
        if name["action"] in (Action.ASSIGN, Action.UNASSIGN) and "counter" in name and tag.target in names
    ]
    last = max({*versions, *gone}, key=_number, default=None)
    return History(ordered, tuple(sorted(assignments, key=lambda each: each.number)), last)


def register(root: Path, name: str, revision: str, record: Mapping[str, Any]) -> None:
    """Register a version at a commit.

    Raises:
        InputError: git or GTO refuses.
    """
    with _refusals():
        gto.api.register(str(root), ARTIFACT, revision, version=name, message=_text(record), **_author(root))


def assign(root: Path, version: str, stage: str, note: Mapping[str, Any]) -> None:
    """Give a stage to a registered version, also where it has it.

    Raises:
        InputError: git or GTO refuses.
    """
    with _refusals():
        gto.api.assign(str(root), ARTIFACT, stage, version=version, message=_text(note), force=True, **_author(root))


def unassign(root: Path, version: str, stage: str, note: Mapping[str, Any]) -> None:
    """Take a stage from a version.

    Raises:
        InputError: git or GTO refuses.
    """
    with _refusals():
        gto.api.unassign(
            str(root), ARTIFACT, version=version, stage=stage, message=_text(note), force=True, **_author(root)
        )


def _author(root: Path) -> dict[str, str]:
    """Who makes a tag, as git says it: pygit2 doesn't read all that git does, and knows nobody where git knows none."""
    who = git.identity(root)
    return {"author": who["NAME"], "author_email": who["EMAIL"]}


def resolve(root: Path, revision: str) -> str:
    """The commit that a branch, tag, ref or abbreviated hash names, 40 hex digits.

    Raises:
        InputError: there is none.
    """
    with _git(root) as scm:
        try:
            return scm.resolve_commit(scm.resolve_rev(revision)).hexsha
        except (SCMError, AttributeError) as error:  # AttributeError: it is a file or a tree (scmrepo 3.6.2)
            raise InputError(
                f"{revision!r} is no version, folder or git revision here; `list` shows the versions"
            ) from error


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the registry against other processes, whichever worktree they work in; waits for them."""
    with _git(root) as scm:
        folder = Path(scm.dulwich.repo.commondir())
    with locks.held(folder / LOCK, "the registry is in use", wait=True):
        for stale in (folder / "refs/tags").glob(f"{ARTIFACT}[@#]*.lock"):
            stale.unlink()  # git's, of a call that was killed: only the registry writes these tags, one at a time
        yield


@contextlib.contextmanager
def _git(root: Path) -> Iterator[Git]:
    try:
        scm = Git(str(root), search_parent_directories=True)
    except SCMError as error:
        raise InputError(
            f"{root.resolve()} is in no git repository: the registry keeps its versions as git tags"
        ) from error
    try:
        git.trust(root)
        yield scm
    finally:
        scm.close()


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except (GTOException, SCMError) as error:
        raise InputError(f"the tag can't be made: {' '.join(str(error).split())}") from error


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _message(tag: Any) -> dict[str, Any]:
    """What a tag says; empty for one that was made by hand."""
    try:
        content = json.loads(tag.message)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _number(version: str) -> semver.Version:
    return semver.Version.parse(version[1:])


def _date(tag: Any) -> str:
    return tag.tag_datetime.isoformat(timespec="seconds")
