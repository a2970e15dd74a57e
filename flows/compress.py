"""The flow: the whole DAG as one Prefect flow run, one cached task run per stage (`edgepress run`).

What each stage did and the report's verdict, tables and plots become artifacts of the run (`flows.artifacts`). What the
stages that ran cost is printed (`flows.costs`).
"""

from __future__ import annotations

from contextvars import ContextVar
from pathlib import Path

from flows.server import settings

settings.apply()

from dvc.exceptions import DvcException  # noqa: E402
from dvc.repo import Repo  # noqa: E402
from prefect import flow  # noqa: E402  the settings must be in the environment before Prefect is imported
from prefect.states import Completed, Failed, State  # noqa: E402

from flows import artifacts, costs, prefect_internals  # noqa: E402
from flows.reproduction import Reproduction  # noqa: E402
from flows.server import dead_runs  # noqa: E402
from tasks.algorithms.errors import InputError  # noqa: E402
from tasks.cli import console  # noqa: E402
from tasks.parameters import schema  # noqa: E402
from tasks.runtime import mend  # noqa: E402

prefect_internals.apply()
REPORT = Path("data/report/report.html")
AHEAD: ContextVar[Reproduction | None] = ContextVar("AHEAD", default=None)
"""One that has looked, with the arguments of the next run, while a server started."""


@flow(name="compress", persist_result=False, validate_parameters=False)
def compress(targets: list[str] | None = None, force: bool = False) -> State:
    """Bring every stage up to date; a failing stage fails the run with the stage's own sentence."""
    dead_runs.sign()
    reproduction = AHEAD.get()
    if reproduction is None:
        if hindrance := problem(targets):
            return Failed(message=hindrance)
        reproduction = Reproduction()
    failure = reproduction.run(targets, force)
    rows = reproduction.rows
    counts = [row["why"] for row in rows]
    message = failure or f"{counts.count('ran')} of {len(counts)} stages ran"
    made = list(artifacts.of_run(rows, failure))
    if not failure and makes_report(targets):
        made += artifacts.of_report(REPORT)
        message += f"; {artifacts.verdict(REPORT)[0]}"
    artifacts.publish(sorted(made, key=lambda artifact: artifact.key))
    if table := costs.table(rows):
        console.show("", table)
    return Failed(message=message) if failure else Completed(message=message)


def counted(state: State) -> str:
    """Of the message of a run that completed what it says of the stages; the verdict follows there."""
    return (state.message or "").partition("; ")[0]


def makes_report(targets: list[str] | None) -> bool:
    """Whether a run of these stages brings the report up to date; a table of an older one would mislead."""
    return not targets or REPORT.parent.name in targets


def problem(targets: list[str] | None = None) -> str | None:
    """What hinders every stage, or which of the targets is none, in a sentence a line; None if nothing does."""
    try:
        mend.refuse_conflicts()
        schema.load()
        with Repo() as repo:
            for target in targets or ():
                repo.stage.collect(target)
    except (InputError, DvcException) as error:
        if Path(getattr(error, "path", "")).name == mend.LOCK.name:
            return None  # cut off, or DVC is writing it: the run mends it, and waits for DVC's lock
        return str(error)
    return None
