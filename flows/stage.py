"""`edgepress stage NAME`: run one stage of dvc.yaml.

dvc.yaml says `python -m flows.stage NAME` instead: there the working folder comes first on sys.path, so that a copy of
the project (`dvc exp run --temp`, a night's worktree) runs its own code, while the console script runs the installed.
Under `edgepress run` the stage is already a Prefect task run, named in the environment. Under a plain `dvc repro` it
shows up as a flow run of its own when a Prefect server is configured and answers, and runs without Prefect otherwise.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

from flows import processes
from flows.server import settings
from tasks.algorithms.errors import InputError
from tasks.cli import dispatch
from tasks.runtime import lean, warm

if TYPE_CHECKING:
    from prefect import State

FLOW_RUN, TASK_RUN, LOG = "EDGEPRESS_FLOW_RUN", "EDGEPRESS_TASK_RUN", "EDGEPRESS_LOG"
"""Environment of a stage that runs inside a flow: the runs it belongs to, and the file its output goes to."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("name", metavar="NAME", help="as in dvc.yaml; one of a matrix as evaluate@gptq")


def main(given: argparse.Namespace) -> None:
    """Run the stage.

    Raises:
        InputError: what a user can mend, each line with the stage's name.
    """
    with lean.uncollected():
        from tasks.runtime.execution import execute  # imports DVC, which a client of the warm process does without

    settings.apply()
    _redirect()
    signal.signal(signal.SIGTERM, _terminated)
    ids = {"flow_run": os.environ.get(FLOW_RUN), "task_run": os.environ.get(TASK_RUN)}
    try:
        if ids["flow_run"] or not settings.running_server():
            execute(given.name, run_ids={key: value for key, value in ids.items() if value})
        else:
            _as_flow_run(given.name, execute)
    except InputError as error:
        raise InputError(_sentences(given.name, error)) from error
    except KeyboardInterrupt:
        sentence = f"{given.name}: interrupted; the previous outputs are back as far as the cache has them"
        raise KeyboardInterrupt(sentence) from None


def _sentences(address: str, error: InputError) -> str:
    return "\n".join(f"{address}: {line}" for line in str(error).splitlines())


def _terminated(signum: int, frame: FrameType | None) -> None:
    """End as by Ctrl-C: as an exception, so that the stage puts its previous outputs back."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _redirect() -> None:
    """Send this process's output to the log that the flow follows."""
    if log := os.environ.get(LOG):
        with open(log, "a", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout.reconfigure(line_buffering=True)


def _as_flow_run(address: str, execute: Callable[..., None]) -> None:
    from prefect import flow
    from prefect.runtime import flow_run
    from prefect.states import Failed

    from flows.server import dead_runs

    failures: list[InputError] = []

    redrawn = sys.stderr.isatty()  # a progress bar there; as log lines it would be one line per step

    @flow(name="stage", flow_run_name=address, persist_result=False, log_prints=not redrawn)
    def run() -> State | None:
        dead_runs.sign()
        try:
            execute(address, run_ids={"flow_run": str(flow_run.id)})
        except InputError as error:  # returned: raised, Prefect would print its traceback
            failures.append(error)
            return Failed(message=_sentences(address, error).replace("\n", "; "))
        return None

    run(return_state=True).result(raise_on_failure=not failures)
    if failures:
        raise failures[0]


if __name__ == "__main__":
    code = warm.run(processes.STAGE)
    sys.exit(dispatch.main(["stage", *sys.argv[1:]]) if code is None else code)
