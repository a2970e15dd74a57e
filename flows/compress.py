"""`python -m flows.compress`: the whole DAG as one Prefect flow run, one cached task run per stage.

Prints a table of the stages and the report's path; the same table, the lineage of every stage and a link to the report
become artifacts of the run. `--force` runs every stage, STAGE ... only those and what they need.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flows import settings

settings.apply()

from prefect import flow  # noqa: E402  the settings must be in the environment before Prefect is imported
from prefect.artifacts import create_link_artifact, create_table_artifact  # noqa: E402
from prefect.states import Completed, Failed, State  # noqa: E402

from flows.reproduction import Reproduction  # noqa: E402
from tasks import params, summary  # noqa: E402
from tasks.algorithms.errors import InputError  # noqa: E402

REPORT = Path("data/report/report.html")


@flow(name="compress", persist_result=False, validate_parameters=False)
def compress(targets: list[str] | None = None, force: bool = False) -> State:
    """Bring every stage up to date; a failing stage fails the run with the stage's own sentence."""
    reproduction = Reproduction()
    failure = reproduction.run(targets, force)
    create_table_artifact(key="run", table=reproduction.rows, description="what each stage did, and DVC's key of it")
    if failure:
        return Failed(message=failure)
    if rows := summary.rows():
        create_table_artifact(key="stages", table=rows, description="the model after each stage")
    if REPORT.exists():
        create_link_artifact(key="report", link=REPORT.resolve().as_uri(), link_text=str(REPORT))
    counts = [row["why"] for row in reproduction.rows]
    return Completed(message=f"{counts.count('ran')} of {len(counts)} stages ran")


def main(arguments: list[str]) -> int:
    """Run the flow and print its results; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m flows.compress", description="run the DAG as a Prefect flow")
    parser.add_argument("targets", nargs="*", metavar="STAGE", help="stages of dvc.yaml (default: all)")
    parser.add_argument("--force", action="store_true", help="run the stages even where nothing changed")
    chosen = parser.parse_args(arguments)
    try:
        params.load()
    except InputError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 1
    state = compress(chosen.targets or None, chosen.force, return_state=True)
    if not state.is_completed():
        print(f"error: {state.message}", file=sys.stderr)
        return 1
    print(f"\n{summary.table()}\n\n{state.message}; report: {REPORT.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
