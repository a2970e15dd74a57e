"""`edgepress run`: the whole DAG as one Prefect flow run, one cached task run per stage.

Prints a table of the stages, the verdict, and the report's path; the lineage of every stage and the report's verdict,
tables and plots become artifacts of the run (`flows.artifacts`). `--force` runs every stage,
STAGE ... only those and what they need.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from flows.server import settings

settings.apply()

from dvc.exceptions import DvcException  # noqa: E402
from dvc.repo import Repo  # noqa: E402
from prefect import flow  # noqa: E402  the settings must be in the environment before Prefect is imported
from prefect.artifacts import create_table_artifact  # noqa: E402
from prefect.exceptions import TerminationSignal  # noqa: E402
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, temporary_settings  # noqa: E402
from prefect.states import Completed, Failed, State  # noqa: E402

from flows import artifacts  # noqa: E402
from flows.reproduction import Reproduction  # noqa: E402
from flows.server import dead_runs, temporary  # noqa: E402
from tasks.algorithms.errors import InputError  # noqa: E402
from tasks.cli import report as summary  # noqa: E402
from tasks.parameters import schema  # noqa: E402

REPORT = Path("data/report/report.html")


@flow(name="compress", persist_result=False, validate_parameters=False)
def compress(targets: list[str] | None = None, force: bool = False) -> State:
    """Bring every stage up to date; a failing stage fails the run with the stage's own sentence."""
    dead_runs.sign()
    if problem := _problem():
        return Failed(message=problem)
    reproduction = Reproduction()
    failure = reproduction.run(targets, force)
    create_table_artifact(key="run", table=reproduction.rows, description="what each stage did, and DVC's key of it")
    if failure:
        return Failed(message=failure)
    if _makes_report(targets):
        artifacts.publish(REPORT)
    counts = [row["why"] for row in reproduction.rows]
    return Completed(message=f"{counts.count('ran')} of {len(counts)} stages ran")


def main(arguments: list[str]) -> int:
    """Run the flow and print its results; returns the exit code."""
    parser = argparse.ArgumentParser(prog="edgepress run", description="run the DAG as a Prefect flow")
    parser.add_argument("targets", nargs="*", metavar="STAGE", help="stages of dvc.yaml (default: all)")
    parser.add_argument("--force", action="store_true", help="run the stages even where nothing changed")
    chosen = parser.parse_args(arguments)
    configured = os.environ.get("PREFECT_API_URL")
    if configured and not settings.running_server():
        return _fail(f"no Prefect server answers at {configured}: start it, or unset PREFECT_API_URL to do without")
    if not configured and (problem := _problem()):  # no server that should hear of it: don't start one for that
        return _fail(problem)
    try:
        url = None if configured else temporary.start_temporary()
        with temporary_settings({PREFECT_API_URL: f"{url}/api", PREFECT_UI_URL: url} if url else {}):
            dead_runs.sweep()
            state = compress(chosen.targets or None, chosen.force, return_state=True)
    except InputError as error:
        return _fail(str(error))
    except (KeyboardInterrupt, TerminationSignal):
        return _fail("interrupted; finished stages stay as they are, and the next run goes on from there")
    if not state.is_completed():
        return _fail(state.message or f"the flow run ended as {state.name}")
    if _makes_report(chosen.targets):
        print(f"\n{summary.table()}\n\n{state.message}; report: {REPORT.resolve()}")
    return 0


def _makes_report(targets: list[str] | None) -> bool:
    """Whether a run of these stages brings the report up to date; a table of an older one would mislead."""
    return not targets or REPORT.parent.name in targets


def _problem() -> str | None:
    """What hinders every stage, in a sentence a line; None if nothing does."""
    try:
        schema.load()
        Repo().close()
    except (InputError, DvcException) as error:
        return str(error)
    return None


def _fail(message: str) -> int:
    print("\n".join(f"error: {line}" for line in message.splitlines()), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
