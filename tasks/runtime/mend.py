"""Put right what a kill, a full disk or a failing one left behind, so that the next run goes on.

    edgepress mend            DVC's list of readers and writers, dvc.lock, its run cache, what it noted of an edit
    edgepress mend --cache    hash every byte of DVC's cache and of the outputs, too

DVC (3.67.1) writes dvc.lock and `.dvc/tmp/rwlock` in place. A kill meanwhile leaves half of them, and then every
command fails, or it silently lacks entries. Every stage keeps a copy of dvc.lock when it starts: entries that were lost
come from it. DVC also trusts the files of its cache, which the outputs are hard links to: a bit that flips there is
never noticed, and comes back with every checkout. So damaged copies are removed here, and `dvc repro` restores or
computes what is missing. Nothing that is whole is removed, and nothing is computed here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from dvc.exceptions import DvcException
from dvc.repo import Repo

from tasks.algorithms.errors import InputError
from tasks.runtime import edits, files, git, lineage, locks

LOCK = Path("dvc.lock")
KEPT = Path("data/.scratch/dvc.lock")
"""The copy of dvc.lock that stages keep."""
BESIDE = "# beside "
"""Begins the copy's first line: after it comes git's hash of the dvc.lock of the commit on which it was kept."""
CONFLICT = b"<<<<<<< "
DAMAGED = ".damaged"
"""Ending of what is moved aside."""
GUARD = locks.DVC_USERS.with_suffix(".lock")
"""DVC holds this lock while it edits its list."""
HASH = re.compile(r"[0-9a-f]{32}(\.dir)?")
SETTLED, SETTLED_SHARED = 0.5, 60
"""Seconds in which DVC ends what it began in its run cache, many times over: here, where its lock is held and only a
night's worktree can be at it, and in a cache that other folders pull to over a network, too."""
AT_WORK = "DVC is working in this folder"


def keep_lock() -> None:
    """Keep a copy of dvc.lock: what it says now, and the entries that it lacks and had before on the same commit.

    Stages that start side by side do it one after another, so that none takes back what another one kept.
    """
    with _copy_guarded():
        files.remove_left(KEPT)
        now = _entries(LOCK)
        if now is None:
            return
        committed = _committed()
        text = f"{BESIDE}{committed}\n{_dumped(_kept(committed) | now)}"
        if not KEPT.exists() or KEPT.read_text(encoding="utf-8", errors="replace") != text:
            files.write_text(KEPT, text)


def _copy_guarded() -> contextlib.AbstractContextManager[None]:
    """Whoever writes the copy holds this."""
    return locks.held(KEPT.with_suffix(".guard.lock"), "the copy of dvc.lock is being written", wait=True)


def mend() -> list[str]:
    """Put DVC's list of readers and writers and dvc.lock right; returns a sentence for each thing that was done.

    Raises:
        InputError: DVC is working in this folder at this moment; git left its conflict marks.
    """
    refuse_conflicts()
    if not locks.DVC_LOCK.parent.is_dir():
        return []
    with locks.held(locks.DVC_LOCK, AT_WORK), locks.held(GUARD, AT_WORK):
        return [*_mend_users(), *_mend_lock(), *_mend_notes(), *_mend_runs()]


def refuse_conflicts() -> None:
    """Refuse a project in whose files git left a conflict for somebody to settle.

    Raises:
        InputError: names the file, the line, and the way out.
    """
    for path in (LOCK, Path("dvc.yaml"), Path("params.yaml")):
        lines = path.read_bytes().split(b"\n") if path.is_file() else []
        if number := next((number for number, line in enumerate(lines, 1) if line.startswith(CONFLICT)), None):
            way_out = "settle it in an editor"
            if path == LOCK:
                way_out = f"`git checkout --ours {LOCK}` (or --theirs) takes one side, and `dvc repro` makes the rest"
            raise InputError(f"{path} has git's conflict marks (line {number}): {way_out}")


def _mend_users() -> Iterator[str]:
    users = locks.users_of_dvc()
    if users is None:
        os.replace(locks.DVC_USERS, _aside(locks.DVC_USERS))
        yield f"{locks.DVC_USERS} could not be read (a kill or a full disk cut it off): it was moved aside"
    elif users and (living := locks.without_dead(users)) != {"read": {}, "write": {}} | users:
        files.write_text(locks.DVC_USERS, json.dumps(living))
        yield f"{locks.DVC_USERS} named processes that are gone: it does no more"


def _mend_lock() -> Iterator[str]:
    kept, now = _kept(_committed()), _entries(LOCK)
    if now is None and LOCK.exists():
        os.replace(LOCK, _aside(LOCK))
        yield f"{LOCK} could not be read (a kill or a full disk cut it off): it was moved to {_aside(LOCK)}"
        if not kept:
            yield f"no stage kept a copy of {LOCK}: `git checkout -- {LOCK}` brings the committed one back"
    lost = {name: entry for name, entry in kept.items() if _lost(entry, (now or {}).get(name))}
    if lost:
        files.write_text(LOCK, _dumped((now or {}) | lost))
        yield f"{LOCK} had lost {len(lost)} entries ({', '.join(sorted(lost)[:3])} …): they are back"


def _mend_notes() -> Iterator[str]:
    """Let DVC forget what it noted of stages whose inputs were edited just when they had ended."""
    if not edits.CLAIMS.is_dir():
        return
    try:
        with Repo() as repo:
            found = list(edits.misnoted(repo))
            for stage, _ in found:
                edits.forget(stage)
    except DvcException:  # dvc.yaml is broken: DVC says so when it is used
        return
    gone = {stage.addressing for stage, _ in found}
    if found:
        with _copy_guarded():
            for path, first in ((KEPT, f"{BESIDE}{_committed()}\n"), (LOCK, "")):
                left = {name: entry for name, entry in (_entries(path) or {}).items() if name not in gone}
                files.write_text(path, first + _dumped(left))
    for stage, differences in found:
        what = " and ".join(differences)
        yield f"{stage.addressing} was noted by DVC with an edit that came after it ({what}): it runs again"


def _mend_runs() -> Iterator[str]:
    """Remove what DVC (3.67.1) began in its run cache and never ended: it takes that for what a run of a stage gave.

    A folder with nothing in it makes it fail with a TypeError in each later run of that stage.
    """
    try:
        with Repo() as repo:
            runs, own = Path(repo.stage_cache.cache_dir).resolve(), Path(repo.dvc_dir).resolve()
    except (DvcException, sqlite3.Error, OSError):  # said when DVC is used
        return
    settled = SETTLED if own in runs.parents else SETTLED_SHARED
    if settled == SETTLED and any(age < settled for _, age in _begun(runs).values()):
        time.sleep(settled)
    for folder, (unfinished, age) in _begun(runs).items():
        if age < settled:
            continue
        try:
            for path in unfinished:
                path.unlink()
            if not os.listdir(folder):
                folder.rmdir()
        except OSError:  # another user's, or another process was quicker
            continue
        yield f"{folder} of DVC's run cache had something begun and never ended: it was removed"


def _begun(runs: Path) -> dict[Path, tuple[list[Path], float]]:
    """Folders of the run cache with unfinished files, or with nothing -> these files, seconds since the last write."""
    found = {}
    for folder in runs.glob("??/*"):
        with contextlib.suppress(OSError):  # another user's, or just removed
            names = os.listdir(folder)
            unfinished = [folder / name for name in names if name.endswith(".tmp")]
            if unfinished or not names:
                written = max(path.stat().st_mtime for path in (folder, *unfinished))
                found[folder] = unfinished, time.time() - written
    return found


def _kept(committed: str) -> dict[str, dict[str, Any]]:
    """The entries of the copy; none where git has put another commit's dvc.lock in place since, or this one's again.

    Args:
        committed: of `_committed`.
    """
    try:
        with KEPT.open(encoding="utf-8") as file:
            beside = file.readline().strip()
        whole = committed and LOCK.exists() and git.run(Path(), "hash-object", "--", str(LOCK)) == committed
    except (OSError, ValueError, InputError):
        return {}
    return {} if whole or beside != f"{BESIDE}{committed}".strip() else _entries(KEPT) or {}


def _committed() -> str:
    """Git's hash of dvc.lock as it is committed; empty where it isn't, and without git."""
    try:
        return git.run(Path(), "rev-parse", "--verify", "--quiet", f"HEAD:./{LOCK}")
    except (OSError, InputError):
        return ""


def _lost(kept: dict[str, Any], now: dict[str, Any] | None) -> bool:
    """Whether an entry is not there, or ends before the kept one does."""
    if now is None or kept == now:
        return now is None
    hashes = [out.get("md5") if isinstance(out, dict) else None for out in now["outs"]]
    begun = _dumped(now).rstrip().removesuffix("null").rstrip()  # a value that was cut off before it began
    return not all(map(HASH.fullmatch, map(str, hashes))) or _dumped(kept).startswith(begun)


def mend_cache() -> Iterator[str]:
    """Remove every file of DVC's cache and every output whose bytes don't have their hash; a sentence for each.

    Outputs that DVC doesn't cache are left, and the command that brings them back is named.

    Raises:
        InputError: there is no DVC project, or DVC is working in it.
    """
    try:
        with locks.held(locks.DVC_LOCK, AT_WORK), Repo() as repo:
            yield from _mend_objects(Path(repo.cache.local.path))
            yield from _mend_outputs(repo)
    except DvcException as error:
        raise InputError(" ".join(str(error).split())) from error


def _mend_objects(cache: Path) -> Iterator[str]:
    for path in sorted(cache.glob(".*.tmp")):  # of DVC's look which links work here, on a full disk (3.67.1)
        path.unlink()
        yield f"{path} was left by a run that found no room: it was removed"
    for path in sorted(cache.glob("??/*")):
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found != path.parent.name + path.name.removesuffix(".dir"):
            path.unlink()
            yield f"{path} of DVC's cache had other bytes than its name says: it was removed"


def _mend_outputs(repo: Repo) -> Iterator[str]:
    for out in (out for stage in repo.index.stages for out in stage.outs):
        if not out.hash_info or not out.exists or lineage.md5(out, trust_state=False) == out.hash_info.value:
            continue
        if out.use_cache:
            out.remove()
            yield f"{out} was not what its stage wrote: it was removed; `dvc repro` restores it or makes it again"
        else:
            yield f"{out} is not what its stage wrote: `git checkout -- {out}` brings it back"


def _entries(path: Path) -> dict[str, dict[str, Any]] | None:
    """Stage -> entry of a dvc.lock; None where there is none or it can't be read. Half of an entry is left out."""
    try:
        stages = yaml.load(path.read_bytes(), yaml.CSafeLoader).get("stages") or {}  # it has none at first
        return {name: entry for name, entry in stages.items() if _is_entry(entry)}
    except (OSError, yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError, AttributeError):
        return None


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and "cmd" in entry and isinstance(entry.get("outs"), list)


def _dumped(entries: dict[str, Any]) -> str:
    return yaml.dump({"schema": "2.0", "stages": entries}, Dumper=yaml.CSafeDumper, sort_keys=False)


def _aside(path: Path) -> Path:
    return path.with_name(path.name + DAMAGED)
