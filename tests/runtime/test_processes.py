"""What glibc does with freed memory, by a process that frees every other one of its pieces."""

import subprocess
import sys

import pytest

GAPS = """
import ctypes, re
from tasks.runtime import processes

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def made(size):
    piece = libc.malloc(size)
    libc.memset(piece, 1, size)
    return piece

def held():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

{first}
libc.free(made(30 * 2**20))  # the largest so far
before = held()
pieces = [made(6 * 2**20) for _ in range(20)]
for piece in pieces[::2]:
    libc.free(piece)
print(held() - before)
"""


@pytest.mark.parametrize(
    ("first", "pieces"), [("processes.return_large_pieces()", 10), ("", 20)], ids=["returned", "as glibc does"]
)
def test_freed_pieces_between_others_are_returned(first, pieces):
    run = subprocess.run(
        [sys.executable, "-c", GAPS.replace("{first}", first)], capture_output=True, text=True, check=True, timeout=60
    )
    assert abs(int(run.stdout) / 2**20 - 6 * pieces) < 3
