"""`edgepress run`: the whole DAG as one Prefect flow run, one cached task run per stage.

Prints a table of the stages, the verdict, and the report's path. What the flow does: `flows.compress`. Without a
running server (`edgepress ui`) it starts one that ends with it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess

from flows.server import settings, temporary
from tasks.algorithms.errors import InputError
from tasks.runtime import lean


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("targets", nargs="*", metavar="STAGE", help="stages of dvc.yaml, and what they need; all")
    parser.add_argument("--force", action="store_true", help="run the stages even where nothing changed")


def main(given: argparse.Namespace) -> None:
    """Run the flow and print its results.

    Raises:
        InputError: a stage failed, or nothing could start, in a sentence.
    """
    settings.apply()
    configured = os.environ.get("PREFECT_API_URL")
    if configured and not settings.running_server():
        raise InputError(f"no Prefect server answers at {configured}: start it, or unset PREFECT_API_URL to do without")
    with contextlib.nullcontext() if configured else temporary.begun() as server:
        with lean.uncollected():
            from flows.compress import REPORT, makes_report, problem  # imports Prefect, whose settings are set by now

        if server and (sentence := problem(given.targets)):  # nobody should hear of it: no server is started
            raise InputError(sentence)
        message = _run(given.targets or None, given.force, server)
    if not makes_report(given.targets):
        print(message)
        return
    from tasks.cli import console, report

    console.show("", *report.shown(), "", f"{message}; report: {REPORT.resolve()}")


def _run(targets: list[str] | None, force: bool, server: subprocess.Popen | None) -> str:
    """The flow run, on the configured server or on the one that was begun; returns its last sentence."""
    from prefect.exceptions import TerminationSignal
    from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, temporary_settings

    from flows.compress import AHEAD, compress, counted
    from flows.reproduction import Reproduction
    from flows.server import dead_runs

    try:
        with Reproduction() if server else contextlib.nullcontext() as ahead:
            if ahead:
                ahead.look(targets, force)
                AHEAD.set(ahead)
            url = temporary.start_temporary(server) if server else None
            with temporary_settings({PREFECT_API_URL: f"{url}/api", PREFECT_UI_URL: url} if url else {}):
                dead_runs.sweep()
                state = compress(targets, force, return_state=True)
    except (KeyboardInterrupt, TerminationSignal):
        sentence = "interrupted; finished stages stay as they are, and the next run goes on from there"
        raise KeyboardInterrupt(sentence) from None
    if not state.is_completed():
        raise InputError(state.message or f"the flow run ended as {state.name}")
    return counted(state)
