"""A stage's only view of the world: its declared inputs, its outputs, its parameters.

`execute("wanda")` does one stage of dvc.yaml: it validates params.yaml, gives `tasks.wanda.run` a `Stage`, moves the
finished outputs into place, and writes the lineage record. Names and paths come from dvc.yaml through DVC's own API;
no path is written in Python. It knows nothing of Prefect.

Nothing half-written: outputs are written to a scratch folder and moved when all are complete. DVC removes a stage's
outputs before it starts it, so after a failure the previous ones are checked out again from DVC's cache.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dvc.exceptions import DvcException
from dvc.repo import Repo

from tasks import lineage, params, preflight
from tasks.algorithms.errors import InputError

SCRATCH = Path("data/.scratch")
"""Unfinished outputs; on the same file system as data/ so that moving is atomic. Git and DVC ignore it."""


class Stage:
    """What `run(stage)` of a stage module gets.

    Attributes:
        name: the stage's name in dvc.yaml, without the matrix item.
        item: the matrix item (`gptq` in `evaluate@gptq`), or None.
        everything: all sections, for the checks before the stage starts; a stage computes with `params` alone.
        params: the declared sections of params.yaml, as attributes; an undeclared one is an AttributeError.
    """

    def __init__(self, address: str, repo: Repo) -> None:
        self.address = address
        self.name, _, item = address.partition("@")
        self.item = item or None
        self.dvc = repo.stage.load_one(name=address)
        self.everything = params.load()
        declared = {key.split(".")[0] for dep in self.dvc.deps for key in getattr(dep, "params", ())}
        self.params = SimpleNamespace(**{key: getattr(self.everything, key) for key in sorted(declared)})
        files = [dep for dep in self.dvc.deps if not getattr(dep, "params", ())]
        self._inputs = list(dict.fromkeys(map(_relative, files)))  # one corpus may serve as two
        self.outs = [_relative(out) for out in self.dvc.outs if Path("data/lineage") not in _relative(out).parents]
        self.scratch = SCRATCH / address

    @property
    def enabled(self) -> bool:
        """False where the stage's own section says `enabled: false`."""
        return getattr(getattr(self.params, self.name, None), "enabled", True)

    def input(self, name: str) -> Path:
        """The declared dependency whose path ends with `name` ("model", "wanda/model", "masks.safetensors").

        Raises:
            LookupError: dvc.yaml declares no such dependency for this stage, or several.
        """
        return _find(self._inputs, name, f"dependency of stage {self.address}")

    def has_input(self, name: str) -> bool:
        """Whether exactly one declared dependency ends with `name`."""
        return len(_matches(self._inputs, name)) == 1

    def inputs_below(self, folder: str) -> list[Path]:
        """The declared dependencies that lie directly in a folder of this name, in the order of dvc.yaml."""
        return [path for path in self._inputs if path.parent.name == folder]

    def output(self, name: str) -> Path:
        """Where to write the declared output whose path ends with `name`; its parent folder exists.

        Raises:
            LookupError: dvc.yaml declares no such output for this stage, or several.
        """
        path = self.scratch / _find(self.outs, name, f"output of stage {self.address}")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def pass_on(self, source: Path, target: Path) -> None:
        """Make `target` (from `output`) the same bytes as `source`, at no cost in disk (hard links where possible)."""
        if source.is_dir():
            shutil.copytree(source, target, copy_function=_link, dirs_exist_ok=True)
        else:
            _link(source, target)

    def progress(self, description: str, total: int) -> Progress:
        """A progress bar; a context manager with `update(done, **figures)`."""
        return Progress(description, total)

    def publish(self) -> None:
        """Move every output into place.

        Raises:
            RuntimeError: a declared output was not written.
        """
        missing = [str(out) for out in self.outs if not (self.scratch / out).exists()]
        if missing:
            raise RuntimeError(f"stage {self.address} did not write {', '.join(missing)}")
        for out in self.outs:
            _remove(out)
            out.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.scratch / out, out)


class Progress:
    """Progress with ETA: redrawn in place on a terminal, else a line at most every two seconds.

    A line reads `[progress] DESCRIPTION DONE/TOTAL key=value … eta=SECONDSs`: a reader of the log can follow it.
    """

    def __init__(self, description: str, total: int) -> None:
        self.description, self.total = description, total
        self.started = time.monotonic()
        self.shown = 0.0
        self.terminal = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.terminal and self.shown:
            print(file=sys.stderr)

    def update(self, done: int, **figures: float) -> None:
        """Say that `done` of `total` steps are finished; `figures` (loss=…) are shown with four digits."""
        now = time.monotonic()
        if done < self.total and now - self.shown < (0.2 if self.terminal else 2.0):
            return
        self.shown = now
        left = (now - self.started) / max(done, 1) * (self.total - done)
        shown = "".join(f" {key}={value:.4g}" for key, value in figures.items())
        line = f"[progress] {self.description} {done}/{self.total}{shown} eta={left:.0f}s"
        if self.terminal:
            print(f"\r{line}\033[K", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)


def execute(address: str, *, run_ids: dict[str, str] | None = None) -> None:
    """Run one stage of dvc.yaml in this process, as DVC's command for it.

    Args:
        address: the stage's name in dvc.yaml, `evaluate@gptq` for one item of a matrix.
        run_ids: ids of the Prefect runs it belongs to, for the lineage record.

    Raises:
        InputError: what a user can mend; the previous outputs are back in place.
    """
    _die_with_parent()
    repo = Repo()
    guard = _lock(address)
    started = time.time()
    try:
        stage = Stage(address, repo)
        _remove(stage.scratch)
        preflight.check_workspace(stage.everything, stage.address)
        module = importlib.import_module(f"tasks.{stage.name}")
        if stage.enabled:
            module.run(stage)
        else:
            print(f"{address}: switched off, its input is passed on")
            module.skip(stage)
        stage.publish()
        lineage.record(stage, started=started, run_ids=run_ids or {})
        _remove(stage.scratch)
    except BaseException as error:
        _restore(repo, address)
        if isinstance(error, OSError) and not isinstance(error, ConnectionError):
            raise InputError(_os_sentence(error)) from error
        raise
    finally:
        guard.close()


def _restore(repo: Repo, address: str) -> None:
    """Check the previous outputs out again: DVC removed them before it started the stage, and the stage failed."""
    _remove(SCRATCH / address)
    try:
        outs = repo.stage.load_one(name=address).outs
    except (DvcException, OSError):
        return
    for out in outs:
        if out.hash_info and out.use_cache and not out.exists:
            try:
                out.checkout(force=True)
            except (DvcException, OSError) as error:  # the cache lost it, or the disk is full
                print(f"{out}: the previous output could not be put back ({error})", file=sys.stderr)


def _os_sentence(error: OSError) -> str:
    where = error.filename or "an output"
    return f"cannot use {where}: {error.strerror or error}; the stage's previous outputs are back in place"


def _die_with_parent() -> None:
    """Ask Linux to end this process with DVC's: an orphan would overwrite the outputs of a later run."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL("libc.so.6").prctl(pr_set_pdeathsig, signal.SIGKILL)


def _lock(address: str) -> Any:
    """Hold the stage's own lock, for the case that an older run of it is still alive."""
    SCRATCH.mkdir(parents=True, exist_ok=True)
    guard = open(SCRATCH / f"{address}.lock", "w")  # noqa: SIM115  held until the stage ends
    try:
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        guard.close()
        raise InputError(f"stage {address} is already running in this folder; wait for it or end it") from error
    return guard


def _relative(item: Any) -> Path:
    return Path(os.path.relpath(item.fs_path))


def _matches(paths: list[Path], name: str) -> list[Path]:
    wanted = Path(name).parts
    return [path for path in paths if path.parts[-len(wanted) :] == wanted]


def _find(paths: list[Path], name: str, what: str) -> Path:
    found = _matches(paths, name)
    if len(found) != 1:
        kind = "an ambiguous" if found else "no"
        raise LookupError(f"`{name}` is {kind} {what}; dvc.yaml declares {sorted(map(str, paths))}")
    return found[0]


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
