"""A stage ends with the `dvc repro` that started it: an orphan would burn CPU, and overwrite a later run's outputs."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

import psutil

from tasks.algorithms.errors import InputError
from tasks.runtime import locks, processes, warm


def end_with_it(address: str) -> None:
    """End this process with DVC's, which runs this stage.

    Linux does that at once for a child. Where a shell that stays lies between (fish), a thread looks for DVC.

    Raises:
        InputError: DVC ended while this process was starting.
    """
    processes.die_with_parent()
    if os.environ.get("DVC_STAGE") != address or not (users := locks.users_of_dvc()):  # not started by DVC
        return
    writing = {entry.get("pid") for entry in users.get("write", {}).values()}
    above = [process for process in psutil.Process(warm.stage_process()).parents() if process.pid in writing]
    if writing and not above:
        raise InputError(f"the `dvc repro` that started stage {address} has ended; run it again")
    if above:
        threading.Thread(target=_wait_for_the_end, args=(above[0],), daemon=True).start()


def _wait_for_the_end(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
