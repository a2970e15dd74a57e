"""One run of DVC's pipeline with each stage as a cached Prefect task.

DVC plans, locks, restores and writes dvc.lock; it calls back once per stage, and there the stage becomes a task run
whose cache key is DVC's own run-cache key (command, hashes of the inputs, parameters). `refresh_cache` is DVC's "it
changed", so a Prefect hit is only possible where DVC has verified the workspace.

This is the only place that uses DVC's internals (dvc 3.67.1, pinned): the `repro_fn` argument of `Repo.reproduce`,
`_reproduce_stage`, `_get_stage_hash` and `StageCache.restore`. DVC's experiments use `repro_fn` in the same way; the
public API has no hook per stage. tests/test_flow.py holds them to what is used of them here.
"""

from __future__ import annotations

import contextvars
import json
import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dvc.exceptions import DvcException, ReproductionError
from dvc.repo import Repo
from dvc.repo.reproduce import _reproduce_stage
from dvc.stage import Stage
from dvc.stage.cache import StageCache, _can_hash, _get_stage_hash
from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE, CacheKeyFnPolicy
from prefect.runtime import flow_run, task_run
from prefect.states import Completed, Failed, State

from flows.stage import FLOW_RUN, LOG, TASK_RUN

LOGS = Path("logs")
PROGRESS = re.compile(r"\[progress\] (?P<what>\S+) (?P<done>\d+)/(?P<total>\d+)")
ERROR = re.compile(r"error: (.*)")


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
        logging.getLogger("dvc").propagate = False  # else its lines come twice: Prefect's root logger prints them too
        self.repo = Repo(_wait_for_lock=True)  # else a stage that took an hour fails if the lock is held for 3 s
        self.cache = RecordingCache(self.repo)
        self.repo.stage_cache = self.cache
        self.states: dict[str, State] = {}
        self.rows: list[dict[str, str]] = []

    def run(self, targets: list[str] | None, force: bool) -> str | None:
        """Reproduce `targets` (all stages if None); returns the failure's sentence, or None."""
        try:
            self.repo.reproduce(targets, repro_fn=self._stage, force=force)
        except ReproductionError as error:
            return str(error.__cause__ or error)
        except DvcException as error:
            return str(error)
        return None

    def _stage(self, stage: Stage, upstream: list[Stage], force: bool = False, **kwargs: Any) -> Stage | None:
        stale = force or stage.changed(allow_missing=False, upstream=upstream)
        key = self._key(stage)
        step = task(
            name=stage.name,
            task_run_name=stage.addressing,
            cache_policy=CacheKeyFnPolicy(cache_key_fn=lambda *_: key) if key else NO_CACHE,
            refresh_cache=stale,
            persist_result=True,
            result_serializer="json",
        )(self._body)
        parents = [self.states[parent.addressing] for parent in upstream if parent.addressing in self.states]
        state = step(stage, upstream, force, key, kwargs, parents, return_state=True)
        self.states[stage.addressing] = state
        row = {
            "stage": stage.addressing,
            "state": state.name or "",
            "why": "ran" if state.name == "Completed" else state.message or "unchanged",
            "key": (key or "")[:12],
        }
        self.rows.append(row)
        if state.is_failed():
            raise DvcException(state.message)
        return stage if stale else None

    def _key(self, stage: Stage) -> str | None:
        probe = self.repo.stage.load_one(stage.path, stage.name)  # a copy: hashing must not mark this stage as changed
        try:
            probe.save_deps()
        except DvcException:  # a dependency is missing: DVC says which when it runs the stage
            return None
        return _get_stage_hash(probe) if _can_hash(probe) else None

    def _body(
        self, stage: Stage, upstream: list[Stage], force: bool, key: str | None, kwargs: dict, parents: list
    ) -> dict | State:
        log = LOGS / f"{stage.addressing}.log"
        LOGS.mkdir(exist_ok=True)
        log.write_text("", encoding="utf-8")
        kwargs["run_env"] = {FLOW_RUN: str(flow_run.id), TASK_RUN: str(task_run.id), LOG: str(log.resolve())}
        try:
            with _followed(log, stage.addressing):
                ran = _reproduce_stage(stage, upstream=upstream, force=force, **kwargs)
        except DvcException as error:
            return Failed(message=_sentence(log) or str(error))
        why = "unchanged" if ran is None else "restored" if stage.addressing in self.cache.restored else "ran"
        why = f"frozen, {why}" if stage.frozen else why
        record = {"why": why, "key": key, "outs": {out.def_path: out.hash_info.value for out in stage.outs}}
        _lineage_artifact(stage, record)
        return record if why == "ran" else Completed(name="Cached", message=why, data=record)


def _lineage_artifact(stage: Stage, record: dict) -> None:
    path = next((Path(out.fs_path) for out in stage.outs if Path(out.def_path).parent.name == "lineage"), None)
    lineage = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {}
    text = json.dumps({**lineage, **record}, indent=1, sort_keys=True)
    create_markdown_artifact(key=artifact_key("lineage", stage.addressing), markdown=f"```json\n{text}\n```")


def artifact_key(*words: str) -> str:
    """An artifact key of Prefect: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower())


def _sentence(log: Path) -> str | None:
    """The stage's own words for its failure."""
    found = ERROR.findall(log.read_text(encoding="utf-8", errors="replace"))
    return "; ".join(found) or None


@contextmanager
def _followed(log: Path, address: str) -> Iterator[None]:
    """Copy the growing log into the task run's log, and its progress lines into a progress artifact."""
    logger, done = get_run_logger(), threading.Event()
    follower = threading.Thread(target=contextvars.copy_context().run, args=(_follow, log, address, logger, done))
    follower.start()
    try:
        yield
    finally:
        done.set()
        follower.join()


def _follow(log: Path, address: str, logger: Any, done: threading.Event) -> None:
    artifact, rest = None, ""
    with log.open(encoding="utf-8", errors="replace") as file:
        while True:
            last = done.wait(0.3)
            *lines, rest = (rest + file.read()).split("\n")
            for line in [*lines, rest] if last else lines:
                if line.strip():
                    logger.info(line)
                if found := PROGRESS.search(line):
                    percent = 100 * int(found["done"]) / int(found["total"])
                    if artifact is None:
                        key = artifact_key("progress", address)
                        artifact = create_progress_artifact(progress=percent, key=key, description=found["what"])
                    else:
                        update_progress_artifact(artifact, progress=percent)
            if last:
                return
