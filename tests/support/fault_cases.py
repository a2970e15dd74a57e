"""What is disturbed call by call: a stage, `dvc repro`, a promotion, an update, a night's bookkeeping.

Each case has a project that is made once and copied for every fault, what is done to it, and what has to hold after a
fault: a sentence or success, what was there before whole, and after the next, undisturbed run what one run alone gives.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from tasks.algorithms.errors import InputError
from tasks.cli import dispatch
from tasks.nightly import newer_sources, records, worktree
from tasks.registry import signing, update, versions
from tasks.runtime import execution, failures, files, mend
from tasks.runtime import stage as stages
from tests.support import faults, random_package, toy_stages
from tests.support.faults import Call, Ended
from tests.support.nightly_project import NightlyProject
from tests.support.project import clean_environment, tiny_llama
from tests.support.registry_project import Night

PASSING = (
    ".dvc/cache/files",
    ".dvc/cache/runs",
    ".git/objects",
    ".git/logs",
    ".git/worktrees",
    ".dvc/tmp",
    "data/lineage",
    "site",
    "home",
    "data/.scratch",
)
"""Not compared byte by byte: times, and what git and DVC keep for themselves."""
LITTER = (".tmp", ".unfinished", ".update", ".old", ".export")
"""How files and folders end that are left of a write."""


class Case:
    """One thing that is disturbed.

    Args:
        folder: for the project, copied anew for each fault.
    """

    name = ""
    in_steps = False
    """Whether a failure may leave what a kill may: the next run does what is left to do."""

    def __init__(self, folder: Path) -> None:
        self.root, self.made = folder / "project", folder / "made"
        self.root.mkdir(parents=True)
        with _alone(self.root):
            self.make()
        shutil.copytree(self.root, self.made, symlinks=True)
        self.before = self.content()
        undisturbed = self.run()
        assert undisturbed.code == 0, undisturbed.said
        self.calls, self.after, self.names = undisturbed.calls, self.content(), self.files()
        assert self.before != self.after

    def make(self) -> None:
        """Make the project in the working folder."""
        raise NotImplementedError

    def do(self) -> int | None:
        """What is disturbed; returns the exit code."""
        raise NotImplementedError

    def content(self) -> Any:
        """What counts of the project: what was there before, or what comes out."""
        raise NotImplementedError

    def prepare(self) -> None:
        """What DVC does before, undisturbed."""

    def mend(self) -> None:
        """What a user does before the next run, after a kill."""

    def tidy(self) -> None:
        """What a user does where something is left of a full disk."""

    def partly(self, found: Any) -> bool:
        """Whether a kill may leave this."""
        return found in (self.before, self.after)

    def run(self, fault: str | None = None, number: int = 0) -> Ended:
        """Do it, disturbed or not."""
        with _alone(self.root):
            self.prepare()
            return faults.run(self.do, self.root, fault, number)

    def disturb(self, fault: str, number: int) -> Iterator[str]:
        """Let one call of a new copy fail; says in words what isn't as it has to be."""
        shutil.rmtree(self.root)
        shutil.copytree(self.made, self.root, symlinks=True)
        ended = self.run(fault, number)
        what = f"{self.name}: {fault} at call {number}, {ended.hit}"
        if fault != faults.KILL and not ended.told:
            yield f"{what}: {ended.code}, {ended.said[-1500:]}"
        found = self.content()
        cut = fault == faults.KILL or (self.in_steps and ended.code != 0)
        whole = found == self.after if ended.code == 0 else found in (self.before, self.after)
        if not (self.partly(found) if cut else whole):
            yield f"{what}: what was there is {found}\n{ended.said[-500:]}"
        with _alone(self.root):
            self.mend()
        again = self.run()
        if again.code != 0:
            yield f"{what}: the next run ends with {again.code}, {again.said[-1500:]}"
        elif (found := self.content()) != self.after:
            yield f"{what}: the next run gives {found}"
        if self.files() - self.names:
            with _alone(self.root):
                self.tidy()
        yield from (f"{what}: the next run leaves {name}" for name in self.files() - self.names)

    def files(self) -> set[str]:
        """Every file and folder but what git and DVC keep for themselves; what a write left, everywhere."""
        found = {path.relative_to(self.root).as_posix() for path in self.root.rglob("*")}
        return {name for name in found if not name.startswith(PASSING) or name.endswith(LITTER)}


def tree(folder: Path) -> dict[str, str]:
    """Name -> hash of every file."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()[:10] for path in found}


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """In the project's folder, with DVC's notes of files and an empty home directory below it."""
    known = {name: os.environ.get(name) for name in ("DVC_SITE_CACHE_DIR", "HOME")}
    os.environ |= {"DVC_SITE_CACHE_DIR": str(root / "site"), "HOME": str(root / "home")}
    try:
        with contextlib.chdir(root):
            yield
    finally:
        for name, value in known.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


class Stage(Case):
    """The process of a stage, as DVC starts it: its outputs are removed; it writes by Python and by Rust."""

    name = "stage"

    def make(self) -> None:
        toy_stages.create(Path())
        done = toy_stages.Toy(Path.cwd()).repro()
        assert done.returncode == 0, done.stdout
        toy_stages.Toy(Path()).set(value=2)

    def prepare(self) -> None:
        """As DVC removes outputs; the record, too."""
        shutil.rmtree("data/toy", ignore_errors=True)
        Path("data/lineage/toy.json").unlink(missing_ok=True)

    def do(self) -> int | None:
        raw = yaml.safe_load(Path("params.yaml").read_text())
        stages.schema.load = lambda: SimpleNamespace(**{name: SimpleNamespace(**part) for name, part in raw.items()})
        execution.preflight.check_workspace = lambda *_: None
        execution.preflight.model_here = lambda *_: None
        execution.parent.end_with_it = lambda _: None
        sys.modules["tasks.toy"] = SimpleNamespace(run=_write)
        try:
            execution.execute("toy")
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return 0

    def tidy(self) -> None:
        list(mend.mend_cache())

    def content(self) -> Any:
        return tree(self.root / "data/toy")

    def partly(self, found: dict[str, str]) -> bool:
        """DVC removes the outputs first, and nobody puts them back."""
        return found in ({}, self.before, self.after)


def _write(stage: stages.Stage) -> None:
    (stage.output("model") / "sub").mkdir(parents=True)
    (stage.output("model") / "sub/b").write_text("b" * 10_000)
    save_file({"a": np.arange(100)}, stage.output("model") / "weights.safetensors")
    files.write_text(stage.output("table.csv"), str(stage.params.toy.value))


class Repro(Stage):
    """`dvc repro` of that stage, with DVC's own writing and the stage's process."""

    name = "repro"
    in_steps = True  # what fails before the stage's process, or after it, is DVC's

    def prepare(self) -> None:
        """DVC does it itself."""

    def do(self) -> int | None:
        return subprocess.run([sys.executable, "-m", "dvc", "repro", "toy"], env=clean_environment()).returncode

    def mend(self) -> None:
        mend.mend()


class Promotion(Case):
    """`edgepress registry promote` of a second version."""

    name = "promotion"

    def make(self) -> None:
        night = Night(Path.cwd())
        shutil.rmtree(".git/hooks")
        night.git("config", "user.name", "t")
        night.git("config", "user.email", "t@example.org")
        for letter in "ab":
            revision = night.commit(letter)
            if letter == "a":
                versions.promote(Path(), revision)

    def do(self) -> int | None:
        return dispatch.main(["registry", "promote", "HEAD"])

    def content(self) -> Any:
        """What is in use, and its bytes."""
        current = json.loads((self.root / versions.MANIFEST).read_text())
        return current["version"], tree(self.root / current["folder"])


class Applied(Case):
    """`edgepress update apply` on a device's folder."""

    name = "update"

    def make(self) -> None:
        for name, text in (("old", "a"), ("new", "b")):
            Path(name, "sub").mkdir(parents=True)
            Path(name, "sub/same.json").write_text("{}")
            Path(name, "text.json").write_text(json.dumps([text, *range(2000)]))
            Path(name, "other.bin").write_bytes(np.random.default_rng(ord(text)).bytes(5000))
        signing.generate(Path("key"))
        update.make(Path("old"), Path("new"), ("v0.0.1", "v0.0.2"), Path("key"), Path("update.safetensors"))
        Path("device").mkdir()
        Path("old").rename("device/model")

    def do(self) -> int | None:
        return dispatch.main(
            ["update", "apply", "update.safetensors", "--public-key", "key.pub", "--folder", "device/model"]
        )

    def content(self) -> Any:
        return tree(self.root / "device/model")


class Bookkeeping(Case):
    """What a night does apart from the DAG and Prefect: worktree, sources, snapshot, record, promotion."""

    name = "night"
    in_steps = True
    first = False
    """Whether there was none before."""

    def make(self) -> None:
        project = NightlyProject(Path.cwd())
        shutil.rmtree(".git/hooks")
        project.python("-m", "dvc", "repro", "-q")
        project.commit("made")
        if not self.first:
            assert self._night("night-1") == 0
            project.weights(1.0)
            project.change({"gptq.bits": 2})
            project.commit("changed")

    def do(self) -> int | None:
        return self._night("night-2")

    def _night(self, name: str) -> int:
        try:
            top = worktree.root()
            with worktree.locked(top, wait=False):
                folder = worktree.prepare(top)
                newer_sources.bring(top, folder)
                files.write_bytes(folder / "dvc.lock", (top / "dvc.lock").read_bytes())  # in the DAG's place
                record = {"verdict": "ACCEPT", "reason": name}
                found = records.save(folder, name, worktree.snapshot(folder), record)
                versions.promote(top, found.commit, {}, record)
        except failures.REFUSED as error:  # as flows/night.py
            print(f"error: {error}", file=sys.stderr)
            return 1
        return 0

    def content(self) -> Any:
        """The nights and what they recorded, the worktree's sources, the workspace and what is promoted."""
        nights = [(night.name, night.record) for night in records.listing(self.root)]
        current = self.root / versions.MANIFEST
        promoted = json.loads(current.read_text())["package"] if current.exists() else None
        return nights, promoted, tree(self.root / "source"), tree(self.root / "data/package")

    def partly(self, found: Any) -> bool:
        """A night that is recorded is promoted by the next one."""
        return all(part in (one, other) for part, one, other in zip(found, self.before, self.after, strict=True))


class FirstBookkeeping(Bookkeeping):
    """The same where no night was before: the worktree is made."""

    name = "first night"
    first = True


class Exported(Case):
    """`edgepress export` of a package to llama.cpp's format: a file, and the adapter's beside it."""

    name = "export to gguf"
    format = "gguf"

    def make(self) -> None:
        tokenizer = tiny_llama(Path.cwd().with_name("tokenizer"))
        random_package.write(Path.cwd().with_name("package"), tokenizer, **random_package.CASES["adapter"])

    def prepare(self) -> None:
        """A user removes what is there, to have it anew."""
        shutil.rmtree("out", ignore_errors=True)

    def do(self) -> int | None:
        return dispatch.main(["export", "--format", self.format, "--model", "../package", "--out", "out"])

    def content(self) -> Any:
        return tree(self.root / "out")


class ExportedToOnnx(Exported):
    """The same to ONNX, whose graph another library draws in files of its own, beside the weights as safetensors."""

    name = "export to onnx"
    format = "onnx-int4"


ALL = (Stage, Repro, Promotion, Applied, Bookkeeping, FirstBookkeeping, Exported, ExportedToOnnx)
CASES: dict[str, Callable[[Path], Case]] = {case.name: case for case in ALL}


def sample(calls: list[Call], count: int, seed: int = 0) -> list[tuple[str, int]]:
    """Faults and numbers of calls, drawn from the seed: of each kind of call on each kind of file before more of one.

    Args:
        calls: of the undisturbed run.
    """
    kinds: dict[str, list[int]] = {}
    for number, call in enumerate(calls):
        kind = re.sub(r"[0-9a-f]{2,}|\d|(?<=/)\.?tmp[^/]*|(?<=/)[^/]*\.tmp", "", call.path)
        kinds.setdefault(f"{seed} {call.name} {kind}", []).append(number)
    every = []
    for kind in sorted(kinds, key=lambda kind: random.Random(kind).random()):  # one more kind leaves the others alone
        pairs = [(fault, number) for number in kinds[kind] for fault in faults.FAULTS]
        random.Random(kind).shuffle(pairs)
        every.append(pairs)
    return [pair for turn in itertools.zip_longest(*every) for pair in turn if pair][:count]
