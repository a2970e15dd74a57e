"""What Linux says of this process, and does to it; imports nothing that would count in a measurement."""

from __future__ import annotations

import ctypes
import re
import signal
import sys
from pathlib import Path


def peak() -> int:
    """Bytes of memory that this process held at most so far; getrusage's figure would begin at its parent's."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[1]) * 2**10


def die_with_parent() -> None:
    """Ask Linux to end this process with the one that started it, however that ends."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL("libc.so.6").prctl(pr_set_pdeathsig, signal.SIGKILL)
