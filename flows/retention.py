"""`edgepress retention [--apply]`: remove what nights leave behind and nobody needs; without --apply a dry run.

Kept are the newest nights and Prefect's runs and logs of so many days (params.yaml, nightly.retention), and whatever
DVC data the workspace, a branch, a tag, another experiment, a kept night or a kept version of the registry
(registry.keep) names. The rest of DVC's cache goes as by `dvc gc`, and with it the lineage records of this machine's
runs that made it. While a night runs, nothing is removed.

It does not touch data of promoted models, git's objects, or the workspace.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc_data.hashfile.gc import gc

from flows.server import settings
from tasks.algorithms.errors import InputError
from tasks.nightly import records, worktree
from tasks.parameters import schema
from tasks.parameters.schema import Params
from tasks.registry import overview, tags, versions
from tasks.runtime import git, lineage

PAGE = 200
REGISTRY = tuple(f"refs/tags/{tags.ARTIFACT}{mark}" for mark in "@#")
"""Tags that keep no data of a version that goes; anybody's own do."""
INTERNAL = tuple(f"refs/exps/{name}" for name in ("apply", "celery", "exec", "stash", "temp"))
"""Refs of DVC's own that name no experiment."""


class Item(NamedTuple):
    """What would go.

    Attributes:
        kind: "night", "cache", "record", "run", "log", "worktree", "version".
        what: in words.
        bytes: that it frees on disk; 0 where that is not known or not worth a word.
        remove: does it.
    """

    kind: str
    what: str
    bytes: int
    remove: Callable[[], object]


def plan(top: Path, own: Params) -> list[Item]:
    """Everything that would go, in the order in which it has to."""
    kept = own.nightly.retention
    gone = records.listing(top)[: -kept.nights]
    old = datetime.now(UTC) - timedelta(days=kept.days)
    items = [
        Item("night", night.name, 0, lambda ref=night.ref: git.run(top, "update-ref", "-d", ref)) for night in gone
    ]
    items += _versions(top, own)
    items += _cache(top, _named_commits(top, {night.ref for night in gone}, own))
    items += _logs(top, old)
    items += _worktrees(top)
    return items + (_runs(old) if settings.running_server() else [])


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--apply", action="store_true", help="remove it; without, only say what would go")


def main(given: argparse.Namespace) -> None:
    """Show, and with --apply remove.

    Raises:
        InputError: a night is at work, or DVC can't tell which data is needed.
    """
    settings.apply()
    top = worktree.root()
    own = schema.load(top / "params.yaml")
    try:
        with worktree.locked(top, wait=False):
            items = plan(top, own)
            for item in items:
                print(f"{item.kind:9} {item.bytes:>14,}  {item.what}")
                if given.apply:
                    item.remove()
    except DvcException as error:
        said = " ".join(str(error).split())
        raise InputError(f"{said}: which data it names is unknown, so nothing of the cache was removed") from error
    freed = sum(item.bytes for item in items)
    said = "gone" if given.apply else "would go; `edgepress retention --apply` removes them"
    print(f"{len(items)} things and {freed:,} bytes {said}")
    if not settings.running_server():
        print("Prefect's runs were not looked at: no server answers (`make ui` starts it)")


def _named_commits(top: Path, gone: set[str], own: Params) -> list[str]:
    """Commits whose data stays: of every ref but those of nights and versions that go."""
    staying = {version.revision for version in versions.kept(top, own.registry.keep)}
    registered = {entry["revision"] for entry in overview.versions(top)}
    form = "%(refname) %(if)%(*objectname)%(then)%(*objectname) %(*objecttype)%(else)%(objectname) %(objecttype)%(end)"
    commits = {git.run(top, "rev-parse", "HEAD"), *staying}
    for line in git.run(top, "for-each-ref", f"--format={form}", "refs").splitlines():
        ref, commit, kind = line.split()
        dropped = ref.startswith(REGISTRY) and commit in registered - staying
        if kind == "commit" and ref not in gone and not dropped and not ref.startswith(INTERNAL):
            commits.add(commit)
    return sorted(commits)


def _versions(top: Path, own: Params) -> list[Item]:
    """Folders of versions that were promoted too long ago."""
    folders = versions.prune(top, own.registry.keep, dry=True)
    sizes = {folder: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) for folder in folders}
    remove = lambda: versions.prune(top, own.registry.keep)  # noqa: E731  one call removes them all
    return [Item("version", str(folder.relative_to(top)), size, remove) for folder, size in sizes.items()]


def _cache(top: Path, commits: list[str]) -> list[Item]:
    """What none of the commits and not the workspace name: objects of DVC's cache, as one item, and records of them."""
    with Repo(str(top), _wait_for_lock=True) as repo:
        used = {found for objects in repo.used_objs(revs=commits).values() for found in objects}
        odb = repo.cache.local
    names = {found.value for found in used}
    records = [
        Item("record", str(path.relative_to(top)), path.stat().st_size, path.unlink)
        for path, entry in lineage.computed_here(top)
        if not names.issuperset(entry.get("outputs", {}).values())
    ]
    unused = [Path(odb.oid_to_path(oid)) for oid in odb.all() if oid not in names]
    size = sum(path.stat().st_size for path in unused)
    found = Item("cache", f"{len(unused)} objects of DVC's cache", size, lambda: gc(odb, used))
    return records + ([found] if unused else [])


def _logs(top: Path, old: datetime) -> list[Item]:
    files = [file for folder in (top, worktree.project(top)) for file in sorted(folder.glob("logs/*.log"))]
    return [
        Item("log", str(file.relative_to(top)), file.stat().st_size, file.unlink)
        for file in files
        if file.stat().st_mtime < old.timestamp()
    ]


def _worktrees(top: Path) -> list[Item]:
    """Worktrees whose folder is gone."""
    blocks = git.run(top, "worktree", "list", "--porcelain").split("\n\n")
    stale = [block.splitlines()[0].removeprefix("worktree ") for block in blocks if "\nprunable" in block]
    return [Item("worktree", path, 0, lambda: git.run(top, "worktree", "prune")) for path in stale]


def _runs(old: datetime) -> list[Item]:
    """Prefect's flow runs that ended before; their logs and artifacts go with them."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter

    def remove(run_id: object) -> None:
        with get_client(sync_client=True) as client:
            client.delete_flow_run(run_id)

    found: list[Item] = []
    with get_client(sync_client=True) as client:
        only = FlowRunFilter(end_time={"before_": old})
        while page := client.read_flow_runs(flow_run_filter=only, limit=PAGE, offset=len(found)):
            found += [
                Item("run", f"{run.name}, ended {run.end_time:%Y-%m-%d}", 0, lambda own=run.id: remove(own))
                for run in page
            ]
    return found
