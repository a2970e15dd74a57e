"""`edgepress COMMAND …`: find the command, read its arguments, run it, and end with the code of the table.

This is the one place that prints an error and the one that knows how a command ends. Commands raise `InputError` for
what a user can mend; what DVC and the operating system refuse becomes a sentence, too. Anything else is a mistake of
this project and keeps its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import IO, NoReturn

from tasks.algorithms.errors import InputError
from tasks.cli import account, exit_codes, project, quiet
from tasks.cli.commands import COMMANDS, GROUPS, Command
from tasks.parameters import parameter_file
from tasks.runtime import lean, refusals

ERROR = "error: "
"""Begins each line of an error; the flow finds a stage's own sentence by it."""


class WrongCall(Exception):
    """A command was called wrongly; has its usage, and a sentence."""

    def __init__(self, usage: str, sentence: str) -> None:
        super().__init__(sentence)
        self.usage = usage


class Parser(argparse.ArgumentParser):
    """A parser, and the class of its subcommands' parsers, that leaves printing and exit codes to `main`."""

    def error(self, message: str) -> NoReturn:
        """Raise `WrongCall`."""
        raise WrongCall(self.format_usage(), message)

    def _print_message(self, message: str, file: IO[str] | None = None) -> None:
        """Print a help text; argparse's own would end with 0 where stdout can't be written."""
        (file or sys.stdout).write(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script; returns the exit code.

    Args:
        arguments: of the command line, without the program's name; None: this process's.
    """
    _open_streams()
    account.complete()
    words = sys.argv[1:] if arguments is None else list(arguments)
    command = COMMANDS.get(words[0]) if words else None
    try:
        code = _run(command, words[1:]) if command else _without_command(words)
        sys.stdout.flush()
        return code
    except WrongCall as error:
        print(error.usage, end="", file=sys.stderr)
        print_error(error)
        return command.wrong_call if command else exit_codes.WRONG_CALL
    except BrokenPipeError:
        _drop_stdout()
        return exit_codes.READER_GONE
    except KeyboardInterrupt as error:
        if str(error):
            print_error(error)
        return exit_codes.INTERRUPTED
    except InputError as error:
        print_error(error)
    except Exception as error:
        refused = refusals.sentence(error, "a file or its own output")
        if (command and command.told) or not (refused or _is_refusal(error)):
            raise
        print_error(parameter_file.told(error) or refused or " ".join(str(error).split()))
        try:
            sys.stdout.flush()  # what the command has said
        except OSError:  # it was stdout's own, such as a full disk
            _drop_stdout()
    return command.refused if command else exit_codes.REFUSED


def print_error(error: object) -> None:
    """Print a sentence, or one a line, on stderr."""
    print("\n".join(f"{ERROR}{line}" for line in str(error).splitlines()), file=sys.stderr, flush=True)


def _open_streams() -> None:
    """Let both streams take any text, whatever the locale; a closed one takes it, too, and shows nothing."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  for as long as the process
        elif hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def _drop_stdout() -> None:
    """Send what is left for stdout nowhere, else Python's last flush complains."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a file of its own
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(command: Command, words: list[str]) -> int:
    quiet.apply(bars=command.module.startswith("flows."))
    lean.apply()
    module = importlib.import_module(command.module)
    first, _, rest = (module.__doc__ or "").partition("\n")
    parser = Parser(
        prog=f"edgepress {command.name}",
        description=f"{first.partition(': ')[2] or first}\n{rest}".rstrip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.arguments(parser)
    try:
        given = parser.parse_args(words)
    except SystemExit as end:  # of --help
        return int(end.code or 0)
    if command.project:
        project.enter()
    return module.main(given) or exit_codes.DONE


def _without_command(words: list[str]) -> int:
    if words and words[0] in ("-h", "--help"):
        print(overview())
        return exit_codes.DONE
    near = difflib.get_close_matches(words[0], COMMANDS, n=1) if words else []
    hint = f"did you mean {near[0]}?" if near else "`edgepress --help` lists all"
    said = f"there is no command {words[0] or repr(words[0])}" if words else "a command is missing"
    raise WrongCall("usage: edgepress COMMAND …\n", f"{said}; {hint}")


def overview() -> str:
    """What `edgepress --help` prints."""
    lines = [
        "usage: edgepress COMMAND …, `edgepress COMMAND --help` for one of them",
        "",
        "Compress a causal language model until it fits a small device, and prove every byte of the result.",
    ]
    for group in GROUPS:
        shown = [f"  {one.name:<13}{one.help}" for one in COMMANDS.values() if one.group == group]
        lines += ["", f"{group}:", *shown]
    return "\n".join([*lines, "", "exit codes:", *(exit_codes.__doc__ or "").splitlines()[2:]])


def _is_refusal(error: Exception) -> bool:
    """Whether the operating system, DVC or its database refused; asked without importing them."""
    known = [(sys.modules.get(name), kind) for name, kind in (("dvc.exceptions", "DvcException"), ("sqlite3", "Error"))]
    return isinstance(error, (OSError, *(getattr(module, kind) for module, kind in known if module)))
