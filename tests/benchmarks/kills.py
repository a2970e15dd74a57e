"""What does a kill cost? SIGKILL at random moments of every stage, and what the next run makes of it.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.kills [--kills 20] [--start 1] [--only lora]
    … --project FOLDER --results FILE.csv          kept, so that 200 kills can be done in pieces

A tiny project (`tests/support/project.py`) is run once undisturbed. Then, kill after kill, one of its stages is drawn,
what DVC knows of its result is removed, and `dvc repro report` or the flow has to make it again. Between the start of
the stage's process and the end of the command (the outputs' move into place and DVC's own work included) one of
`VICTIMS` gets SIGKILL. Looked at after it: processes that are left, whether what is in place is whole, whether `dvc
status` tells what is missing. Then the next `dvc repro report` has to complete, with every output and dvc.lock as the
undisturbed run has them, an intact cache, nothing in scratch but whole shelves, no journal, no lock of a dead process.

Times are counted from the start of the stage's process: `lost` is what killed and next run took together above an
undisturbed one. A stage that starts over loses what it had done, one that resumes what the journal had not written.
--interval is that of the journal, in seconds; 0 writes every entry. A kill depends on --seed and its number alone.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import yaml
from dvc.exceptions import DvcException
from dvc.repo import Repo

from tasks.runtime import lineage, locks, mend, shelf
from tasks.runtime.journal import SECONDS
from tasks.runtime.stage import SHELVES
from tests.support.project import Project, clean_environment, tiny_llama

DVC = ("-m", "dvc", "repro")
FLOW = ("-m", "tasks", "run")
VICTIMS = {"group": DVC, "stage": DVC, "dvc": DVC, "flow": FLOW, "flow's server": FLOW, "flow's group": FLOW}
"""What is killed -> the command that runs: its process group, or one process of it alone."""
WEIGHTS = (10, 4, 3, 1, 1, 1)
"""How often each is drawn: a flow starts a server, which takes longer than most stages of the tiny project."""
COLUMNS = ("kill", "victim", "stage", "length", "killed_after", "mended", "resumed", "next", "lost", "faults")
"""Seconds. `mended`: DVC was killed while it wrote one of CUT_OFF, and could not read it until it
was mended; `resumed`: whether the next run took something from the journal; `faults`: what was not as it has to be."""
CUT_OFF = (mend.LOCK.name, locks.DVC_USERS.name)
"""Named by DVC where it can't read the file that it was writing."""
PATIENCE = 120.0
"""Seconds in which a command whose stage or server was killed has to end by itself."""
ORPHANS = 5.0
"""Seconds in which every process of a killed command has to be gone."""


class Run(NamedTuple):
    """One command: seconds from the start of the stage's process (0: there was none), exit status, what it printed."""

    seconds: float
    status: int | None
    output: str
    killed: bool


class Killed:
    """The project in which stages are killed.

    Args:
        interval: seconds between two writes of a journal.
        target: the stage that every command makes, with all that it needs.

    Attributes:
        expected: hash of each output in dvc.lock after the undisturbed run.
        lengths: stage -> seconds from the start of its process to the end of `dvc repro report`, undisturbed.
    """

    def __init__(self, project: Project, interval: float, target: str = "report") -> None:
        self.project, self.target = project, target
        self.environment = {**clean_environment(), SECONDS: str(interval)}
        self.notes = project.path.parent / "undisturbed.json"
        if self.notes.exists():
            self.expected, self.lengths = json.loads(self.notes.read_text(encoding="utf-8"))
            project.repro(target)  # where a piece ended in the middle of a kill
        else:
            project.repro(target)
            self.expected, self.lengths = project.lock(), {}
            self._note()

    def _note(self) -> None:
        self.notes.write_text(json.dumps([self.expected, self.lengths]), encoding="utf-8")

    def run(
        self,
        stage: str,
        command: tuple[str, ...] = DVC,
        kill: Callable[[psutil.Process], None] | None = None,
        after: float = 0.0,
        journaled: bool = False,
    ) -> Run:
        """Run a command that makes the stage.

        Args:
            kill: called with the command's process, unless that has ended.
            after: seconds, from the start of the stage's process to that call.
            journaled: count them from the first entry of its journal.
        """
        printed = self.project.path.parent / "printed"
        with printed.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, *command, self.target],
                cwd=self.project.path,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,  # its own process group
            )
        begun = self._begun(process, stage, journaled)
        killed = False
        if kill and begun:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, begun + after - time.monotonic()))
            if process.poll() is None:
                kill(psutil.Process(process.pid))
                killed = True
        ended = time.monotonic()
        try:
            status = process.wait(PATIENCE if killed else None)
        except subprocess.TimeoutExpired:  # `faults_after_kill` finds it, and ends it
            status = None
        ended = ended if killed else time.monotonic()
        text = printed.read_text(encoding="utf-8", errors="replace")
        return Run(ended - begun if begun else 0.0, status, text, killed)

    def _begun(self, process: subprocess.Popen, stage: str, journaled: bool) -> float | None:
        """When the stage's process, or its journal, was seen first; None if the command ends before."""
        entries = self.project.path / "data/.scratch/journal" / stage
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                if stage_process(psutil.Process(process.pid), stage):
                    break
            time.sleep(0.05)
        begun = time.monotonic()
        while journaled and process.poll() is None and not list(entries.glob("*/*.safetensors")):
            time.sleep(0.01)
        return begun if process.poll() is None else None

    def make_stale(self, stage: str) -> None:
        """Make DVC forget the stage's result, and the flow's mending its copy; the outputs stay where they are."""
        for path in (self.project.path / mend.LOCK, self.project.path / mend.KEPT):
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            content["stages"].pop(stage, None)
            path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        for entry in (self.project.path / ".dvc/cache/runs").glob("??/*/*"):
            if yaml.safe_load(entry.read_text(encoding="utf-8"))["cmd"].split()[-1] == stage:
                shutil.rmtree(entry.parent)  # DVC fails at a key without an entry

    def length(self, stage: str) -> float:
        """Seconds of an undisturbed run, measured once."""
        if stage not in self.lengths:
            self.make_stale(stage)
            self.lengths[stage] = self.run(stage).seconds
            self._note()
        return self.lengths[stage]

    def kill(self, victim: str, stage: str, share: float) -> dict[str, Any]:
        """Kill the victim after this share of the stage's length, run again, compare everything."""
        length = self.length(stage)
        killed = Run(0.0, 0, "", False)
        while not killed.killed:  # it may end before, as no run takes as long as another
            self.make_stale(stage)
            killed = self.run(stage, VICTIMS[victim], lambda command: end(victim, command, stage), share * length)
            share *= 0.9
        faults = list(self.faults_after_kill(stage))
        following = self.run(stage)
        if mended := following.status != 0 and any(name in following.output for name in CUT_OFF):
            self.project(sys.executable, "-m", "tasks", "mend")
            following = self.run(stage)
        faults += [f"the next run ended with {following.status}"] if following.status else []
        faults += self.faults()
        return {
            "victim": victim,
            "stage": stage,
            "length": length,
            "killed_after": killed.seconds,
            "mended": mended,
            "resumed": "goes on with what an interrupted run has left" in following.output,
            "next": following.seconds,
            "lost": killed.seconds + following.seconds - length,
            "faults": "; ".join(faults),
        }

    def faults_after_kill(self, stage: str) -> Iterator[str]:
        """What is not as it has to be before the next run."""
        end = time.monotonic() + ORPHANS
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.1)
        yield from (f"{process} is left" for process in left)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        with self._repo() as repo, contextlib.suppress(DvcException):  # no dvc.lock: `mended`
            whole = True
            for other, path, locked, found in self._outputs(repo):
                if found is None and other == stage:
                    whole = False
                elif found != locked:
                    yield f"{path} of {other} is {'missing' if found is None else 'altered'}"
            if not whole and stage not in repo.status([self.target], with_deps=True):
                yield "dvc status says nothing"

    def faults(self) -> Iterator[str]:
        """What is not as the undisturbed run left it."""
        if self.project.lock() != self.expected:
            yield "dvc.lock has other hashes"
        with self._repo() as repo:
            for stage, path, locked, found in self._outputs(repo):
                if found != locked:
                    yield f"{path} of {stage} differs"
            if repo.status([self.target], with_deps=True):
                yield "dvc status is not clean"
        shelves = self.project.path / SHELVES  # stay for later runs
        for path in shelves.rglob(f"*{shelf.ENDING}"):
            if hashlib.sha256(path.read_bytes()).hexdigest() not in path.name:
                yield f"{path} of the shelves is damaged"
        scratch = [path for path in shelves.parent.iterdir() if path.suffix != ".lock" and path != shelves]
        yield from (f"{path.name} is left in the scratch folder" for path in scratch if any(path.rglob("*")))
        held = json.loads((self.project.path / ".dvc/tmp/rwlock").read_text(encoding="utf-8"))
        if held.get("write"):  # readers that died stay in it until somebody writes what they read
            yield "a lock is left in .dvc/tmp/rwlock"
        for path in (self.project.path / ".dvc/cache/files/md5").glob("??/*"):
            digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
            if digest != path.parent.name + path.name.removesuffix(".dir"):
                yield f"{path} of the cache is damaged"

    def processes(self) -> list[psutil.Process]:
        """Those that work in the project's folder."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()) == self.project.path:
                    found.append(process)
        return found

    @contextlib.contextmanager
    def _repo(self) -> Iterator[Repo]:
        with contextlib.chdir(self.project.path), Repo() as repo:
            yield repo

    def _outputs(self, repo: Repo) -> Iterator[tuple[str, str, str, str | None]]:
        """Stage, path, hash in the undisturbed dvc.lock, and hash of the bytes on disk."""
        for stage in repo.index.stages:
            expected = self.expected.get(stage.addressing, {})
            for out in stage.outs:
                if hash_ := expected.get(out.def_path):
                    yield stage.addressing, out.def_path, hash_, lineage.md5(out, trust_state=False)


def stage_process(command: psutil.Process, stage: str) -> psutil.Process | None:
    """The process of this stage below a command."""
    for process in command.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[1:] == ["-m", "flows.stage", stage]:
                return process
    return None


def end(victim: str, command: psutil.Process, stage: str) -> None:
    """SIGKILL; a stage that has just ended is no victim, then its command is."""
    if victim.endswith("group"):
        os.killpg(command.pid, signal.SIGKILL)
        return
    chosen = command
    if victim == "stage":
        chosen = stage_process(command, stage) or command
    elif victim == "flow's server":
        servers = [child for child in command.children() if "flows.server.temporary" in child.cmdline()]
        chosen = servers[0] if servers else command
    with contextlib.suppress(psutil.NoSuchProcess):
        chosen.kill()


def rows(killed: Killed, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One per kill; each is drawn from the seed and its own number, so that pieces give what the whole does."""
    stages = [name for name in killed.expected if given.only in name]
    for number in range(given.start, given.start + given.kills):
        generator = random.Random(f"{given.seed} {number}")
        (victim,) = generator.choices(list(VICTIMS), WEIGHTS)
        yield {"kill": number, **killed.kill(victim, generator.choice(stages), generator.uniform(0.0, 1.0))}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    described = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.kills", description=described)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--start", type=int, default=1, help="number of the first kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--interval", type=float, default=0.0)
    parser.add_argument("--only", default="", help="stages whose name holds this")
    parser.add_argument("--steps", type=int, default=3, help="of the recovery training")
    parser.add_argument("--project", type=Path, help="folder for the tiny project, kept and used again")
    parser.add_argument("--results", type=Path, help="a CSV file that rows are added to")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Print a row per kill and a summary of all rows; 1 where there was a fault."""
    given = parse(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.project or Path(temporary)).resolve()
        path = folder / "project"
        project = Project.found(path) if path.exists() else Project(path, tiny_llama(folder / "model"))
        project.change({"lora.steps": given.steps})
        killed = Killed(project, given.interval)
        results = given.results or folder / "kills.csv"
        new = not results.exists()
        with results.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            print(",".join(COLUMNS), flush=True)
            for row in rows(killed, given):
                shown = {key: f"{value:.2f}" if isinstance(value, float) else value for key, value in row.items()}
                print(",".join(str(shown[key]) for key in COLUMNS), flush=True)
                writer.writerow(shown)
                file.flush()
        return summary(results)


def summary(results: Path) -> int:
    """Print what all rows of a file say; 1 where there was a fault."""
    with results.open(newline="", encoding="utf-8") as file:
        all_rows = list(csv.DictReader(file))
    faulty = [row for row in all_rows if row["faults"]]
    shares = sorted(float(row["lost"]) / float(row["length"]) for row in all_rows)
    print(
        f"{len(all_rows) - len(faulty)} of {len(all_rows)} kills left nothing but what the undisturbed run leaves; "
        f"{sum(row['mended'] == 'True' for row in all_rows)} cut off dvc.lock, and needed tasks.runtime.mend; "
        f"{sum(row['resumed'] == 'True' for row in all_rows)} resumed from a journal; "
        f"lost per kill, of the stage's length: median {shares[len(shares) // 2]:.2f}, at most {shares[-1]:.2f}"
    )
    for row in faulty:
        print(f"kill {row['kill']}, {row['victim']} in {row['stage']}: {row['faults']}")
    return int(bool(faulty))


if __name__ == "__main__":
    sys.exit(main())
