"""What was edited while a stage ran: its inputs, code and parameters as they were when it began, and as they are now.

DVC (3.67.1) reads them a second time when the stage's process has ended, and notes what it finds then as what made the
outputs, in dvc.lock and in its run cache. So a stage compares before it publishes, and once more as its last act. What
is edited between that and DVC's second look (tenths of a second) can't be refused any more: every stage leaves a claim,
what it was made from, and whoever comes next compares dvc.lock with it. The next stage refuses the outputs;
`edgepress mend`, and the flow at its start, make DVC forget them.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dvc.exceptions import DvcException
from dvc.stage.cache import _can_hash, _get_stage_hash

from tasks.parameters import parameter_file
from tasks.runtime import code, files, lineage

if TYPE_CHECKING:
    from dvc.output import Output
    from dvc.repo import Repo
    from dvc.stage import Stage as DvcStage

CLAIMS = Path(".dvc/tmp/claims")
"""Of each stage that DVC has yet to note: what its outputs were made from."""

Written = dict[str, tuple[int, int, int]]
"""File -> when it was written (ns), which one it is, its bytes: what any edit changes, also one that is taken back."""


class Start:
    """What a stage's result depends on, as it is when the stage begins.

    Attributes:
        identity: hashes of the inputs, code included, parameters, versions of libraries (`lineage.identity`).
    """

    def __init__(self, stage: DvcStage) -> None:
        self.stage = stage
        self.looks = _looks(stage)
        self.written = {name: look() for name, look in self.looks.items()}  # first: an edit now is seen later
        self.identity: dict[str, Any] = lineage.identity(stage)

    def inputs_are_same(self) -> bool:
        """Whether no input was written since, be it with the same bytes: what was read meanwhile nobody knows."""
        return not any(self._rewritten())

    def edited(self) -> list[str]:
        """What changed since, each in words."""
        inputs = [f"{name} was written" for name in self._rewritten()]
        return [*inputs, *_differences(self.identity["parameters"], lineage.parameters(self.stage), "was", "is now")]

    def _rewritten(self) -> Iterator[str]:
        return (name for name, look in self.looks.items() if look() != self.written[name])


def _looks(stage: DvcStage) -> dict[str, Callable[[], Written]]:
    """Name of an input, or of a file of the stage's code -> what looks how it is written now."""
    root = Path(stage.repo.root_dir)
    modules = code.closure(root / f"tasks/{stage.name.partition('@')[0]}.py", root) if code.listed(stage) else []
    looks = {lineage.name(dep): functools.partial(_written, dep) for dep in lineage.inputs(stage)}
    return looks | {name: functools.partial(_stat, [root / name]) for name in modules}


def _written(item: Output) -> Written:
    return _stat(item.dvcignore.find(item.fs, item.fs_path) if os.path.isdir(item.fs_path) else [item.fs_path])


def _stat(paths: Iterable[str | Path]) -> Written:
    try:
        found = {str(path): os.stat(path) for path in paths}
    except FileNotFoundError:  # gone, or being replaced
        return {}
    return {path: (info.st_mtime_ns, info.st_ino, info.st_size) for path, info in found.items()}


def _differences(then: dict[str, Any], now: dict[str, Any], was: str, is_now: str) -> list[str]:
    """A whole section may be declared: what differs in it is named."""
    old, new = dict(parameter_file.flat(then)), dict(parameter_file.flat(now))
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f"{key} {was} {old.get(key)!r} and {is_now} {new.get(key)!r}" for key in keys]


class Misnoted(NamedTuple):
    """A stage whose outputs DVC noted as made from something else than they were; and what differs, in words."""

    stage: DvcStage
    differences: list[str]


def claim(start: Start) -> None:
    """Leave word of what a stage's outputs, which are in place, were made from."""
    outputs = {lineage.name(out): lineage.md5(out) for out in start.stage.outs}
    CLAIMS.mkdir(parents=True, exist_ok=True)
    said = {key: start.identity[key] for key in ("inputs", "parameters")} | {"outputs": outputs}
    files.remove_left(_claim(start.stage))  # a stage runs in one process at a time
    files.write_json(_claim(start.stage), said)


def disown(stage: DvcStage) -> None:
    """Take a stage's claim back."""
    _claim(stage).unlink(missing_ok=True)


def misnoted(repo: Repo) -> Iterator[Misnoted]:
    """The stages that dvc.lock says something else of than they claimed; a claim that DVC noted rightly is removed."""
    for path in sorted(CLAIMS.glob("*.json")):
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            stage = lineage.stage_of(repo, path.stem)
            outputs = {lineage.name(out): out.hash_info.value for out in stage.outs}
            if outputs != said["outputs"]:  # DVC didn't note these outputs, or not yet
                continue
            differences = list(_against_lock(stage, said))
        except (DvcException, OSError, ValueError, LookupError, TypeError):  # no stage of today's dvc.yaml
            continue
        if differences:
            yield Misnoted(stage, differences)
        else:
            path.unlink(missing_ok=True)


def forget(stage: DvcStage) -> None:
    """Make DVC's run cache forget what it noted of a stage, and end the claim; dvc.lock is the caller's."""
    if _can_hash(stage):
        shutil.rmtree(stage.repo.stage_cache._get_cache_dir(_get_stage_hash(stage)), ignore_errors=True)
    disown(stage)


def _against_lock(stage: DvcStage, said: dict[str, Any]) -> Iterator[str]:
    locked = {lineage.name(dep): dep.hash_info.value for dep in lineage.inputs(stage)}
    yield from (f"{name} was another one" for name in locked if locked[name] != said["inputs"].get(name))
    yield from _differences(said["parameters"], lineage.locked_parameters(stage), "was", "is noted as")


def _claim(stage: DvcStage) -> Path:
    return CLAIMS / f"{stage.addressing}.json"
