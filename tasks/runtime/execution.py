"""Run one stage of dvc.yaml: check, compute, publish, record; and bring the previous outputs back where it fails.

`execute("wanda")` validates params.yaml, gives `tasks.wanda.run` a `Stage`, moves the finished outputs into place, and
writes the lineage record. It knows nothing of Prefect.

Nothing half-written: outputs are written to a scratch folder and moved when all are complete. DVC removes a stage's
outputs before it starts it, so after a failure the previous ones are checked out again from DVC's cache. The journal of
what was finished goes when the outputs are in place.

A failure that a user can mend (a full disk, too little memory, an input altered by hand) becomes an InputError: one
sentence. Any other error keeps its traceback.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import resource
import shutil
import sqlite3
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from dvc.exceptions import DvcException
from dvc.repo import Repo

from tasks.algorithms.errors import InputError
from tasks.parameters import parameter_file, preflight
from tasks.runtime import accelerator, code, edits, estimates, failures, lazily, lineage, locks, mend, parent, spilling
from tasks.runtime.stage import JOURNALS, SCRATCH, Stage

if TYPE_CHECKING:
    from dvc.output import Output

TOLD = ("depth_prune", "wanda", "lora")
"""Stages that say, when they end, where what they made stands against plain quantisation."""


def execute(address: str, *, run_ids: dict[str, str] | None = None) -> None:
    """Run one stage in this process, as DVC's command for it.

    Args:
        address: the stage's name in dvc.yaml, `evaluate@gptq` for one item of a matrix.
        run_ids: ids of the Prefect runs it belongs to, for the lineage record.

    Raises:
        InputError: what a user can mend; the previous outputs are back in place.
    """
    parent.end_with_it(address)
    attempt = _Attempt(address)
    try:
        with locks.held(SCRATCH / f"{address}.lock", f"stage {address} is already running in this folder"):
            attempt.make(run_ids or {})
    except InputError:
        raise
    except Exception as error:
        if attempt.stage is None:  # it didn't get as far as its lock, which nobody else holds
            attempt.restore()
        if sentence := failures.sentence(error, address, attempt.stage):
            raise InputError(sentence) from error
        raise


class _Attempt:
    """One run of a stage: how far it is, and the way back.

    Attributes:
        stage: None until it is read from dvc.yaml.
        published: the folder, once it is in place.
    """

    def __init__(self, address: str) -> None:
        self.address, self.started = address, time.time()
        self.stage: Stage | None = None
        self.published: Path | None = None

    def make(self, run_ids: dict[str, str]) -> None:
        """Make the outputs and their record; after an exception everything is as it was."""
        try:
            stage = self.stage = _load(self.address)
            spent = _perform(stage)
            _refuse_edits(stage)
            self._publish(stage)
            if stage.name == code.STAGE:  # the first of a run: from here on it is known what is to be done
                _foretell(stage)
            spent["cpu_seconds"] = _cpu_seconds()
            lineage.record(stage, started=self.started, run_ids=run_ids, spent=spent)
            edits.claim(stage.start)
            _remove(SCRATCH / self.address)
            _remove(JOURNALS / self.address)
            if "answers" in vars(stage):
                stage.answers.flush()
            _refuse_edits(stage)  # the last act: the sooner DVC looks after it, the better
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # the model that filled the memory
            _remove(SCRATCH / self.address)  # first: the disk may be full
            self.restore()
            raise

    def _publish(self, stage: Stage) -> None:
        """Move the stage's folder into place.

        Raises:
            RuntimeError: something that dvc.yaml names of it was not written.
        """
        missing = [str(path) for path in stage.expected() if not (stage.scratch / path).exists()]
        if missing:
            raise RuntimeError(f"stage {self.address} did not write {', '.join(missing)}")
        _remove(stage.folder)
        stage.folder.parent.mkdir(parents=True, exist_ok=True)
        os.replace(stage.scratch / stage.folder, stage.folder)
        self.published = stage.folder

    def restore(self) -> None:
        """Check the previous outputs out again: DVC removed them before it started the stage, and the stage failed."""
        try:
            if self.published:  # without its record
                _remove(self.published)
            if self.stage:
                edits.disown(self.stage.dvc)
            outs = self.stage.dvc.outs if self.stage else _opened_anyhow().stage.load_one(name=self.address).outs
        except DvcException:  # no such stage, or dvc.yaml is broken: nothing was removed
            return
        except (OSError, sqlite3.Error, MemoryError):
            print(f"{self.address}: `dvc checkout` brings the previous outputs back from DVC's cache", file=sys.stderr)
            return
        for out in outs:
            if out.hash_info and not out.exists:
                _bring_back(out)


def _load(address: str) -> Stage:
    try:
        repo = Repo()
        lineage.keep_inputs(lineage.stage_of(repo, address))  # before the stage looks at what it begins with
        return Stage(address, repo)
    except DvcException as error:  # no such stage, no DVC project, dvc.yaml broken
        raise InputError(parameter_file.told(error) or " ".join(str(error).split())) from error


def _opened_anyhow() -> Repo:
    """The repository, also where DVC (3.67.1) can't write the database that it opens first: with one in memory."""
    try:
        return Repo()
    except (OSError, sqlite3.Error):
        folder = tempfile.mkdtemp(dir="/dev/shm")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["DVC_SITE_CACHE_DIR"] = folder
        return Repo()


def _perform(stage: Stage) -> dict[str, float]:
    """Check, then compute; returns the seconds before and in `run`, by their names in the record."""
    _remove(stage.scratch)  # of a run that was killed
    mend.keep_lock()
    failures.refuse_misnoted(stage)
    if edited := code.changed_code(stage.dvc):
        raise InputError(f"{code.named(edited)} changed since stage {code.STAGE} listed the code; {code.WAY_OUT}")
    if altered := failures.altered_inputs(stage):
        raise InputError(f"{' and '.join(altered)} {failures.ALTERED}")
    preflight.check_workspace(stage.everything, stage.address)
    accelerator.prepare(getattr(stage.params, "device", "cpu"))
    if not stage.enabled:
        print(f"{stage.address}: switched off, its input is passed on")
    with contextlib.nullcontext() if stage.enabled else lazily.imported():
        module = importlib.import_module(f"tasks.{stage.name}")
        start_up, began = _age(), time.monotonic()
        with spilling.spilling(stage.scratch):
            (module.run if stage.enabled else module.skip)(stage)
            spent = {"start_up_seconds": start_up, "computing_seconds": time.monotonic() - began}
            if stage.enabled and stage.name in TOLD:
                with lazily.imported():  # gptqmodel takes seconds, and of small models nothing is told
                    importlib.import_module("tasks.compression.standing").tell(stage)  # by name: it shapes no artifact
    estimates.note_work(stage)
    return spent


def _foretell(stage: Stage) -> None:
    flow = locks.holder(locks.FLOW) is not None
    if told := estimates.foretell(stage.dvc.repo, flow=flow):
        print(told)


def _age() -> float:
    """Seconds since this process was started, to a hundredth; psutil's figure is a whole second's."""
    after_name = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(after_name[19]) / os.sysconf("SC_CLK_TCK")


def _cpu_seconds() -> float:
    """Of all cores, spent by this process and by children that it has waited for."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def _refuse_edits(stage: Stage) -> None:
    if edited := stage.start.edited():
        raise InputError(
            f"{' and '.join(edited)}, edited while the stage ran: what it computed is dropped, as DVC would note it as"
            " made from the edited ones; run again, and leave them until the stage has ended"
        )


def _bring_back(out: Output) -> None:
    """Check an output out, or say which command does it."""
    if not out.use_cache:
        print(f"{out}: `git checkout -- {out}` brings the previous one back", file=sys.stderr)
        return
    try:
        try:
            out.checkout(force=True)
        except (OSError, sqlite3.Error):
            _link_back(out)
    except (
        DvcException,
        OSError,
        sqlite3.Error,
        MemoryError,
    ) as error:  # the cache lost it, or there is no room for a link
        why = str(error) or type(error).__name__
        print(f"{out}: `dvc checkout {out}` will bring the previous one back, now: {why}", file=sys.stderr)


def _link_back(out: Output) -> None:
    """`out.checkout` for a full disk: DVC's own first writes a file, to see which links work here."""
    content = out.get_obj()
    hashes = {(): out.hash_info} if content.hash_info.isdir is False else {key: value for key, _, value in content}
    for key, value in hashes.items():
        target = Path(out.fs_path, *key)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        os.link(out.cache.oid_to_path(value.value), target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
