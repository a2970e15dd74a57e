"""Which stage starts next, beside which others, with how many threads, and how long all will take.

It knows the graph and seconds, nothing of DVC or Prefect: so the same rules start stages and foresee their end.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping

MOST = 4
"""Stages at once: a fifth would only share the cores and the memory with the others."""


class Order:
    """The stages that may still have to run, and those that run now.

    Args:
        upstream: stage -> the stages that it waits for, in the order of the plan; ones that are not in it are done.
        seconds: what each stage took when it last ran, where that is known.
        alone: stages beside which none may run, as they measure time.
        workers: stages at once.
        cores: that this process may use.
    """

    def __init__(
        self,
        upstream: Mapping[str, Collection[str]],
        seconds: Mapping[str, float],
        alone: Collection[str],
        workers: int,
        cores: int,
    ) -> None:
        self.waiting = {name: set(needs) & upstream.keys() for name, needs in upstream.items()}
        known = [seconds[name] for name in upstream if name in seconds]
        self.known = bool(known)
        usual = sum(known) / len(known) if known else 1.0
        self.seconds = {name: seconds.get(name, usual) for name in upstream}
        self.alone, self.workers, self.cores = set(alone), workers, cores
        self.running: set[str] = set()
        self.path = self._longest_paths()

    def _longest_paths(self) -> dict[str, float]:
        """Stage -> seconds from its start to the end of the plan, at least."""
        longest: dict[str, float] = {}
        for name in reversed(self.waiting):  # a plan lists a stage after all that it waits for
            after = [longest[other] for other, needs in self.waiting.items() if name in needs]
            longest[name] = self.seconds[name] + max(after, default=0.0)
        return longest

    def ready(self) -> list[str]:
        """Stages that wait for nothing, the one on the longest path first; what runs alone comes last."""
        found = [name for name, needs in self.waiting.items() if not needs]
        return sorted(found, key=lambda name: (name in self.alone, -self.path[name]))

    def next(self) -> tuple[str, int] | None:
        """Take the stage that starts now, and its number of threads; None while nothing may start."""
        ready = self.ready()
        if not ready or len(self.running) >= self.workers or self.running & self.alone:
            return None
        name = ready[0]
        if name in self.alone and self.running:
            return None
        share = self.cores // self.workers
        threads = self.cores if name in self.alone or not (self.running or ready[1:]) else max(share, 1)
        del self.waiting[name]
        self.running.add(name)
        return name, threads

    def end(self, name: str) -> None:
        """A stage is done: others may no longer have to wait for it."""
        self.running.discard(name)
        for needs in self.waiting.values():
            needs.discard(name)

    def left(self, done: Mapping[str, float], pace: float = 1.0) -> float:
        """Seconds until the last stage ends.

        Args:
            done: running stage -> the part of it that is done, 0 to 1.
            pace: how many times as long as before a stage takes in this run.
        """
        rest = copy.copy(self)
        rest.running, rest.waiting = set(self.running), {name: set(needs) for name, needs in self.waiting.items()}
        ends = {name: pace * self.seconds[name] * (1 - done.get(name, 0.0)) for name in rest.running}
        now = 0.0
        while True:
            while started := rest.next():
                ends[started[0]] = now + pace * self.seconds[started[0]]
            if not ends:
                return now
            name = min(ends, key=lambda other: ends[other])
            now = max(now, ends.pop(name))
            rest.end(name)
