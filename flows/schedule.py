"""`edgepress night`: compress what is new every night, judge it, and promote it where the gate accepts it.

    edgepress night               serve the deployment by the cron of params.yaml, until Ctrl-C or SIGTERM
    edgepress night --once        one night now
    edgepress night list          every night with parameters, metrics and verdict; needs no server
    edgepress night apply NAME    bring one back into the workspace, nothing recomputed; needs no server

A night needs the running server of `edgepress ui`, never a temporary one: its runs are what people look for in the
morning. Exit codes of --once: 0 ACCEPT, 1 night or promotion failed, 3 REGRESSION, 4 ANOMALOUS, 5 INFEASIBLE,
6 UNDECIDED.
"""

from __future__ import annotations

import argparse
from typing import Any

from flows.server import settings
from tasks.algorithms.errors import InputError
from tasks.cli import console, exit_codes
from tasks.nightly import records, worktree
from tasks.parameters import schema
from tasks.registry import overview

DEPLOYMENT = "nightly"
FIGURES = ("perplexity_test", "perplexity_test_ood", "bytes", "fit")
"""Figures of a night that the list shows; `dvc exp show` has all."""
WORDS = ("verdict", "stages", "fit", "against", "version")


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--once", action="store_true", help="run one night now, instead of serving the schedule")
    commands = parser.add_subparsers(dest="command", metavar="list | apply")
    listing = commands.add_parser("list", help="every night with parameters, metrics and verdict")
    listing.add_argument("--json", action="store_true", help="whole records, for scripts")
    apply = commands.add_parser("apply", help="bring a night back into the workspace")
    apply.add_argument("name", metavar="NAME", help="of the list, or its beginning")
    apply.add_argument("--force", action="store_true", help="lose uncommitted changes of the workspace")


def main(given: argparse.Namespace) -> int | None:
    """Serve, run one night, list or apply."""
    settings.apply()
    if given.command == "list":
        return _list(given.json)
    if given.command == "apply":
        night = records.apply(worktree.root(), given.name, given.force)
        print(f"{night.name} ({night.record['verdict']}) is in the workspace; `dvc repro` has nothing to do")
        return None
    own = schema.load(worktree.root() / "params.yaml").nightly
    if not settings.running_server():
        raise InputError(
            "no Prefect server answers, and a night never runs on a temporary one: `make ui` in another terminal"
            " starts it (or PREFECT_API_URL names one; one with a password wants PREFECT_API_AUTH_STRING)"
        )
    return _once() if given.once else _serve(own)


def _once() -> int:
    from flows.night import night  # imports Prefect, which `list` and `apply` do without

    try:
        state = night(return_state=True)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the next night goes on from there") from None
    if not state.is_completed():
        raise InputError(state.message or f"the night ended as {state.name}")
    print(state.message)
    return exit_codes.VERDICTS.get(state.name.upper(), exit_codes.REFUSED)


def _serve(own: schema.Nightly) -> None:
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


def _list(as_json: bool) -> None:
    top = worktree.root()
    known = records.listing(top)
    if as_json:
        console.show_json([night._asdict() for night in known])
    elif known:
        rows = _rows(known)
        table = console.table(list(rows[0]), [list(row.values()) for row in rows], left=WORDS)
        console.show(table, "`dvc exp show --all-commits` shows every parameter and metric; `… apply NAME` brings back")
    else:
        print("There is no night yet: `make nightly` serves the schedule, `edgepress night --once` runs one.")


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
