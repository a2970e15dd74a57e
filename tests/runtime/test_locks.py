"""Locks: who holds one and since when; a dead holder, or another process with its number, never counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from datetime import datetime, timedelta

import psutil
import pytest

from tasks.algorithms.errors import InputError
from tasks.runtime import locks
from tests.support.paths import ROOT


@pytest.fixture
def other(tmp_path):
    """other(code) -> a process in the folder that has printed a line after running this code, and then waits."""
    started = []

    def start(code: str) -> subprocess.Popen:
        code = textwrap.dedent(code) + "\nprint('ready', flush=True)\ninput()\n"
        process = subprocess.Popen(
            [sys.executable, "-c", code, "waits"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_who_holds_a_lock_is_said_and_a_dead_holder_frees_it(tmp_path, other):
    path = tmp_path / "lock"
    holder = other("""
        from pathlib import Path
        from tasks.runtime import locks
        held = locks.held(Path("lock"), "")
        held.__enter__()
    """)
    found = locks.holder(path)
    assert found.pid == holder.pid and "waits" in found.command
    assert timedelta() <= datetime.now() - found.since < timedelta(minutes=1)
    said = rf"(?s)it is taken: process {holder.pid} \(.*waits\), since 20.*; wait for it"
    with pytest.raises(InputError, match=said), locks.held(path, "it is taken"):
        pass
    holder.kill()
    holder.wait()
    assert locks.holder(path) is None
    with locks.held(path, "it is taken"):
        assert locks.holder(path).pid == os.getpid()
    assert locks.holder(path) is None


def test_dvcs_own_lock_is_read_as_it_writes_it(tmp_path, other):
    holder = other("""
        from dvc.lock import make_lock
        lock = make_lock("lock")
        lock.lock()
    """)
    assert locks.holder(tmp_path / "lock").pid == holder.pid


def test_only_living_users_of_dvcs_list_count(tmp_path, monkeypatch, other):
    monkeypatch.chdir(tmp_path)
    locks.DVC_USERS.parent.mkdir(parents=True)
    alive, dead = other(""), other("")
    dead.kill()
    dead.wait()
    entry = {"pid": alive.pid, "cmd": "run.py waits"}
    reused = {"pid": alive.pid, "cmd": "dvc repro report"}
    gone = {"pid": dead.pid, "cmd": "run.py waits"}
    read = {"a": [entry, gone], "b": [gone], "c": [reused]}
    locks.DVC_USERS.write_text(json.dumps({"read": read, "write": {"x": entry, "y": gone, "z": reused}}))
    assert {path: user.pid for path, user in locks.writers().items()} == {"x": alive.pid}
    assert locks.without_dead(locks.users_of_dvc()) == {"read": {"a": [entry]}, "write": {"x": entry}}


def test_a_process_that_nobody_waited_for_is_dead():
    process = subprocess.Popen([sys.executable, "-c", ""])
    end = time.monotonic() + 20
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < end:
        time.sleep(0.05)
    assert locks._user({"pid": process.pid, "cmd": "-c"}) is None
    process.wait()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"write": []}'])
def test_a_list_that_is_cut_off_is_none(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    assert locks.users_of_dvc() == {} and locks.writers() == {}
    locks.DVC_USERS.parent.mkdir(parents=True)
    locks.DVC_USERS.write_text(content)
    assert locks.users_of_dvc() is None and locks.writers() == {}


class Inner:
    """A lock between processes, as DVC's: it can't be taken twice."""

    def __init__(self, refuses: bool = False) -> None:
        self.is_locked, self.refuses = False, refuses

    def lock(self) -> None:
        assert not self.is_locked
        if self.refuses:
            raise RuntimeError("held by another process")
        self.is_locked = True

    def unlock(self) -> None:
        assert self.is_locked
        self.is_locked = False


def test_threads_take_turns_with_a_lock_between_processes() -> None:
    shared, inside, most = locks.Shared(Inner()), [], []

    def work() -> None:
        for _ in range(50):
            with shared:
                inside.append(1)
                most.append(len(inside))
                assert shared.is_locked
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 200 and max(most) == 1 and not shared.is_locked


def test_a_thread_that_is_refused_lets_the_next_one_try() -> None:
    shared = locks.Shared(Inner(refuses=True))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="another process"):
            shared.lock()
