"""The flow: the whole DAG as one Prefect flow run, one cached task run per stage (`edgepress run`).

The lineage of every stage and the report's verdict, tables and plots become artifacts of the run (`flows.artifacts`).
"""

from __future__ import annotations

from pathlib import Path

from flows.server import settings

settings.apply()

from dvc.exceptions import DvcException  # noqa: E402
from dvc.repo import Repo  # noqa: E402
from prefect import flow  # noqa: E402  the settings must be in the environment before Prefect is imported
from prefect.artifacts import create_table_artifact  # noqa: E402
from prefect.states import Completed, Failed, State  # noqa: E402

from flows import artifacts  # noqa: E402
from flows.reproduction import Reproduction  # noqa: E402
from flows.server import dead_runs  # noqa: E402
from tasks.algorithms.errors import InputError  # noqa: E402
from tasks.parameters import schema  # noqa: E402
from tasks.runtime import mend  # noqa: E402

REPORT = Path("data/report/report.html")


@flow(name="compress", persist_result=False, validate_parameters=False)
def compress(targets: list[str] | None = None, force: bool = False) -> State:
    """Bring every stage up to date; a failing stage fails the run with the stage's own sentence."""
    dead_runs.sign()
    if hindrance := problem(targets):
        return Failed(message=hindrance)
    reproduction = Reproduction()
    failure = reproduction.run(targets, force)
    create_table_artifact(key="run", table=reproduction.rows, description="what each stage did, and DVC's key of it")
    if failure:
        return Failed(message=failure)
    if makes_report(targets):
        artifacts.publish(REPORT)
    counts = [row["why"] for row in reproduction.rows]
    return Completed(message=f"{counts.count('ran')} of {len(counts)} stages ran")


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
        return str(error)
    return None
