"""This project's Prefect server: for `make ui`, and one for the time of a flow where none runs.

Prefect's own temporary server won't do (3.8.8): Ctrl-C in a terminal ends it before the flow, which then waits for
minutes for an answer, and it outlives a flow that is killed. This one ends when the process that started it does,
however that ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import psutil

from flows import processes
from flows.server import settings
from tasks.algorithms.errors import InputError
from tasks.cli import dispatch
from tasks.runtime import lean, refusals

HOST = "127.0.0.1"
LOG = "server.log"
"""In Prefect's folder: what the last temporary server said."""
ROOM = 2**20
"""Bytes; a disk with less has no room for SQLite's files."""
GRACE = 15.0
"""Seconds that a stage gets to put its previous outputs back when the server has ended."""
_started: list[subprocess.Popen] = []
"""Keeps the pipes open: their end, when this process ends, ends the servers."""


def serve(listener: socket.socket, started: Callable[[str], None], until: IO | None = None) -> None:
    """Serve API and UI on a bound socket, until a signal (KeyboardInterrupt) or the end of `until`.

    Args:
        started: called with the server's URL (without /api) when it answers.
        until: a stream; its first line lets the server open its database, its end ends it.
    """
    url = f"http://{HOST}:{listener.getsockname()[1]}"
    os.environ["PREFECT_API_URL"] = f"{url}/api"
    os.environ["PREFECT_SERVER_UI_API_URL"] = f"{url}/api"  # otherwise the browser asks port 4200 (3.8.8)

    with lean.uncollected():
        import uvicorn
        from prefect.server.api.server import create_app

        app = create_app(final=True)
    if until and not until.readline():
        return

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            started(url)

    server = Server(uvicorn.Config(app, log_level="warning"))

    def wait() -> None:
        until.read()
        server.should_exit = True

    if until:
        threading.Thread(target=wait, daemon=True).start()
    server.run(sockets=[listener])


def mend_database() -> None:
    """Move Prefect's database aside where SQLite finds it damaged: it holds the history of runs and no result.

    A server of this project that runs has it open, so this is for the moment before one starts.
    """
    path = Path(os.environ["PREFECT_HOME"]) / "prefect.db"
    if not path.exists():
        return
    try:
        with contextlib.closing(sqlite3.connect(path)) as database:
            (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError:  # locked, or not readable: the server says so itself
        return
    except sqlite3.DatabaseError as error:
        found = str(error)
    if found != "ok":
        for part in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{path}{part}", f"{path}.damaged{part}")
        print(
            f"{path} is damaged ({found}): it was moved to {path.name}.damaged, and the history of runs begins anew",
            file=sys.stderr,
        )


def new_log() -> Path:
    """Empty LOG, and make Prefect's folder where it isn't there; before Prefect, which warns at length, is imported.

    Raises:
        InputError: that folder can't be written.
    """
    log = Path(os.environ["PREFECT_HOME"]) / LOG
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
    except OSError as error:
        why = refusals.DISK.get(error.errno, error.strerror)
        raise InputError(f"cannot write {log.parent}, where Prefect keeps its state: {why}") from error
    return log


@contextlib.contextmanager
def begun() -> Iterator[subprocess.Popen]:
    """Within it `start_temporary` may start a server; its process imports Prefect meanwhile, and opens nothing yet.

    A server that was started ends with this process, no earlier: Prefect sends its last log lines and events when the
    interpreter ends. What it says goes to LOG.

    Raises:
        InputError: Prefect's folder can't be written.
    """
    with new_log().open("wb") as words:
        process = subprocess.Popen(  # in a session of its own: Ctrl-C is for the flow
            [sys.executable, "-m", "flows.server.temporary"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=words,
            text=True,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process not in _started:
            process.kill()


def start_temporary(process: subprocess.Popen) -> str:
    """Start the server of `begun`, with the project's state; returns its URL (without /api).

    Raises:
        InputError: it does not start; says why, as far as that can be known.
    """
    mend_database()
    with contextlib.suppress(BrokenPipeError):  # it has ended
        print("go", file=process.stdin, flush=True)
    if not (url := process.stdout.readline().strip()):
        raise InputError(f"the Prefect server did not start: {_why(Path(os.environ['PREFECT_HOME']) / LOG)}")
    _started.append(process)
    threading.Thread(target=_end_with, args=(process,), daemon=True).start()
    return url


def _why(log: Path) -> str:
    """Which disk is full; else the last words of a server that did not start."""
    for folder in (log.parent, Path(os.environ.get("TMPDIR") or tempfile.gettempdir())):
        if folder.is_dir() and shutil.disk_usage(folder).free < ROOM:
            return f"the disk of {folder} is full; free some space, then run again"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    return f"{last}; all that it said is in {log}"


def _end_with(server: subprocess.Popen) -> None:
    """End this process when its server was killed: Prefect would ask it again and again, for minutes (3.8.8)."""
    server.wait()
    dispatch.print_error("the flow's Prefect server has ended; run again, finished stages stay as they are")
    stages = processes.stages()
    for stage in stages:
        stage.terminate()
    psutil.wait_procs(stages, timeout=GRACE)
    os._exit(1)


if __name__ == "__main__":
    settings.apply()
    with socket.create_server((HOST, 0)) as any_port:
        serve(any_port, started=lambda url: print(url, flush=True), until=sys.stdin)
