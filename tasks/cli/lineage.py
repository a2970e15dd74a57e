"""`edgepress lineage`: who made an artifact, from what, with which code, when; and whether it is still what they made.

    edgepress lineage show PATH      the tree from an artifact to the base weights and the corpus
    edgepress lineage verify PATH    hash everything on that way again; name what was altered or is missing

Exit codes: 0; `verify` 1 where something was altered or is missing; 2 refused, or a wrong call.
"""

from __future__ import annotations

import argparse
from typing import Any

from dvc.exceptions import DvcException
from dvc.repo import Repo

from tasks.algorithms.errors import InputError
from tasks.cli import console, exit_codes, project, subcommands
from tasks.runtime import provenance


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    commands = parser.add_subparsers(required=True, metavar="show | verify")
    for name, action, what in (("show", _show, "print the tree"), ("verify", _verify, "hash all of it again")):
        command = subcommands.add(commands, name, action, what)
        command.add_argument("path", type=project.path, metavar="PATH", help="a file or folder that a stage makes")


def main(given: argparse.Namespace) -> int:
    """Show or verify."""
    try:
        with Repo() as repo:
            content, lines, code = given.action(repo, given.path)
    except (DvcException, OSError) as error:
        raise InputError(f"cannot read the lineage: {' '.join(str(error).split())}") from error
    console.answer(given, {"path": given.path, **content}, "\n".join(lines))
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
