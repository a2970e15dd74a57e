"""`python -m flows.stage NAME`: the command of every stage of dvc.yaml.

Under `flows.compress` the stage is already a Prefect task run, named in the environment. Under a plain `dvc repro` it
shows up as a flow run of its own when a Prefect server is configured and answers, and runs without Prefect otherwise.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING

from flows.server import settings
from tasks.algorithms.errors import InputError
from tasks.runtime.execution import execute

if TYPE_CHECKING:
    from prefect import State

FLOW_RUN, TASK_RUN, LOG = "EDGEPRESS_FLOW_RUN", "EDGEPRESS_TASK_RUN", "EDGEPRESS_LOG"
"""Environment of a stage that runs inside a flow: the runs it belongs to, and the file its output goes to."""
ERROR = "error: "
"""Begins each line of a failure's sentence."""
NOISE = ("torchao", "torch.utils._pytree")
"""Loggers that warn about libraries' own affairs whenever they are imported, in every stage."""


def main(address: str) -> int:
    """Run the stage; returns the exit code."""
    settings.apply()
    _redirect()
    for name in NOISE:
        logging.getLogger(name).setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, _terminated)
    ids = {"flow_run": os.environ.get(FLOW_RUN), "task_run": os.environ.get(TASK_RUN)}
    try:
        if ids["flow_run"] or not settings.running_server():
            execute(address, run_ids={key: value for key, value in ids.items() if value})
        else:
            _as_flow_run(address)
    except InputError as error:
        print(_sentences(address, error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"{ERROR}{address}: interrupted; the previous outputs are back as far as the cache has them",
            file=sys.stderr,
        )
        return 130
    return 0


def _sentences(address: str, error: InputError) -> str:
    return "\n".join(f"{ERROR}{address}: {line}" for line in str(error).splitlines())


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


def _as_flow_run(address: str) -> None:
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
            return Failed(message=_sentences(address, error).replace(ERROR, "").replace("\n", "; "))
        return None

    run(return_state=True).result(raise_on_failure=not failures)
    if failures:
        raise failures[0]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m flows.stage NAME   (a stage of dvc.yaml)")
    sys.exit(main(sys.argv[1]))
