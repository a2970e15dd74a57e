"""What does a kill cost? SIGKILL at random moments of every stage, and what the next run makes of it.

    OMP_NUM_THREADS=1 .venv/bin/python -m tests.benchmarks.kills [--kills 20] [--steps 3] [--only lora]

A tiny project (`tests/project.py`) is run once undisturbed. Then, kill after kill, one of its stages is drawn, its
outputs are made stale, and the whole process group of `dvc repro` is killed somewhere in the stage's own time; the next
`dvc repro` has to complete, and every output has to have the hash of the undisturbed run. `lost` is the time of killed
and next run together above that of an undisturbed one, against the stage's length: a stage that starts over loses what
it had done, one that resumes its start and what the journal had not written. Starting Python and importing libraries
takes most of a tiny stage. --interval is that of the journal, in seconds; 0 writes every entry.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tasks.journal import SECONDS
from tests.project import Project, clean_environment, tiny_llama

COLUMNS = ["kill", "stage", "length", "killed_after", "resumed", "next", "lost", "same_bytes"]
"""Seconds; `resumed`: whether the next run took something from the journal."""


class Killed:
    """The project in which stages are killed.

    Attributes:
        expected: the outputs of the undisturbed run.
        lengths: stage -> seconds of `dvc repro --single-item --force`, without an interruption.
    """

    def __init__(self, project: Project, interval: float) -> None:
        self.project = project
        self.environment = {**clean_environment(), SECONDS: str(interval)}
        project.repro()
        self.expected = project.lock()
        self.lengths: dict[str, float] = {}

    def run(self, stage: str, kill_after: float | None = None, journaled: bool = False) -> tuple[float, str]:
        """Force one stage; seconds until it ended or was killed, and what it printed.

        Args:
            kill_after: seconds; None: it isn't killed.
            journaled: count them from the first entry of its journal.
        """
        command = [sys.executable, "-m", "dvc", "repro", "--single-item", "--force", stage]
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=self.project.path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self.environment,
            start_new_session=True,  # its own process group
        )
        entries = self.project.path / "data/.scratch/journal" / stage
        while journaled and process.poll() is None and not list(entries.glob("*/*.safetensors")):
            time.sleep(0.01)
        try:
            output, _ = process.communicate(timeout=kill_after)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            return time.monotonic() - started, output
        if process.returncode:
            raise RuntimeError(f"{stage} ended with {process.returncode}:\n{output}")
        return time.monotonic() - started, output

    def length(self, stage: str) -> float:
        """Seconds of an undisturbed run, measured once."""
        if stage not in self.lengths:
            self.lengths[stage], _ = self.run(stage)
        return self.lengths[stage]

    def kill(self, stage: str, share: float) -> dict[str, object]:
        """Kill the stage after this share of its length, run it again, compare everything."""
        length = self.length(stage)
        after, _ = self.run(stage, kill_after=share * length)
        following, output = self.run(stage)
        self.project.repro()
        return {
            "stage": stage,
            "length": length,
            "killed_after": after,
            "resumed": "goes on with what an interrupted run has left" in output,
            "next": following,
            "lost": after + following - length,
            "same_bytes": self.project.lock() == self.expected,
        }


def main(arguments: list[str] | None = None) -> int:
    """Print a row per kill and a summary; 1 where an output differs."""
    described = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.kills", description=described)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--interval", type=float, default=0.0)
    parser.add_argument("--only", default="", help="stages whose name holds this")
    parser.add_argument("--steps", type=int, default=3, help="of the recovery training")
    given = parser.parse_args(arguments)
    generator = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        project = Project(Path(folder) / "project", tiny_llama(Path(folder) / "model"))
        project.change({"lora.steps": given.steps})
        killed = Killed(project, given.interval)
        stages = [name for name in killed.expected if given.only in name]
        rows = []
        print(",".join(COLUMNS), flush=True)
        for number in range(1, given.kills + 1):
            row = {"kill": number, **killed.kill(generator.choice(stages), generator.uniform(0.1, 1.0))}
            cells = (f"{row[key]:.2f}" if isinstance(row[key], float) else str(row[key]) for key in COLUMNS)
            print(",".join(cells), flush=True)
            rows.append(row)
    same = sum(row["same_bytes"] for row in rows)
    shares = sorted(row["lost"] / row["length"] for row in rows)
    print(
        f"{same} of {len(rows)} kills left the bytes of the undisturbed run; "
        f"{sum(row['resumed'] for row in rows)} resumed from a journal; "
        f"lost per kill, of the stage's length: median {shares[len(shares) // 2]:.2f}, at most {shares[-1]:.2f}"
    )
    return int(same < len(rows))


if __name__ == "__main__":
    sys.exit(main())
