"""Who writes in this folder: locks that end with their process, and sentences that say who holds one and since when.

A lock is the kernel's (flock) on a file that says which process took it, as DVC's own is: it ends with the process,
however that ends, so a dead holder never blocks. DVC holds its lock only between stages. While a stage runs, DVC's list
of readers and writers (`.dvc/tmp/rwlock`) keeps two from the same outputs. Entries of the dead stay in it until
somebody needs their place (dvc 3.67.1), so whoever is named there has to be looked for.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import psutil

from tasks.algorithms.errors import InputError
from tasks.runtime import warm

DVC_LOCK = Path(".dvc/tmp/lock")
DVC_USERS = Path(".dvc/tmp/rwlock")
"""DVC's list of who reads and writes what: {"read": {path: [{"pid", "cmd"}]}, "write": {path: {"pid", "cmd"}}}."""

FLOW = Path("data/.scratch/flow.lock")
"""Held by the flow that runs in this folder."""


class Holder(NamedTuple):
    """A living process that holds a lock: its id, its command line, and when it took the lock, in local time."""

    pid: int
    command: str
    since: datetime

    def __str__(self) -> str:
        return f"process {self.pid} ({self.command}), since {self.since:%Y-%m-%d %H:%M:%S}"


class _Lock(Protocol):
    """A lock between processes, as DVC's own is."""

    is_locked: bool

    def lock(self) -> None: ...
    def unlock(self) -> None: ...


class Shared:
    """A lock between processes that the threads of this one take in turn, too; it stands in for DVC's.

    DVC's objects are not made for threads (3.67.1). It releases its lock exactly while a stage's command runs: with
    this one, all that DVC does itself is done by one thread at a time, and only the commands run side by side.
    """

    def __init__(self, inner: _Lock) -> None:
        self.inner, self.turn = inner, threading.Lock()

    def lock(self) -> None:
        """Wait for this process's other threads, then for other processes as the inner lock does."""
        self.turn.acquire()
        try:
            self.inner.lock()
        except BaseException:
            self.turn.release()
            raise

    def unlock(self) -> None:
        """Let other processes and threads have it."""
        try:
            self.inner.unlock()
        finally:
            self.turn.release()

    @property
    def is_locked(self) -> bool:
        """Whether a thread of this process has it."""
        return self.inner.is_locked

    def __enter__(self) -> None:
        self.lock()

    def __exit__(self, *_: object) -> None:
        self.unlock()


@contextlib.contextmanager
def held(path: Path, what: str, way_out: str = "wait for it or end it", *, wait: bool = False) -> Iterator[None]:
    """Hold the lock in this file.

    Args:
        what: what it guards, and how that reads where another process has it ("stage lora is already running").
        wait: for the other process to end, instead of an error.

    Raises:
        InputError: another process holds it; says which, and since when.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            found = holder(path)
            raise InputError(f"{what}{f': {found}' if found else ''}; {way_out}") from error
        file.truncate(0)
        file.write(f" {warm.stage_process()}\n")
        file.flush()
        yield


def holder(path: Path) -> Holder | None:
    """Who holds the lock in this file; None if it is free, or if nobody can be found who does."""
    try:
        with open(path, encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                since = datetime.fromtimestamp(os.fstat(file.fileno()).st_mtime)
                return _living(int(file.read()), since)
    except (OSError, ValueError):
        pass
    return None


def writers() -> dict[str, Holder]:
    """Path -> the living process that DVC's list names as its writer."""
    users = users_of_dvc()
    found = {path: _user(entry) for path, entry in users.get("write", {}).items()} if users else {}
    return {path: user for path, user in found.items() if user}


def users_of_dvc() -> dict[str, Any] | None:
    """DVC's list of readers and writers; empty where there is none, None where it can't be read."""
    try:
        users = json.loads(DVC_USERS.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        return None
    kinds = (users.get("read", {}), users.get("write", {})) if isinstance(users, dict) else (None,)
    return users if all(isinstance(kind, dict) for kind in kinds) else None


def without_dead(users: dict[str, Any]) -> dict[str, Any]:
    """DVC's list without the entries of processes that are gone, also where another one got their number."""
    read = {path: [entry for entry in entries if _user(entry)] for path, entries in users.get("read", {}).items()}
    write = {path: entry for path, entry in users.get("write", {}).items() if _user(entry)}
    return {"read": {path: entries for path, entries in read.items() if entries}, "write": write}


def _user(entry: Any) -> Holder | None:
    """The living process of an entry of DVC's list: of that number, and with the last of those arguments."""
    try:
        process = psutil.Process(entry["pid"])
        last = entry["cmd"].split()[-1]
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        if not last.endswith("__main__.py") and last not in " ".join(process.cmdline()):
            return None
        return _living(process.pid, datetime.fromtimestamp(process.create_time()))
    except psutil.AccessDenied:
        return Holder(entry["pid"], entry["cmd"], datetime.fromtimestamp(0))
    except (psutil.Error, LookupError, AttributeError, TypeError, ValueError):
        return None


def _living(pid: int, since: datetime) -> Holder | None:
    try:
        return Holder(pid, " ".join(psutil.Process(pid).cmdline()), since)
    except psutil.AccessDenied:
        return Holder(pid, "another user's", since)
    except (psutil.Error, ValueError):
        return None
