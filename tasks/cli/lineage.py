"""`edgepress lineage`: who made an artifact, from what, with which code, when; and whether it is still what they made.

    edgepress lineage show PATH      the tree from an artifact to the base weights and the corpus
    edgepress lineage verify PATH    hash everything on that way again; name what was altered or is missing
    edgepress lineage adopt STAGE    make the record of this machine's run the tracked one: its times, its speeds

Exit codes: 0; `verify` 1 where something was altered or is missing; 2 refused, or a wrong call.
"""

from __future__ import annotations

import argparse
from typing import Any

from dvc.exceptions import DvcException
from dvc.repo import Repo

from tasks.algorithms.errors import InputError
from tasks.cli import console, exit_codes, project, subcommands
from tasks.runtime import lineage, provenance


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    commands = parser.add_subparsers(required=True, metavar="show | verify | adopt")
    for name, action, what in (("show", _show, "print the tree"), ("verify", _verify, "hash all of it again")):
        command = subcommands.add(commands, name, action, what)
        command.add_argument("path", type=project.path, metavar="PATH", help="a file or folder that a stage makes")
    command = subcommands.add(commands, "adopt", _adopt, "make the record of this machine's run the tracked one")
    command.add_argument("path", metavar="STAGE", help="a stage of dvc.yaml, or an item of a matrix")


def main(given: argparse.Namespace) -> int:
    """Show, verify or adopt."""
    try:
        with Repo() as repo:
            content, lines, code = given.action(repo, given.path)
    except (DvcException, OSError) as error:
        raise InputError(f"cannot read the lineage: {' '.join(str(error).split())}") from error
    console.answer(given, {"path": given.path} | content, "\n".join(lines))
    return code


def _show(repo: Repo, path: str) -> tuple[dict[str, Any], list[str], int]:
    """(what --json prints, the lines of text, the exit code)."""
    return {"stages": provenance.described(repo, path)}, provenance.show(repo, path), exit_codes.DONE


def _verify(repo: Repo, path: str) -> tuple[dict[str, Any], list[str], int]:
    findings, hashed = provenance.verify(repo, path)
    faults = sum(finding.fault for finding in findings)
    content = {"hashed": hashed, "ok": not faults, "findings": [finding._asdict() for finding in findings]}
    lines = [f"{finding.stage}: {'' if finding.fault else 'note: '}{finding.sentence}" for finding in findings]
    lines.append(f"{path}: {hashed} files and folders hashed, {f'{faults} altered or missing' if faults else 'ok'}")
    return content, lines, exit_codes.ALTERED if faults else exit_codes.DONE


def _adopt(repo: Repo, name: str) -> tuple[dict[str, Any], list[str], int]:
    stage = repo.stage.load_one(name=name)
    entry, path = lineage.adopt(stage), lineage.record_path(stage).relative_to(repo.root_dir)
    line = f"{path} is that of {entry.get('started')}, on this machine; `edgepress run` brings it into the report"
    return {"stage": name, "record": entry}, [line], exit_codes.DONE
