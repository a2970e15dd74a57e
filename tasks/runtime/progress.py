"""How far a stage is: a bar on a terminal, lines that a program can read elsewhere."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path

BAR, LINE = 0.2, 2.0
"""Seconds between two states that are shown, of the bar and as lines."""
STATE = "{}.progress"
"""Name of the file with a stage's last state, by its address: {"done", "total", "left": seconds}."""


class Progress:
    """Progress with ETA; a context manager. On a terminal it is drawn by rich, in place.

    Elsewhere it is a line at most every two seconds, `[progress] DESCRIPTION DONE/TOTAL key=value … eta=SECONDSs`: a
    reader of the log can follow it. So can one of the file `kept`, as often.
    """

    def __init__(self, description: str, total: int, kept: Path | None = None) -> None:
        self.description, self.total, self.kept = description, total, kept
        self.noted = 0.0
        self.started = time.monotonic()
        self.shown = 0.0
        self.bar = _Bar(description, total) if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" else None

    def __enter__(self) -> Progress:
        self._forget()  # what a killed run left
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()
        self._forget()

    def update(self, done: int, **figures: float) -> None:
        """Say that `done` of `total` steps are finished; `figures` (loss=…) are shown with four digits."""
        now = time.monotonic()
        if done < self.total and now - self.shown < (BAR if self.bar else LINE):
            return
        self.shown = now
        left = (now - self.started) / max(done, 1) * (self.total - done)
        if done and now - self.noted >= LINE:
            self._note(now, done, left)
        shown = "".join(f" {key}={value:.4g}" for key, value in figures.items())
        if self.bar:
            self.bar.update(done, shown.lstrip())
            return
        line = f"[progress] {self.description} {done}/{self.total}{shown} eta={left:.0f}s"
        print(line, file=sys.stderr, flush=True)

    def _forget(self) -> None:
        if self.kept:
            with contextlib.suppress(OSError):
                self.kept.unlink(missing_ok=True)

    def _note(self, now: float, done: int, left: float) -> None:
        self.noted = now
        if self.kept:
            with contextlib.suppress(OSError):  # a full disk: the stage fails where it matters
                self.kept.write_text(json.dumps({"done": done, "total": self.total, "left": round(left, 1)}))


class _Bar:
    """One line of a terminal that is drawn again with each update."""

    def __init__(self, description: str, total: int) -> None:
        from rich.console import Console  # here, as only a terminal needs it
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Drawn

        self.drawn = Drawn(
            TextColumn("{task.description} {task.completed:.0f}/{task.total:.0f}", markup=False),
            BarColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[figures]}", markup=False),
            console=Console(stderr=True),
            auto_refresh=False,
            redirect_stdout=sys.stdout.isatty(),  # what is printed meanwhile appears above the bar
        )
        self.task = self.drawn.add_task(description, total=total, figures="")

    def start(self) -> None:
        self.drawn.start()

    def update(self, done: int, figures: str) -> None:
        self.drawn.update(self.task, completed=done, figures=figures, refresh=True)

    def stop(self) -> None:
        self.drawn.stop()
