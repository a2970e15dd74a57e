"""Standard output that is closed, full, or knows ASCII alone: a sentence and a code of the table, never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

FULL = "error: cannot read or write a file or its own output: the disk is full; free some space, then run again"


def run(words: list[str], stdout: str, **environment: str) -> subprocess.CompletedProcess:
    """The command in a shell, its stdout redirected."""
    command = f'"{sys.executable}" -m tasks {" ".join(words)} {stdout}'
    return subprocess.run(command, shell=True, cwd=ROOT, env={**os.environ, **environment}, capture_output=True)


@pytest.mark.parametrize("words", [["--help"], ["fit", "--help"]])
def test_a_closed_stdout_takes_everything(words: list[str]) -> None:
    done = run(words, ">&-")
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("words", [["--help"], ["fit", "--help"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_is_a_sentence(words: list[str], unbuffered: str) -> None:
    done = run(words, ">/dev/full", PYTHONUNBUFFERED=unbuffered)
    assert done.returncode in (1, 3) and done.returncode == (3 if words[0] == "fit" else 1)
    assert done.stderr.decode().splitlines() == [FULL]


def test_a_locale_without_unicode_gets_escapes() -> None:
    done = run(["--help"], "", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0 and b"usage: edgepress COMMAND \\u2026" in done.stdout and not done.stderr
