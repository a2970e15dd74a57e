"""A stage ends with the process that started it."""

from __future__ import annotations

import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.support.toy_stages import Toy


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_stage_ends_with_the_process_that_started_it(toy: Toy) -> None:
    toy.set(how="wait")
    parent = textwrap.dedent("""
        import os, subprocess, sys, time
        child = subprocess.Popen([sys.executable, "run.py", "toy"], stdout=subprocess.DEVNULL)
        while not os.path.exists("started"):
            time.sleep(0.05)
        print(child.pid, flush=True)
        os._exit(0)
    """)
    child = int(toy("-c", parent).stdout)
    deadline = time.monotonic() + 20
    while alive(child):
        assert time.monotonic() < deadline, "the stage outlived its parent"
        time.sleep(0.05)


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"
