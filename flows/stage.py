"""`python -m flows.stage NAME`: the command of every stage of dvc.yaml.

Under `flows.compress` the stage is already a Prefect task run, named in the environment. Under a plain `dvc repro` it
shows up as a flow run of its own when a Prefect server is configured and answers, and runs without Prefect otherwise.
"""

from __future__ import annotations

import os
import sys

from flows import settings
from tasks.algorithms.errors import InputError
from tasks.stage import execute

FLOW_RUN, TASK_RUN, LOG = "EDGEPRESS_FLOW_RUN", "EDGEPRESS_TASK_RUN", "EDGEPRESS_LOG"
"""Environment of a stage that runs inside a flow: the runs it belongs to, and the file its output goes to."""


def main(address: str) -> int:
    """Run the stage; returns the exit code."""
    settings.apply()
    _redirect()
    try:
        if os.environ.get(FLOW_RUN) or not settings.running_server():
            ids = {"flow_run": os.environ.get(FLOW_RUN, ""), "task_run": os.environ.get(TASK_RUN, "")}
            execute(address, run_ids={key: value for key, value in ids.items() if value})
        else:
            _as_flow_run(address)
    except InputError as error:
        for line in str(error).splitlines():
            print(f"error: {address}: {line}", file=sys.stderr)
        return 1
    return 0


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

    @flow(name="stage", flow_run_name=address, persist_result=False)
    def run() -> None:
        execute(address, run_ids={"flow_run": str(flow_run.id)})

    run()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m flows.stage NAME   (a stage of dvc.yaml)")
    sys.exit(main(sys.argv[1]))
