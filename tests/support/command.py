"""`edgepress` called within the tests' own process."""

from __future__ import annotations

import pytest

from tasks.cli import dispatch


def edgepress(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit code, standard output, errors)."""
    capsys.readouterr()
    code = dispatch.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()
