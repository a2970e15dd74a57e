"""The processes of the stages that run below this one."""

from __future__ import annotations

import contextlib

import psutil

STAGE = "flows.stage"
"""The module that dvc.yaml runs."""


def stages() -> list[psutil.Process]:
    """The stages' own processes, without the shells that DVC starts them by.

    $SHELL may stay above its stage (dash) or become it (bash). A shell that ends before its stage would let DVC go on
    while the stage still puts its outputs back.
    """
    return [process for process in psutil.Process().children(recursive=True) if _is_stage(process)]


def _is_stage(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return STAGE in process.cmdline()  # a shell has the whole command as one word
    return False
