"""`edgepress canary`: a candidate that gets a share of the requests beside the version in use.

    edgepress canary start VERSION|FOLDER|REV [--share 0.05]    begin, or change its share
    edgepress canary stop [--failed] [--reason …]               end it
    edgepress canary route ID                                   which version serves a request; the same ID, the same
    edgepress canary judge TELEMETRY [--apply]                  promote, rollback or keep watching

TELEMETRY holds JSON lines {"version": …, "latency_ms": …, "correct": …}. Each prints a sentence or a table, with --json
an object. `judge` ends with 0 whatever the verdict is.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from tasks.algorithms.errors import InputError
from tasks.algorithms.statistics import canary
from tasks.cli import console, project, registry, subcommands
from tasks.registry import canary_samples, versions


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    commands = parser.add_subparsers(required=True, metavar="start | stop | route | judge")
    command = subcommands.add(commands, "start", _start, "give a candidate a share of the requests")
    command.add_argument("what", type=project.folder_or_revision, metavar="VERSION|FOLDER|REV")
    command.add_argument("--share", type=float, help="0 to 1 (default: params.yaml)")
    command = subcommands.add(commands, "stop", _stop, "end the canary")
    command.add_argument("--failed", action="store_true", help="it is not to be promoted")
    command.add_argument("--reason", default="by hand")
    subcommands.add(commands, "route", _route, "which version serves a request").add_argument("id", metavar="ID")
    command = subcommands.add(commands, "judge", _judge, "promote, rollback or keep watching, from a telemetry file")
    command.add_argument("telemetry", type=lambda given: Path(project.path(given)), metavar="TELEMETRY")
    command.add_argument("--apply", action="store_true", help="promote or withdraw it accordingly")


def main(given: argparse.Namespace) -> None:
    """Do what the subcommand says."""
    given.action(given)


def _start(given: argparse.Namespace) -> None:
    share = project.registry().canary.share if given.share is None else given.share
    begun = versions.start_canary(project.ROOT, project.revision(given.what), share)
    text = f"{begun.version} is the canary with {begun.share:.3%} of the requests, in {begun.folder}"
    console.answer(given, asdict(begun), text)


def _stop(given: argparse.Namespace) -> None:
    name = versions.stop_canary(project.ROOT, given.reason, withdraw=given.failed)
    console.answer(given, {"version": name, "failed": given.failed}, f"{name} is no canary any more")


def _route(given: argparse.Namespace) -> None:
    manifest = project.in_use()
    candidate = manifest.canary
    chosen = candidate if candidate and canary.routed(given.id, candidate.version, candidate.share) else manifest
    console.answer(given, {"version": chosen.version, "folder": chosen.folder}, f"{chosen.version} {chosen.folder}")


def _judge(given: argparse.Namespace) -> None:
    manifest = project.in_use()
    if manifest.canary is None:
        raise InputError("there is no canary to judge; `edgepress canary start VERSION` begins one")
    name = manifest.canary.version
    found = canary_samples.judge(given.telemetry, name, manifest.version, project.registry().canary)
    applied = _apply(name, found) if given.apply else None
    if given.json:
        content = {"canary": name, "promoted": manifest.version, "applied": applied}
        console.show_json(content | asdict(found))
        return
    console.show(f"{name} against {manifest.version}: {found.verdict} ({found.samples} samples; {found.reason})")
    if found.checks:
        columns = [f"at {found.confidence:.2%}", "value", "low", "high", "limit", ""]
        console.show(console.table(columns, map(_cells, found.checks), left=[""]))
    if applied:
        print(applied)


def _cells(check: canary.Check) -> list[str]:
    figures = (check.value, check.low, check.high, check.limit)
    mark = "open" if check.ok is None else "ok" if check.ok else "broken"
    return [check.name, *(f"{value:.4g}" for value in figures), mark]


def _apply(name: str, found: canary.Judgement) -> str | None:
    """Promote or withdraw; returns what was done, None where it goes on."""
    if found.verdict == canary.PROMOTE:
        registry.promote(name)
        return f"{name} is in use"
    if found.verdict == canary.ROLLBACK:
        versions.stop_canary(project.ROOT, found.reason, withdraw=True)
        return f"{name} is withdrawn"
    return None
