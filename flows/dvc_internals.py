"""DVC's project while a flow runs its stages: planned, locked, restored and written by DVC, several commands at once.

This is the only place that uses DVC's internals (dvc 3.67.1, pinned): how `Repo.reproduce` plans and locks,
`_reproduce_stage`, `_get_stage_hash`, `StageCache.restore`, `Repo._reset`, `Stage.changed`, `load_path` where
params.yaml is read, and `modify_yaml` and `rwlock` where dvc.lock and DVC's list of readers and writers are written.
The public API has no hook per stage and runs one stage after another. tests/flows/test_dvc_internals.py holds DVC to
what is used of it here.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import dvc.dependency.param
import dvc.rwlock
import yaml
from dvc import dvcfile
from dvc.dvcfile import PROJECT_FILE
from dvc.exceptions import DvcException
from dvc.repo import Repo, lock_repo
from dvc.repo.reproduce import _reproduce_stage, collect_stages, get_active_graph, plan_repro
from dvc.rwlock import rwlock
from dvc.stage import Stage
from dvc.stage.cache import StageCache, _can_hash, _get_stage_hash
from dvc.utils.serialize import load_path, modify_yaml

from tasks.runtime import files, locks


class RecordingCache(StageCache):
    """DVC's run cache, which also remembers what it restored: DVC reports "ran" and "restored" alike."""

    def __init__(self, repo: Repo) -> None:
        super().__init__(repo)
        self.restored: set[str] = set()

    def restore(self, stage: Stage, **kwargs: Any) -> None:
        """Restore as DVC does, and note the stage if it worked."""
        super().restore(stage, **kwargs)
        self.restored.add(stage.addressing)


class Project:
    """The DVC project of the working folder.

    Attributes:
        lock: DVC's, between threads, too; everything but a stage's command needs it.
        plan: the stages to bring up to date, each after all that it waits for, with these.
    """

    def __init__(self) -> None:
        _quieten()
        self.repo = Repo(_wait_for_lock=True)  # else a stage that took an hour fails if the lock is held for 3 s
        self.cache = RecordingCache(self.repo)
        self.repo.stage_cache = self.cache
        self.lock = self.repo.lock = locks.Shared(self.repo.lock)
        self.plan: dict[Stage, list[Stage]] = {}

    @contextlib.contextmanager
    def planned(self, targets: list[str] | None) -> Iterator[None]:
        """Plan as `dvc repro` does, and hold the lock; what is written meanwhile is written for several threads.

        Raises:
            DvcException: no such stage, or dvc.yaml is broken.
        """
        replaced = (_lock_written_at_once(self.plan), _users_by_thread(), _parameters_parsed_once())
        with lock_repo(self.repo), self.repo.scm_context(), contextlib.ExitStack() as stack:
            for each in replaced:
                stack.enter_context(each)
            stages = collect_stages(self.repo, targets or [PROJECT_FILE])
            graph = get_active_graph(self.repo.index.graph)
            self.plan |= {stage: list(graph.successors(stage)) for stage in plan_repro(graph, stages)}
            # DVC forgets its index and settings after each command, without its lock. Nothing of them changes in a run.
            self.repo._reset = lambda: None
            try:
                yield
            finally:
                del self.repo._reset

    @contextlib.contextmanager
    def unlocked(self) -> Iterator[None]:
        """Within `planned`: leave the lock to whoever needs it next."""
        self.lock.unlock()
        try:
            yield
        finally:
            self.lock.lock()

    def changed(self, stage: Stage) -> bool:
        """Whether DVC would run or restore the stage; needs the lock."""
        return stage.changed(allow_missing=False, upstream=self.plan[stage])

    def reproduce(self, stage: Stage, force: bool, environment: dict[str, str]) -> None:
        """Let DVC restore the stage, or run its command with these variables; takes the lock but for the command.

        Raises:
            DvcException: the command failed, or DVC could not do its part.
        """
        stage.changed = lambda *_, **__: True  # `changed` has just said so: DVC would hash everything again
        with self.lock:
            _reproduce_stage(stage, upstream=self.plan[stage], force=force, run_env=environment, interactive=False)

    def key(self, stage: Stage, stale: bool) -> str | None:
        """DVC's key in its run cache for the inputs as they are now; None where it has none. Needs the lock."""
        looked_at = stage
        try:
            if stale:  # copies, since the stage itself must not take the hashes before it is made anew
                looked_at = copy.copy(stage)
                looked_at.deps = [copy.copy(dep) for dep in stage.deps]
                looked_at.save_deps()
            return _get_stage_hash(looked_at) if _can_hash(looked_at) else None
        except (DvcException, FileNotFoundError):  # a dependency is missing: DVC says which when it runs the stage
            return None


def _quieten() -> None:
    """Of DVC's own lines keep the warnings: the task runs' states say the rest, once."""
    logger = logging.getLogger("dvc")
    logger.propagate = False  # else its lines come twice: Prefect's root logger prints them too
    logger.setLevel(logging.WARNING)
    for name, known in (("dvc.repo.reproduce", "is frozen"), ("prefect.task_runs", "Task run failed with state")):
        logging.getLogger(name).addFilter(lambda record, known=known: known not in str(record.msg))


class _Dumper(yaml.CSafeDumper):
    """Writes YAML as DVC does, with libyaml."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(OrderedDict, lambda dumper, data: dumper.represent_dict(data.items()))
_Dumper.add_representer(type(None), lambda dumper, _: dumper.represent_scalar("tag:yaml.org,2002:null", ""))


def dumped(content: dict[str, Any]) -> str:
    """The text of a dvc.lock, byte for byte as DVC writes it."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


@contextlib.contextmanager
def _lock_written_at_once(plan: Collection[Stage] = ()) -> Iterator[None]:
    """DVC writes dvc.lock in place (3.67.1), with a parser in Python: write what takes its place, with libyaml.

    Where libyaml would write the file that is there in other bytes, DVC's own writer is left to it. DVC appends what is
    new; here that is in the order of the plan, as one stage after another would have it, whichever ended first.
    """
    old: set[str] | None = None

    @contextlib.contextmanager
    def modify(path: str, fs: Any = None) -> Iterator[dict]:
        nonlocal old
        place = Path(path)
        text = place.read_text(encoding="utf-8") if place.exists() else ""
        content = yaml.load(text, yaml.CSafeLoader) or {}
        old = set(content.get("stages", {})) if old is None else old
        with files.replacing(place, Path(".dvc/tmp")) as unfinished:
            if text and dumped(content) != text:
                unfinished.write_text(text, encoding="utf-8")
                with modify_yaml(unfinished) as slowly:
                    yield slowly
                    _in_order(slowly, plan, old)
            else:
                yield content
                _in_order(content, plan, old)
                unfinished.write_text(dumped(content), encoding="utf-8")

    before, dvcfile.modify_yaml = dvcfile.modify_yaml, modify
    try:
        yield
    finally:
        dvcfile.modify_yaml = before


def _in_order(content: dict[str, Any], plan: Iterable[Stage], old: Collection[str]) -> None:
    """Bring the new entries of a dvc.lock, behind the old ones, into the order of the plan."""
    entries = content.get("stages", {})
    for name in [name for name in (stage.addressing for stage in plan) if name in entries and name not in old]:
        entries[name] = entries.pop(name)


@contextlib.contextmanager
def _users_by_thread() -> Iterator[None]:
    """Tell threads apart in DVC's list of readers and writers: it knows a user by process and command alone.

    Two stages that read one file would be one reader, who is gone when the first of them ends.
    """

    def named(tmp_dir: str, fs: Any, cmd: str, *rest: Any) -> contextlib.AbstractContextManager:
        thread = threading.current_thread()
        main = thread is threading.main_thread()
        return rwlock(tmp_dir, fs, cmd if main else f"{thread.name}: {cmd}", *rest)

    before, dvc.rwlock.rwlock = dvc.rwlock.rwlock, named
    try:
        yield
    finally:
        dvc.rwlock.rwlock = before


@contextlib.contextmanager
def _parameters_parsed_once() -> Iterator[None]:
    """DVC parses params.yaml three times a stage (3.67.1): let it parse a file that did not change once."""
    known: dict[tuple, Any] = {}

    def load(path: str, fs: Any, **kwargs: Any) -> Any:
        found = Path(path).stat()
        key = (path, found.st_ino, found.st_mtime_ns, found.st_size, *kwargs.items())
        if key not in known:
            known[key] = load_path(path, fs, **kwargs)
        return copy.deepcopy(known[key])

    before, dvc.dependency.param.load_path = dvc.dependency.param.load_path, load
    try:
        yield
    finally:
        dvc.dependency.param.load_path = before
