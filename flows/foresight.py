"""The one progress artifact of a flow run: how far it is, and when it will end.

Seconds are `tasks.runtime.estimates`', of earlier runs here or of what there is to do, scaled by how this run goes.
"""

from __future__ import annotations

import time
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact

from tasks.runtime import estimates
from tasks.runtime.order import Order

KEY = "3-progress"
INTERVAL = 2.0
"""Seconds between two updates."""


class Foresight:
    """What is still to come.

    Attributes:
        parts: running stage -> the part of it that its log says is done, 0 to 1.
    """

    def __init__(self, order: Order) -> None:
        self.order, self.total = order, len(order.waiting)
        self.parts: dict[str, float] = {}
        self.started, self.shown = time.monotonic(), 0.0
        self.since: dict[str, float] = {}
        self.expected = self.took = 0.0
        self.ended = 0
        self.artifact: UUID | None = None

    def begin(self, name: str) -> None:
        """A stage starts."""
        self.since[name], self.parts[name] = time.monotonic(), 0.0

    def end(self, name: str, ran: bool) -> None:
        """A stage has ended; what was restored, or turned out to be unchanged, says nothing of this run's pace."""
        since = self.since.pop(name, None)
        self.parts.pop(name, None)
        self.ended += 1
        if ran and since is not None:
            self.expected += self.order.seconds[name]
            self.took += time.monotonic() - since

    def pace(self) -> float:
        """How many times as long as recorded the stages of this run took; 1 before the first one ended."""
        return self.took / self.expected if self.expected else 1.0

    def left(self) -> float:
        """Seconds until the flow ends."""
        now, pace = time.monotonic(), self.pace()
        done = {}
        for name, since in self.since.items():
            usual = pace * self.order.seconds[name]
            done[name] = self.parts[name] or min((now - since) / usual if usual else 1.0, 0.95)
        return self.order.left(done, pace)

    def sentence(self) -> str:
        """How far the run is, in words."""
        if self.ended == self.total:
            return f"all {self.total} stages are done"
        running = [f"{name} {self.parts[name]:.0%}" if self.parts[name] else name for name in self.since]
        words = f"{self.ended} of {self.total} stages are done"
        words += f", {' and '.join(running)} now" if running else ""
        known = self.order.known or self.expected
        return f"{words}; {estimates.about(self.left())} left" if known else f"{words}; no earlier run tells how long"

    def show(self, last: bool = False) -> None:
        """Create or update the artifact, not too often; without one, the log still has the lines."""
        now = time.monotonic()
        if not last and now - self.shown < INTERVAL:
            return
        self.shown = now
        spent = now - self.started
        percent = 100.0 if last else 100 * spent / max(spent + self.left(), 1e-9)
        try:
            if self.artifact is None:
                self.artifact = create_progress_artifact(percent, key=KEY, description=self.sentence())
            else:
                update_progress_artifact(self.artifact, percent, description=self.sentence())
        except (httpx.HTTPError, OSError) as error:
            get_run_logger().warning("the progress artifact could not be written: %s", error)
