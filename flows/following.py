"""The log of a stage that runs: its lines become the task run's, its progress a part of what the flow shows."""

from __future__ import annotations

import contextlib
import contextvars
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from prefect import get_run_logger

from tasks.cli import dispatch

PROGRESS = re.compile(r"\[progress\] (?P<what>.+?) (?P<done>\d+)/(?P<total>[1-9]\d*)(?= |$)")
ERROR = re.compile(rf"^{dispatch.ERROR}(.*)$", re.MULTILINE)


def sentence(log: Path) -> str | None:
    """The stage's own words for its failure."""
    found = ERROR.findall(log.read_text(encoding="utf-8", errors="replace"))
    return "; ".join(found) or None


@contextlib.contextmanager
def followed(log: Path, show: Callable[[float], None]) -> Iterator[None]:
    """Copy the growing log into the task run's log.

    Args:
        show: gets the part that is done, 0 to 1, whenever a line tells it.
    """
    done = threading.Event()
    follower = threading.Thread(target=contextvars.copy_context().run, args=(_follow, log, show, done))
    follower.start()
    try:
        yield
    finally:
        done.set()
        follower.join()


def _follow(log: Path, show: Callable[[float], None], done: threading.Event) -> None:
    logger, rest = get_run_logger(), b""
    with log.open("rb") as file:
        while True:
            last = done.wait(0.3)
            *lines, rest = (rest + file.read()).split(b"\n")
            part = None
            for raw in [*lines, rest] if last else lines:
                line = raw.rstrip(b"\r").rpartition(b"\r")[2].decode("utf-8", "replace")  # a bar's last state
                if line.strip():
                    logger.info(line)
                if found := PROGRESS.search(line):
                    part = int(found["done"]) / int(found["total"])
            if part is not None:
                show(part)
            if last:
                return
