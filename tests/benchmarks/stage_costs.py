"""What does each stage cost besides computing, and how much do stages side by side save?

    python -m tests.benchmarks.stage_costs [--lanes 1]

The whole DAG of a tiny random model in a folder of its own, as a flow; prints the flow's table of seconds and the
seconds of the whole: first with everything to do, then with nothing. --lanes 1 lets the flow use one core alone, so
that one stage runs after another.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support.project import Project, clean_environment, tiny_llama


def main() -> None:
    """Make the project, run it twice, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lanes", type=int, help="cores that the flow may use (default: all of this process)")
    given = parser.parse_args()
    if given.lanes:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.lanes])
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_llama(Path(folder) / "model")
        project = Project(Path(folder) / "project", model)
        for what in ("everything to do", "nothing to do"):
            began = time.monotonic()
            output = subprocess.run(
                [sys.executable, "-m", "tasks", "run", "report"],
                cwd=project.path,
                env=clean_environment(),
                text=True,
                stdout=subprocess.PIPE,
                check=True,
            ).stdout
            lines = output.splitlines()
            start = next((i for i, line in enumerate(lines) if line.startswith("seconds of")), None)
            if start is not None:
                print("\n".join(lines[start : lines.index("", start) if "" in lines[start:] else None]))
            print(f"{what}: {time.monotonic() - began:.1f} s in all", flush=True)


if __name__ == "__main__":
    main()
