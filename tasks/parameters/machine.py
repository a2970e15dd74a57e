"""What Linux says of this machine: the memory that this process may use at most, and the processor's name.

It is read before a stage runs (`preflight`), so it imports nothing that takes memory or time.
"""

from __future__ import annotations

import re
from pathlib import Path

CONTROL_GROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
PROCESSOR = Path("/proc/cpuinfo")


def memory_limit() -> int | None:
    """Bytes that the control group of this process allows; None where there is no limit."""
    limits = []
    for path in CONTROL_GROUPS:
        try:
            limit = path.read_text(encoding="utf-8").strip()
        except OSError:
            continue
        if limit.isdigit():  # otherwise "max"
            limits.append(int(limit))
    return min(limits, default=None)


def processor() -> str | None:
    """The processor's name; None where Linux doesn't tell it."""
    try:
        text = PROCESSOR.read_text(encoding="utf-8")
    except OSError:
        return None
    named = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return named[1].strip() if named else None
