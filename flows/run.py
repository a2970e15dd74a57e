"""`edgepress run`: the whole DAG as one Prefect flow run, one cached task run per stage.

Prints a table of the stages, the verdict, and the report's path. What the flow does: `flows.compress`. Without a
running server (`edgepress ui`) it starts one that ends with it.
"""

from __future__ import annotations

import argparse
import os

from flows.server import settings
from tasks.algorithms.errors import InputError


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
    from flows.compress import REPORT, makes_report, problem  # imports Prefect, whose settings are set by now

    if not configured and (sentence := problem(given.targets)):  # no server that should hear of it: none is started
        raise InputError(sentence)
    message = _run(given.targets or None, given.force, configured)
    if not makes_report(given.targets):
        print(message)
        return
    from tasks.cli import console, report

    console.show("", *report.shown(), "", f"{message}; report: {REPORT.resolve()}")


def _run(targets: list[str] | None, force: bool, configured: str | None) -> str:
    """The flow run, on the configured server or on one of its own; returns its last sentence."""
    from prefect.exceptions import TerminationSignal
    from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, temporary_settings

    from flows.compress import compress, counted
    from flows.server import dead_runs, temporary

    try:
        url = None if configured else temporary.start_temporary()
        with temporary_settings({PREFECT_API_URL: f"{url}/api", PREFECT_UI_URL: url} if url else {}):
            dead_runs.sweep()
            state = compress(targets, force, return_state=True)
    except (KeyboardInterrupt, TerminationSignal):
        sentence = "interrupted; finished stages stay as they are, and the next run goes on from there"
        raise KeyboardInterrupt(sentence) from None
    if not state.is_completed():
        raise InputError(state.message or f"the flow run ended as {state.name}")
    return counted(state)
