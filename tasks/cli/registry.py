"""`edgepress registry`: versions of the package, which of them is in use, promotion and rollback; needs no server.

    edgepress registry list                                   every version: stage, date, figures, verdict, bytes
    edgepress registry promote VERSION|FOLDER|REV [--again]   make it the model in use
    edgepress registry rollback [VERSION] [--reason …]        back to the one before, verified first
    edgepress registry verify [VERSION]                       hash its files (default: what is in use)

A folder stands for its present state, committed or not. Each prints a sentence or a table, with --json an object.
`edgepress compare` tells two versions apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tasks.cli import console, project, subcommands
from tasks.registry import overview, versions
from tasks.registry.versions import Version

SHOWN = (("ppl test", "perplexity_test"), ("ppl ood", "perplexity_test_ood"))
"""Heading and figure in `list`; --json and `edgepress compare` have all."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    commands = parser.add_subparsers(required=True, metavar="list | promote | rollback | verify")
    subcommands.add(commands, "list", _list, "every version")
    command = subcommands.add(commands, "promote", _promote, "make a version the one in use")
    command.add_argument("what", type=project.folder_or_revision, metavar="VERSION|FOLDER|REV")
    command.add_argument("--again", action="store_true", help="although it was rolled back")
    command = subcommands.add(commands, "rollback", _rollback, "back to the version before")
    command.add_argument("version", nargs="?")
    command.add_argument("--reason", default="by hand")
    command = subcommands.add(commands, "verify", _verify, "hash a version's files")
    command.add_argument("version", nargs="?")


def main(given: argparse.Namespace) -> None:
    """Do what the subcommand says."""
    given.action(given)


def promote(rev: str, *, again: bool = False) -> Version:
    """Promote, and keep the folders of as many versions as params.yaml says."""
    keep = project.registry().keep
    version = versions.promote(project.ROOT, rev, again=again)
    versions.prune(project.ROOT, keep)
    return version


def _list(given: argparse.Namespace) -> None:
    rows = overview.versions(project.ROOT)
    if given.json:
        console.show_json(rows)
    elif rows:
        columns = ["version", "stage", "date", "bytes", *(title for title, _ in SHOWN), "verdict", "revision", "data"]
        words = ["stage", "date", "verdict", "revision", "data"]
        console.show(console.table(columns, map(_cells, rows), left=words))
    else:
        print("There are no versions yet: `edgepress registry promote .` makes the first.")


def _cells(row: Mapping[str, Any]) -> list[str]:
    figures = [row["figures"].get(name) for _, name in SHOWN]
    return [
        row["version"],
        row["stage"] or "-",
        row["date"][:16],
        "-" if row["bytes"] is None else f"{row['bytes']:,}",
        *("-" if value is None else f"{value:,.3f}" for value in figures),
        row["verdict"].get("verdict") or "by hand",
        row["revision"][:10],
        row["data"],
    ]


def _promote(given: argparse.Namespace) -> None:
    before = versions.current(project.ROOT, strict=False)
    version = promote(project.revision(given.what), again=given.again)
    now = project.in_use()
    change = "is in use already" if before and before.tag == now.tag else f"is in use ({now.tag})"
    text = f"{version.name} {change}: {version.revision[:10]}, {now.package['bytes']:,} bytes in {now.folder}"
    console.answer(given, asdict(now), text)


def _rollback(given: argparse.Namespace) -> None:
    before = versions.current(project.ROOT, strict=False)
    version = versions.rollback(project.ROOT, given.version, given.reason)
    now = project.in_use()
    verified = f"{len(now.package['files'])} files verified"
    text = f"{version.name} is in use again ({now.tag}), {verified}; {before.version} is withdrawn"
    console.answer(given, asdict(now), text)


def _verify(given: argparse.Namespace) -> None:
    name = given.version or project.in_use().version
    folder, version = versions.verify(project.ROOT, name), versions.find(project.ROOT, name)
    files = version.record["package"]["files"]
    console.answer(given, {"version": name, "files": files}, f"{folder}: {len(files)} files are those of {name}")
