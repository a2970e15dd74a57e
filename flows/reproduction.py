"""One run of DVC's pipeline with each stage as a cached Prefect task.

DVC plans, locks, restores and writes dvc.lock; it calls back once per stage, and there the stage becomes a task run
whose cache key is DVC's own run-cache key (command, hashes of the inputs, parameters). Only DVC says whether a stage is
up to date, since it alone looks at the workspace: such a task run ends as Cached with DVC's reason.

This is the only place that uses DVC's internals (dvc 3.67.1, pinned): the `repro_fn` argument of `Repo.reproduce`,
`_reproduce_stage`, `_get_stage_hash`, `StageCache.restore`, and `modify_yaml` where dvc.lock is written. DVC's
experiments use `repro_fn` in the same way; the public API has no hook per stage. tests/flows/test_flow.py holds them to
what is used of them here.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import logging
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psutil
from dvc import dvcfile
from dvc.exceptions import DvcException, ReproductionError
from dvc.lock import LockError
from dvc.repo import Repo
from dvc.repo.reproduce import _reproduce_stage
from dvc.stage import Stage
from dvc.stage.cache import StageCache, _can_hash, _get_stage_hash
from dvc.utils.serialize import modify_yaml
from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE, CacheKeyFnPolicy
from prefect.runtime import flow_run, task_run
from prefect.states import Completed, Failed, State

from flows import stage as stage_command
from flows.stage import FLOW_RUN, LOG, TASK_RUN
from tasks.algorithms.errors import InputError
from tasks.cli import dispatch
from tasks.runtime import files, locks, mend, warm

LOGS = Path("logs")
PROGRESS = re.compile(r"\[progress\] (?P<what>.+?) (?P<done>\d+)/(?P<total>[1-9]\d*)(?= |$)")
ERROR = re.compile(rf"^{dispatch.ERROR}(.*)$", re.MULTILINE)
GRACE = 15.0
"""Seconds that a stage gets to put its previous outputs back when the flow is ended."""


class RecordingCache(StageCache):
    """DVC's run cache, which also remembers what it restored: DVC reports "ran" and "restored" alike."""

    def __init__(self, repo: Repo) -> None:
        super().__init__(repo)
        self.restored: set[str] = set()

    def restore(self, stage: Stage, **kwargs: Any) -> None:
        """Restore as DVC does, and note the stage if it worked."""
        super().restore(stage, **kwargs)
        self.restored.add(stage.addressing)


class Reproduction:
    """`dvc repro` with Prefect around every stage.

    Attributes:
        rows: one per stage that was reached: stage, state, why, key.
    """

    def __init__(self) -> None:
        _quieten()
        self.repo = Repo(_wait_for_lock=True)  # else a stage that took an hour fails if the lock is held for 3 s
        self.cache = RecordingCache(self.repo)
        self.repo.stage_cache = self.cache
        self.copies: dict[str, Stage] = {}
        self.states: dict[str, State] = {}
        self.rows: list[dict[str, str]] = []
        self.warm = warm.Server()

    def run(self, targets: list[str] | None, force: bool) -> str | None:
        """Reproduce `targets` (all stages if None); returns the failure's sentence, or None."""
        try:
            with locks.held(locks.FLOW, "another flow already runs in this folder"), _lock_written_at_once():
                _mend()
                # to hash their inputs, which must not mark the stages themselves; each alone would parse dvc.lock again
                self.copies = {copy.addressing: copy for copy in Repo().index.stages}
                if found := locks.holder(locks.DVC_LOCK):
                    get_run_logger().warning("waiting for DVC's lock, which is held by %s", found)
                self.repo.reproduce(targets, repro_fn=self._stage, force=force)
        except ReproductionError as error:
            return _line(error.__cause__ or error)
        except (DvcException, InputError) as error:
            return _line(error)
        finally:
            self.warm.close()
        return None

    def _stage(self, stage: Stage, upstream: list[Stage], force: bool = False, **kwargs: Any) -> Stage | None:
        stale = force or stage.changed(allow_missing=False, upstream=upstream)
        key = self._key(stage)

        def body(parents: list[State]) -> dict | State:  # Prefect draws an arrow from each parent
            failure = self._run(stage, upstream=upstream, force=force, **kwargs) if stale else None
            return Failed(message=failure) if failure else self._record(stage, stale, key)

        step = task(
            name=stage.name,
            task_run_name=stage.addressing,
            cache_policy=CacheKeyFnPolicy(cache_key_fn=lambda *_: key) if key else NO_CACHE,
            refresh_cache=True,  # DVC answers, and says why: a hit of Prefect's own has no message (3.8.8)
            persist_result=True,
            result_serializer="json",
        )(body)
        parents = [self.states[parent.addressing] for parent in upstream if parent.addressing in self.states]
        state = self.states[stage.addressing] = step(parents, return_state=True)
        why = "ran" if state.name == "Completed" else state.message or ""
        self.rows.append({"stage": stage.addressing, "state": state.name, "why": why, "key": (key or "")[:12]})
        if not state.is_completed():
            raise DvcException(why or f"stage {stage.addressing} ended as {state.name}")
        return stage if stale else None

    def _key(self, stage: Stage) -> str | None:
        copy = self.copies[stage.addressing]
        try:
            copy.save_deps()
        except DvcException:  # a dependency is missing: DVC says which when it runs the stage
            return None
        return _get_stage_hash(copy) if _can_hash(copy) else None

    def _run(self, stage: Stage, **kwargs: Any) -> str | None:
        """Let DVC run or restore the stage; returns the failure's sentence, or None."""
        log = LOGS / f"{stage.addressing}.log"
        if absent := [str(dep) for dep in stage.deps if not dep.exists and not stage.frozen]:
            # DVC would remove the stage's outputs before it finds out
            return f"{', '.join(absent)} is not there; name what is, or bring it back"
        LOGS.mkdir(exist_ok=True)
        log.write_bytes(b"")
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        found = {FLOW_RUN: str(flow_run.id), TASK_RUN: str(task_run.id), LOG: str(log.resolve())}
        kwargs["run_env"] = (
            found | {"PATH": path} | self.warm.environment()
        )  # a stage's `python` is this one, active or not
        try:
            with _followed(log, stage.addressing), _ended_with_flow():
                _reproduce_stage(stage, **kwargs)
        except DvcException as error:
            return _sentence(log) or f"{_line(error)}; all that it printed is in {log}"
        return None

    def _record(self, stage: Stage, stale: bool, key: str | None) -> dict | State:
        why = "unchanged" if not stale else "restored" if stage.addressing in self.cache.restored else "ran"
        why = f"frozen, {why}" if stage.frozen else why
        record = {"why": why, "key": key, "outs": {out.def_path: out.hash_info.value for out in stage.outs}}
        _lineage_artifact(stage, record)
        return record if why == "ran" else Completed(name="Cached", message=why, data=record)


def _lineage_artifact(stage: Stage, record: dict) -> None:
    path = next((Path(out.fs_path) for out in stage.outs if Path(out.def_path).parent.name == "lineage"), None)
    lineage = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {}
    text = json.dumps({**lineage, **record}, indent=1, sort_keys=True)
    key = artifact_key("lineage", stage.addressing)
    what = f"who made the outputs of {stage.addressing}, from what and when"
    create_markdown_artifact(f"```json\n{text}\n```", key=key, description=what)


def artifact_key(*words: str) -> str:
    """An artifact key of Prefect: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower())


def _quieten() -> None:
    """Of DVC's own lines keep the warnings: the task runs' states say the rest, once."""
    logger = logging.getLogger("dvc")
    logger.propagate = False  # else its lines come twice: Prefect's root logger prints them too
    logger.setLevel(logging.WARNING)
    for name, known in (("dvc.repo.reproduce", "is frozen"), ("prefect.task_runs", "Task run failed with state")):
        logging.getLogger(name).addFilter(lambda record, known=known: known not in str(record.msg))


def _mend() -> None:
    """Put right what a killed run left; where DVC is at work, its lock is waited for instead."""
    with contextlib.suppress(InputError):
        for sentence in mend.mend():
            get_run_logger().warning("%s", sentence)


@contextlib.contextmanager
def _lock_written_at_once() -> Iterator[None]:
    """DVC writes dvc.lock in place (3.67.1), for half a second per stage: let it write a copy that takes its place."""

    @contextlib.contextmanager
    def modify(path: str, fs: Any = None) -> Iterator[dict]:
        with files.replacing(Path(path), Path(".dvc/tmp")) as unfinished:
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(path, unfinished)
            with modify_yaml(unfinished) as content:
                yield content

    dvcfile.modify_yaml = modify
    try:
        yield
    finally:
        dvcfile.modify_yaml = modify_yaml


def _line(error: BaseException) -> str:
    if isinstance(error, LockError) and (users := set(locks.writers().values())):
        held = " and ".join(str(user) for user in sorted(users))
        return f"another run is writing in this folder: {held}; wait for it or end it"
    return " ".join(str(error).split())


def _sentence(log: Path) -> str | None:
    """The stage's own words for its failure."""
    found = ERROR.findall(log.read_text(encoding="utf-8", errors="replace"))
    return "; ".join(found) or None


@contextlib.contextmanager
def _ended_with_flow() -> Iterator[None]:
    """End the stage's process in peace when the flow is ended by a signal; left alone, it would be killed."""
    try:
        yield
    except DvcException:
        raise
    except BaseException:
        stages = [child for child in psutil.Process().children() if _is_stage(child)]
        for child in stages:
            child.terminate()
        psutil.wait_procs(stages, timeout=GRACE)
        raise


def _is_stage(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return any(stage_command.__name__ in word for word in process.cmdline())
    return False


@contextlib.contextmanager
def _followed(log: Path, address: str) -> Iterator[None]:
    """Copy the growing log into the task run's log, and its progress lines into a progress artifact."""
    done = threading.Event()
    follower = threading.Thread(target=contextvars.copy_context().run, args=(_follow, log, address, done))
    follower.start()
    try:
        yield
    finally:
        done.set()
        follower.join()


def _follow(log: Path, address: str, done: threading.Event) -> None:
    logger, artifact, rest = get_run_logger(), None, b""
    with log.open("rb") as file:
        while True:
            last = done.wait(0.3)
            *lines, rest = (rest + file.read()).split(b"\n")
            percent, what = None, ""
            for raw in [*lines, rest] if last else lines:
                line = raw.rstrip(b"\r").rpartition(b"\r")[2].decode("utf-8", "replace")  # a bar's last state
                if line.strip():
                    logger.info(line)
                if found := PROGRESS.search(line):
                    percent, what = 100 * int(found["done"]) / int(found["total"]), found["what"]
            if percent is not None:
                artifact = _show_progress(artifact, address, percent, what)
            if last:
                return


def _show_progress(artifact: UUID | None, address: str, percent: float, what: str) -> UUID | None:
    """Create or update the task run's progress artifact; without one, the log still has the line."""
    try:
        if artifact is None:
            return create_progress_artifact(percent, key=artifact_key("progress", address), description=what)
        return update_progress_artifact(artifact, percent, description=what)
    except (httpx.HTTPError, OSError) as error:
        get_run_logger().warning("the progress artifact could not be written: %s", error)
        return artifact
