"""heap: what a process holds falls when freed memory is given back, and stays where there is less than asked for."""

from __future__ import annotations

import subprocess
import sys

from tests.support.paths import ROOT

SCRIPT = """
import ctypes, gc, sys
from pathlib import Path
from tasks.algorithms.model import heap

def held():
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
pieces = [libc.malloc(100_000) for _ in range(1000)]  # below the size from which glibc maps
for piece in pieces:
    ctypes.memset(piece, 1, 100_000)
for piece in pieces[:-1]:  # the last one keeps the heap's end where it is
    libc.free(piece)
before = held()
heap.return_freed(int(sys.argv[1]))
print(before - held())
"""


def given_back(above: int) -> int:
    """Bytes of 99.9 MB of gaps that a process of its own no longer holds."""
    call = [sys.executable, "-c", SCRIPT, str(above)]
    return int(subprocess.run(call, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


def test_gaps_are_given_back() -> None:
    assert given_back(0) > 90 * 10**6
    assert given_back(50 * 10**6) > 90 * 10**6


def test_less_than_the_limit_stays() -> None:
    assert given_back(200 * 10**6) < 5 * 10**6
