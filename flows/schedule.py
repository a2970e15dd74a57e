"""`edgepress night`: compress what is new every night, judge it, and promote it where the gate accepts it.

    edgepress night               serve the deployment by the cron of params.yaml, until Ctrl-C or SIGTERM
    edgepress night --once        one night now
    edgepress night list          every night with parameters, metrics and verdict; needs no server
    edgepress night apply NAME    bring one back into the workspace, nothing recomputed; needs no server

A night needs the running server of `make ui`, never a temporary one: its runs are what people look for in the morning.

Exit codes of --once: 0 ACCEPT, 1 night or promotion failed, 3 REGRESSION, 4 ANOMALOUS, 5 INFEASIBLE, 6 UNDECIDED.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import pandas as pd

from flows.server import settings
from tasks.algorithms.errors import InputError
from tasks.algorithms.statistics.gate import ACCEPT, ANOMALOUS, INFEASIBLE, REGRESSION, UNDECIDED
from tasks.nightly import records, worktree
from tasks.parameters import schema
from tasks.registry import overview

EXIT = {ACCEPT: 0, REGRESSION: 3, ANOMALOUS: 4, INFEASIBLE: 5, UNDECIDED: 6}
FAILURE = 1
DEPLOYMENT = "nightly"
FIGURES = ("perplexity_test", "perplexity_test_ood", "bytes", "fit")
"""Of a night in the list; `dvc exp show` has all."""


def main(arguments: list[str]) -> int:
    """Serve, run one night, list or apply; returns the exit code."""
    chosen = _parser().parse_args(arguments)
    settings.apply()
    try:
        if chosen.command == "list":
            return _list(chosen.json)
        if chosen.command == "apply":
            found = records.apply(worktree.root(), chosen.name, chosen.force)
            print(f"{found.name} ({found.record['verdict']}) is in the workspace; `dvc repro` has nothing to do")
            return 0
        own = schema.load(worktree.root() / "params.yaml").nightly
        if not settings.running_server():
            raise InputError(
                "no Prefect server answers, and a night never runs on a temporary one: `make ui` in another terminal"
                " starts it (or PREFECT_API_URL names one; one with a password wants PREFECT_API_AUTH_STRING)"
            )
        return _once() if chosen.once else _serve(own)
    except InputError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return FAILURE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edgepress night", description="re-compression every night")
    parser.add_argument("--once", action="store_true", help="run one night now, instead of serving the schedule")
    commands = parser.add_subparsers(dest="command", metavar="list | apply")
    listing = commands.add_parser("list", help="every night with parameters, metrics and verdict")
    listing.add_argument("--json", action="store_true", help="whole records, for scripts")
    apply = commands.add_parser("apply", help="bring a night back into the workspace")
    apply.add_argument("name", help="of the list, or its beginning")
    apply.add_argument("--force", action="store_true", help="lose uncommitted changes of the workspace")
    return parser


def _once() -> int:
    from flows.night import night  # imports Prefect, which `list` and `apply` do without

    try:
        state = night(return_state=True)
    except KeyboardInterrupt:
        raise InputError("interrupted; the next night goes on from there") from None
    if not state.is_completed():
        raise InputError(state.message or f"the night ended as {state.name}")
    print(state.message)
    return EXIT.get(state.name.upper(), FAILURE)


def _serve(own: schema.Nightly) -> int:
    """Serve the deployment until Ctrl-C or SIGTERM, which pause it; the next start goes on."""
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.deployments.runner import EntrypointType
    from prefect.schedules import Cron

    from flows.night import night
    from flows.server import dead_runs

    strategies = {"cancel": ConcurrencyLimitStrategy.CANCEL_NEW, "queue": ConcurrencyLimitStrategy.ENQUEUE}
    dead_runs.sweep()  # a dead night would hold the only slot
    dead_runs.drop_missed(f"{night.name}/{DEPLOYMENT}")
    night.serve(
        name=DEPLOYMENT,
        schedule=Cron(own.cron, timezone=own.timezone),
        paused=False,  # a graceful stop pauses it, and serving again does not undo that by itself (3.8.8)
        global_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=strategies[own.overlap]),
        entrypoint_type=EntrypointType.MODULE_PATH,
        description="re-compression of HEAD with the newest sources, judged and promoted by the gate",
    )
    return 0


def _list(as_json: bool) -> int:
    top = worktree.root()
    known = records.listing(top)
    if as_json:
        print(json.dumps([night._asdict() for night in known], indent=1))
    elif known:
        print(pd.DataFrame(_rows(known)).to_string(index=False))
        print("`dvc exp show --all-commits` shows every parameter and metric; `… apply NAME` brings one back")
    else:
        print("There is no night yet: `make nightly` serves the schedule, `edgepress night --once` runs one.")
    return 0


def _rows(known: list[records.Night]) -> list[dict[str, Any]]:
    top = worktree.root()
    numbered = {entry["revision"]: entry["version"] for entry in overview.versions(top)}
    parameters = records.changed_parameters(top, known)
    rows = []
    for night in known:
        record, figures = night.record, night.record.get("figures", {})
        shown = {name: _text(figures.get(name)) for name in FIGURES}
        row = {"night": night.name, "verdict": record["verdict"], "stages": record["stages"], **shown}
        row |= {"against": record.get("against") or "-", "version": numbered.get(night.commit, "-")}
        rows.append(row | {key: _text(value) for key, value in parameters[night.name].items()})
    return rows


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
