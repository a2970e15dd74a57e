"""A stage's only view of the world: its declared inputs, its outputs, its parameters.

`execute("wanda")` does one stage of dvc.yaml: it validates params.yaml, gives `tasks.wanda.run` a `Stage`, moves the
finished outputs into place, and writes the lineage record. Names and paths come from dvc.yaml through DVC's own API;
no path is written in Python. It knows nothing of Prefect.

A long stage notes what it has finished in `Stage.journal`; after a failure or a kill the next run goes on from there.
The journal goes when the outputs are in place.

Nothing half-written: outputs are written to a scratch folder and moved when all are complete. DVC removes a stage's
outputs before it starts it, so after a failure the previous ones are checked out again from DVC's cache.

A failure that a user can mend (a full disk, too little memory, an input altered by hand) becomes an InputError: one
sentence. Any other error keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psutil
from dvc.exceptions import DvcException
from dvc.repo import Repo

from tasks.algorithms.errors import InputError
from tasks.parameters import preflight, schema
from tasks.runtime import lineage, locks, mend, processes

if TYPE_CHECKING:
    from dvc.output import Output

    from tasks.runtime.journal import Journal

SCRATCH = Path("data/.scratch")
"""Unfinished outputs; on the same file system as data/ so that moving is atomic. Git and DVC ignore it."""
JOURNALS = SCRATCH / "journal"
"""Of each stage a folder with what it had finished when it was interrupted (`tasks.runtime.journal`)."""
ANSWERS = SCRATCH / "answers"
"""Of each stage that asks a model a folder with its answers: another limit or a repetition asks for the rest alone."""
DISK = {
    errno.EACCES: "permission is denied; make it yours or change its permissions (`ls -ld`, `chmod`)",
    errno.EDQUOT: "the disk quota is used up; free some space, then run again",
    errno.EFBIG: "the largest file size allowed here is too small (`ulimit -f`); raise it, then run again",
    errno.EIO: "the disk does not work; use another one",
    errno.ENOSPC: "the disk is full; free some space, then run again",
    errno.EPERM: "it is not permitted; make it yours or change its attributes (`lsattr`, `chattr`)",
    errno.EROFS: "the folder is read-only; make it writable, or copy the project elsewhere",
}
"""What the machine can refuse any stage, and the way out; every other number would be a mistake of this project."""
TOLD = re.compile(r"(?:\(os error |\[Errno )(\d+)[)\]]")
"""An error number in the words of safetensors, tokenizers (Rust) and shutil.copytree."""
ALTERED = (
    "is not what its stage wrote, and can't be used; `edgepress mend --cache` removes every damaged copy,"
    " and `dvc repro` then restores it or makes it again"
)
OUT_OF_MEMORY = re.compile(r"can(no|')t allocate memory|out of memory|can't start new thread", re.IGNORECASE)
"""How torch, the dynamic linker and Python's threads say it."""


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
        self.everything = schema.load()
        declared = {key.split(".")[0] for dep in self.dvc.deps for key in getattr(dep, "params", ())}
        self.params = SimpleNamespace(**{key: getattr(self.everything, key) for key in sorted(declared)})
        files = [dep for dep in self.dvc.deps if not getattr(dep, "params", ())]
        self._inputs = list(dict.fromkeys(map(_relative, files)))  # one corpus may serve as two
        self.outs = [_relative(out) for out in self.dvc.outs if Path("data/lineage") not in _relative(out).parents]
        self.scratch = SCRATCH / address
        self.published: list[Path] = []

    @property
    def enabled(self) -> bool:
        """False where the stage's own section says `enabled: false`."""
        return getattr(getattr(self.params, self.name, None), "enabled", True)

    @functools.cached_property
    def journal(self) -> Journal:
        """What an interrupted run with the same inputs, parameters and code had finished, and where to note more."""
        from tasks.runtime import journal  # here, as it imports torch, which not every stage needs

        return journal.open_for(self.dvc, JOURNALS / self.address)

    @functools.cached_property
    def answers(self) -> Journal:
        """What a model answered to which request, with the same inputs and code; it stays when the stage is done."""
        from tasks.runtime import journal

        return journal.open_for(self.dvc, ANSWERS / self.address, parameters=False)

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

    def inputs_named(self, name: str) -> list[Path]:
        """The declared dependencies of this last name, in the order of dvc.yaml."""
        return [path for path in self._inputs if path.name == name]

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
            self.published.append(out)


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
    _die_with_parent(address)
    started = time.time()
    stage = None
    try:
        with locks.held(SCRATCH / f"{address}.lock", f"stage {address} is already running in this folder"):
            try:
                stage = _load(address)
                _perform(stage)
                stage.publish()
                lineage.record(stage, started=started, run_ids=run_ids or {})
                _remove(SCRATCH / address)
                _remove(JOURNALS / address)
                if "answers" in vars(stage):
                    stage.answers.flush()
            except BaseException as error:
                traceback.clear_frames(error.__traceback__)  # the model that filled the memory
                _remove(SCRATCH / address)  # first: the disk may be full
                _restore(address, stage)
                raise
    except InputError:
        raise
    except Exception as error:
        if sentence := _sentence(error, address, stage):
            raise InputError(sentence) from error
        raise


def _load(address: str) -> Stage:
    try:
        return Stage(address, Repo())
    except DvcException as error:  # no such stage, no DVC project, dvc.yaml broken
        raise InputError(" ".join(str(error).split())) from error


def _perform(stage: Stage) -> None:
    _remove(stage.scratch)  # of a run that was killed
    mend.keep_lock()
    if altered := _altered_inputs(stage):
        raise InputError(f"{' and '.join(altered)} {ALTERED}")
    preflight.check_workspace(stage.everything, stage.address)
    module = importlib.import_module(f"tasks.{stage.name}")
    if stage.enabled:
        module.run(stage)
    else:
        print(f"{stage.address}: switched off, its input is passed on")
        module.skip(stage)


def _restore(address: str, stage: Stage | None) -> None:
    """Check the previous outputs out again: DVC removed them before it started the stage, and the stage failed."""
    try:
        for out in stage.published if stage else ():  # not all are there, or not their record
            _remove(out)
        outs = Repo().stage.load_one(name=address).outs
    except DvcException:  # no such stage, or dvc.yaml is broken: nothing was removed
        return
    except (OSError, MemoryError):
        print(f"{address}: `dvc checkout` brings the previous outputs back from DVC's cache", file=sys.stderr)
        return
    for out in outs:
        if not out.hash_info or out.exists:
            continue
        if not out.use_cache:
            print(f"{out}: `git checkout -- {out}` brings the previous one back", file=sys.stderr)
            continue
        try:
            try:
                out.checkout(force=True)
            except OSError:
                _link_back(out)
        except (DvcException, OSError, MemoryError) as error:  # the cache lost it, or there is no room for a link
            why = str(error) or type(error).__name__
            print(f"{out}: `dvc checkout {out}` will bring the previous one back, now: {why}", file=sys.stderr)


def _link_back(out: Output) -> None:
    """`out.checkout` for a full disk: DVC's own first writes a file, to see which links work here."""
    content = out.get_obj()
    files = {(): out.hash_info} if content.hash_info.isdir is False else {key: found for key, _, found in content}
    for key, found in files.items():
        target = Path(out.fs_path, *key)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        os.link(out.cache.oid_to_path(found.value), target)


def _sentence(error: Exception, address: str, stage: Stage | None) -> str | None:
    """What a user can do about an error; None where only a developer can do something."""
    told = TOLD.search(str(error))
    number = int(told[1]) if told else getattr(error, "errno", None)
    if number in DISK:
        named = getattr(error, "filename2", None) or getattr(error, "filename", None)
        where = named or f"the outputs of stage {address}"
        return f"cannot read or write {where}: {DISK[number]}"
    if isinstance(error, MemoryError) or number == errno.ENOMEM or OUT_OF_MEMORY.search(str(error)):
        return (
            f"stage {address} ran out of memory; end other programs, lower its batch, length or windows,"
            " or take a smaller model"
        )
    if stage and (altered := _altered_inputs(stage)):
        what = " ".join(str(error).split())[:200]
        return f"{' and '.join(altered)} {ALTERED} ({type(error).__name__}: {what})"
    return None


def _altered_inputs(stage: Stage) -> list[str]:
    """The inputs that another stage made and that are no longer as dvc.lock has them; every byte is read.

    DVC itself doesn't look: it trusts a file whose size and time are those of its note, and its whole cache.
    """
    made = {out.fs_path: out for other in stage.dvc.repo.index.stages for out in other.outs}
    inputs = (made.get(dep.fs_path) for dep in stage.dvc.deps)
    return [
        str(out)
        for out in inputs
        if out and out.hash_info and lineage.md5(out, trust_state=False) != out.hash_info.value
    ]


def _die_with_parent(address: str) -> None:
    """End this process with DVC's: an orphan would burn CPU, and overwrite the outputs of a later run.

    Linux does that at once for a child. Where a shell that stays lies between (fish), a thread looks for DVC.

    Raises:
        InputError: DVC ended while this process was starting.
    """
    processes.die_with_parent()
    if os.environ.get("DVC_STAGE") != address or not (users := locks.users_of_dvc()):  # not started by DVC
        return
    writing = {entry.get("pid") for entry in users.get("write", {}).values()}
    above = [process for process in psutil.Process().parents() if process.pid in writing]
    if writing and not above:
        raise InputError(f"the `dvc repro` that started stage {address} has ended; run it again")
    if above:
        threading.Thread(target=_end_with, args=(above[0],), daemon=True).start()


def _end_with(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


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
