"""Commands of several subcommands: each has --json, and an action that is called with what was given."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def add(commands: Any, name: str, action: Callable, what: str) -> argparse.ArgumentParser:
    """The parser of a new subcommand.

    Args:
        commands: of `add_subparsers`.
        action: what `given.action` becomes.
        what: it does, in words.
    """
    command = commands.add_parser(name, help=what, description=what)
    command.add_argument("--json", action="store_true", help="print an object instead of text")
    command.set_defaults(action=action)
    return command
