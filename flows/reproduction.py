"""One run of DVC's pipeline with each stage as a cached Prefect task; independent stages run side by side.

DVC plans, locks, restores and writes dvc.lock (`flows.dvc_internals`). A stage becomes a task run whose cache key is
DVC's own run-cache key (command, hashes of the inputs, parameters). Only DVC says whether a stage is up to date, since
it alone looks at the workspace: such a task run ends as Cached with DVC's reason. What has to run is started by this
thread in the order of `tasks.runtime.order`, each stage in a thread of Prefect's.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from dvc.exceptions import DvcException
from dvc.lock import LockError
from dvc.stage import Stage
from prefect import Task, get_run_logger, task
from prefect.cache_policies import NO_CACHE, CacheKeyFnPolicy
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run, task_run
from prefect.states import Completed, Failed, State

from flows import following, processes
from flows.dvc_internals import Project
from flows.foresight import Foresight
from flows.stage import FLOW_RUN, LOG, TASK_RUN
from tasks.algorithms.errors import InputError
from tasks.parameters import preflight, schema
from tasks.runtime import estimates, lineage, locks, mend, warm
from tasks.runtime.order import MOST, Order

LOGS = Path("logs")
GRACE = 15.0
"""Seconds that a stage gets to put its previous outputs back when the flow is ended."""


class Reproduction:
    """`dvc repro` with Prefect around every stage.

    Attributes:
        rows: one per stage that was reached: stage, state, why, key; seconds of what ran (`_figures`).
    """

    def __init__(self) -> None:
        self.project = Project()
        self.states: dict[str, State] = {}
        self.results: dict[str, str] = {}
        self.rows: list[dict[str, Any]] = []
        self.began = 0.0
        self.begun: dict[str, float] = {}
        self.ended: dict[str, float] = {}
        self.foresight: Foresight | None = None
        self.failure: str | None = None
        self.stopped = threading.Event()
        self.warm = warm.Server()
        self.mended: list[str] = []
        self.keys: dict[str, str | None] = {}
        self.open = contextlib.ExitStack()
        self.looked = False

    def __enter__(self) -> Reproduction:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the folder to others, and end what runs for the stages."""
        self.warm.close()
        self.open.close()

    def look(self, targets: list[str] | None, force: bool) -> None:
        """Take the folder, mend, plan `targets` (all stages if None), and see what is up to date.

        It needs no flow run, so it can be done while a server starts. What hinders it is what `run` then fails with.
        """
        self.looked = True
        try:
            self.open.enter_context(locks.held(locks.FLOW, "another flow already runs in this folder"))
            self.mended = _mend()
            if found := locks.holder(locks.DVC_LOCK):
                _logger().warning("waiting for DVC's lock, which is held by %s", found)
            self.open.enter_context(self.project.planned(targets))
            stale: set[str] = set()
            for stage, upstream in self.project.plan.items():
                below = any(other.addressing in stale for other in upstream)
                if force or below or self.project.changed(stage):
                    stale.add(stage.addressing)
                else:
                    self.keys[stage.addressing] = self.project.key(stage, False)
        except (DvcException, InputError) as error:
            self.failure = _line(error)

    def run(self, targets: list[str] | None, force: bool) -> str | None:
        """Reproduce `targets` (all stages if None); returns the failure's sentence, or None."""
        self.began = time.monotonic()
        try:
            with self:
                if not self.looked:
                    self.look(targets, force)
                for sentence in self.mended:
                    get_run_logger().warning("%s", sentence)
                if self.failure is None:
                    self._reproduce(force)
        except (DvcException, InputError) as error:
            return _line(error)
        return self.failure

    def _reproduce(self, force: bool) -> None:
        """Bring the planned stages up to date; what is already, first."""
        plan = self.project.plan
        stale = {stage.addressing: stage for stage in plan if stage.addressing not in self.keys}
        for stage in plan:
            if stage.addressing in self.keys:
                self._cached(stage, self.keys[stage.addressing], force)
        if not stale:
            return
        seconds = self._seconds(stale)
        waits_for = {name: [other.addressing for other in plan[stage]] for name, stage in stale.items()}
        alone = [name for name, stage in stale.items() if (stage.meta or {}).get("alone")]
        cores = len(os.sched_getaffinity(0))
        order = Order(waits_for, seconds, alone, 1, cores)
        self.foresight = Foresight(order)
        with self.project.unlocked():
            self._side_by_side(order, stale, force)

    def _side_by_side(self, order: Order, stages: dict[str, Stage], force: bool) -> None:
        """Start what may start, wait for an end, and so on; a failure lets end what runs, a signal ends it."""
        ends: queue.SimpleQueue[tuple[str, PrefectFuture]] = queue.SimpleQueue()
        fixed = False
        try:
            while True:
                if not fixed and not order.running:
                    fixed = self._widen(order)
                while self.failure is None and (started := order.next()):
                    self._start(stages[started[0]], started[1], force, ends, order)
                if not order.running:
                    break
                self.foresight.show()
                with contextlib.suppress(queue.Empty):
                    name, future = ends.get(timeout=1)
                    future.wait()
                    order.end(name)
                    self._end(stages[name], future.state)
            self.foresight.show(last=self.failure is None)
        except BaseException:
            self._end_all(len(order.running), ends)
            raise

    def _seconds(self, stale: dict[str, Stage]) -> dict[str, float]:
        """What each stage will take, as far as that can be told."""
        cores, fetched = len(os.sched_getaffinity(0)), "fetch" not in stale
        try:
            params = schema.load()
            model = preflight.model_here(params, None if fetched else "fetch")
            threads = max(cores // estimates.workers(params, fetched), 1)
            return estimates.seconds(stale.values(), params, model, threads)
        except InputError:  # the stage says what is wrong; or it is another project's dvc.yaml
            return {name: known for name, stage in stale.items() if (known := lineage.took(stage).get("seconds"))}

    def _widen(self, order: Order) -> bool:
        """Set how many stages may run at once; returns False as long as the model's size is not known."""
        room: int | None = order.cores
        fetched = "fetch" not in order.waiting and "fetch" not in order.running
        with contextlib.suppress(InputError):  # the stage says what is wrong; or it is another project's dvc.yaml
            room = preflight.at_once(schema.load(), fetched)
        order.workers = min(order.cores, MOST, room or 1)
        return room is not None

    def _start(self, stage: Stage, threads: int, force: bool, ends: queue.SimpleQueue, order: Order) -> None:
        """Make the stage a task run: in a thread where it has to run, here where nothing has changed."""
        name = stage.addressing
        try:
            with self.project.lock:
                stale = force or self.project.changed(stage)
                key = self.project.key(stage, stale)
        except DvcException as error:
            self.failure = self.failure or _line(error)
            order.end(name)
            return
        if not stale:
            self._cached(stage, key, force)
            order.end(name)
            return
        self.foresight.begin(name)
        self.begun[name] = time.monotonic()
        future = self._task(stage, True, key, force, threads).submit(wait_for=self._parents(stage))
        future.add_done_callback(lambda ended: ends.put((name, ended)))  # its state needs this thread's settings

    def _cached(self, stage: Stage, key: str | None, force: bool) -> None:
        """A stage that is up to date as a task run, in this thread."""
        state = self._task(stage, False, key, force)(return_state=True, wait_for=self._parents(stage))
        self._end(stage, state)

    def _task(self, stage: Stage, stale: bool, key: str | None, force: bool, threads: int | None = None) -> Task:
        """The stage as a task; `key` is DVC's in its run cache."""

        def body() -> str | State:
            failure = self._run(stage, force, threads) if stale else None
            return Failed(message=failure) if failure else self._record(stage, stale, key)

        return task(
            name=stage.addressing,
            task_run_name=stage.addressing,
            cache_policy=CacheKeyFnPolicy(cache_key_fn=lambda *_: key) if key else NO_CACHE,
            refresh_cache=True,  # DVC answers, and says why: a hit of Prefect's own has no message (3.8.8)
            persist_result=True,
            result_serializer="json",
        )(body)

    def _parents(self, stage: Stage) -> list[State]:
        """States of the stages before: Prefect draws an arrow from each."""
        above = [parent.addressing for parent in self.project.plan[stage]]
        return [self.states[name] for name in above if name in self.states]

    def _run(self, stage: Stage, force: bool, threads: int | None) -> str | None:
        """Let DVC run or restore the stage; returns the failure's sentence, or None."""
        log = LOGS / f"{stage.addressing}.log"
        if absent := [str(dep) for dep in stage.deps if not dep.exists and not stage.frozen]:
            # DVC would remove the stage's outputs before it finds out
            return f"{', '.join(absent)} is not there; name what is, or bring it back"
        log.parent.mkdir(parents=True, exist_ok=True)  # the address of what `dvc add` made is a path
        log.write_bytes(b"")
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        found = {FLOW_RUN: str(flow_run.id), TASK_RUN: str(task_run.id), LOG: str(log.resolve())}
        found |= {"PATH": path} | self.warm.environment()  # a stage's `python` is this one, active or not
        if threads and warm.THREADS not in os.environ:  # the user's value wins
            found[warm.THREADS] = str(threads)
        if self.stopped.is_set():
            return "not started, since the flow was ended"
        parts, name = self.foresight.parts, stage.addressing
        try:
            with following.followed(log, lambda part: parts.update({name: part})):
                self.project.reproduce(stage, force, found)
        except DvcException as error:
            return following.sentence(log) or f"{_line(error)}; all that it printed is in {log}"
        return None

    def _record(self, stage: Stage, stale: bool, key: str | None) -> str | State:
        """The task run's result: why it ended so, DVC's key, and the hashes of the outputs.

        Prefect draws an arrow from a task run to every later one that meets an object with the `id` of its result, or
        of a part of it (3.8.8). So it is one text, which is kept as long as the run.
        """
        lineage.keep(stage)  # what DVC restored came without its record, which a later stage may read
        why = "unchanged" if not stale else "restored" if stage.addressing in self.project.cache.restored else "ran"
        why = f"frozen, {why}" if stage.frozen else why
        record = {"why": why, "key": key, "outs": {out.def_path: out.hash_info.value for out in stage.outs}}
        text = self.results[stage.addressing] = json.dumps(record)
        return text if why == "ran" else Completed(name="Cached", message=why, data=text)

    def _end(self, stage: Stage, state: State) -> None:
        """Note how a stage ended; the first failure is the flow's."""
        name = stage.addressing
        self.states[name], self.ended[name] = state, time.monotonic()
        record = json.loads(self.results[name]) if state.is_completed() else {}
        why = record["why"] if record else state.message or f"stage {name} ended as {state.name}"
        ran = why == "ran"
        self.rows.append(
            {"stage": name, "state": state.name, "why": why, "key": (record.get("key") or "")[:12]}
            | (self._figures(stage) if ran else {})
            | lineage.link(stage)
        )
        if self.foresight:
            self.foresight.end(name, ran)
        if state.is_completed() or self.failure:
            return
        self.failure = why
        if others := ", ".join(self.foresight.since if self.foresight else ()):
            get_run_logger().error("%s; what runs is let end, and nothing is started: %s", why, others)

    def _figures(self, stage: Stage) -> dict[str, float]:
        """Seconds of a stage that ran: until it had its turn, starting up, computing, and all that DVC and Prefect did.

        Where a stage leaves no record of its process, all of its time counts as computing.
        """
        name = stage.addressing
        ready = max((self.ended.get(parent.addressing, 0.0) for parent in self.project.plan[stage]), default=0.0)
        whole, took = self.ended[name] - self.begun[name], lineage.took(stage)
        start_up, computing = took.get("start_up_seconds", 0.0), took.get("computing_seconds", whole)
        return {
            "waiting": max(self.begun[name] - max(ready, self.began), 0.0),
            "start_up": start_up,
            "computing": computing,
            "bookkeeping": max(whole - start_up - computing, 0.0),
            "cpu": took.get("cpu_seconds", 0.0),
        }

    def _end_all(self, count: int, ends: queue.SimpleQueue) -> None:
        """End the stages' processes in peace when the flow is ended by a signal; left alone, they would be killed."""
        self.stopped.set()
        told: set[int] = set()
        end = time.monotonic() + GRACE
        while count and time.monotonic() < end:
            for process in processes.stages():
                if process.pid not in told:
                    told.add(process.pid)
                    with contextlib.suppress(psutil.Error):
                        process.terminate()
            with contextlib.suppress(queue.Empty):
                ends.get(timeout=0.1)
                count -= 1


def _mend() -> list[str]:
    """Put right what a killed run left, and say what; where DVC is at work, its lock is waited for instead."""
    with contextlib.suppress(InputError):
        return mend.mend()
    return []


def _logger() -> logging.Logger | logging.LoggerAdapter:
    """The flow run's; Prefect's where there is none yet."""
    return get_run_logger() if flow_run.id else logging.getLogger("prefect")


def _line(error: BaseException) -> str:
    if isinstance(error, LockError) and (users := set(locks.writers().values())):
        held = " and ".join(str(user) for user in sorted(users))
        return f"another run is writing in this folder: {held}; wait for it or end it"
    return " ".join(str(error).split())
