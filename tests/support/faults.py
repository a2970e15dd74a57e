"""Let one call of a process to the kernel fail, or end the process there: every write, rename, fsync, mkdir, … in turn.

The kernel itself holds the calls of the process and of all that it starts (seccomp with user notification, Linux 5.5),
so those of Rust, C and git are reached like Python's, and nothing has to be installed. Only calls on files below one
folder count; the kernel does the others, and every one that isn't chosen, as ever.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import select
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

KILL, FULL = "SIGKILL", "full"
FAULTS = ("ENOSPC", "EIO", "EACCES", "EINTR", KILL, FULL)
"""One call fails so; the process ends before it; or no byte can be written any more from it on."""

FILE, PATH, AT, PATHS, PATHS_AT = "file", "path", "at", "paths", "paths at"
"""What a call's arguments are: a descriptor; a path; a folder and a path; two paths; two folders, each with a path."""
CALLS = {  # name: what its arguments are, its number on x86_64 and on aarch64 (None: there is none)
    "write": (FILE, 1, 64),
    "pwrite64": (FILE, 18, 68),
    "writev": (FILE, 20, 66),
    "pwritev": (FILE, 296, 70),
    "sendfile": (FILE, 40, 71),
    "copy_file_range": (FILE, 326, 285),
    "fallocate": (FILE, 285, 47),
    "ftruncate": (FILE, 77, 46),
    "fsync": (FILE, 74, 82),
    "fdatasync": (FILE, 75, 83),
    "fchmod": (FILE, 91, 52),
    "truncate": (PATH, 76, 45),
    "mkdir": (PATH, 83, None),
    "rmdir": (PATH, 84, None),
    "unlink": (PATH, 87, None),
    "chmod": (PATH, 90, None),
    "mkdirat": (AT, 258, 34),
    "unlinkat": (AT, 263, 35),
    "fchmodat": (AT, 268, 53),
    "utimensat": (AT, 280, 88),
    "rename": (PATHS, 82, None),
    "link": (PATHS, 86, None),
    "symlink": (PATHS, 88, None),
    "renameat": (PATHS_AT, 264, 38),
    "linkat": (PATHS_AT, 265, 37),
    "renameat2": (PATHS_AT, 316, 276),
    "open": (PATH, 2, None),
    "openat": (AT, 257, 56),
}
MACHINES = {"x86_64": (1, 0xC000003E, 317), "aarch64": (2, 0xC00000B7, 277)}
"""Machine: its column of CALLS, how the kernel calls it, and its number of `seccomp`."""
FLAGS = {"open": 24, "openat": 32}
"""Calls that count where they open to write: where their flags are in struct seccomp_data."""
FILLING = ("write", "pwrite64", "writev", "pwritev", "sendfile", "copy_file_range", "fallocate")
"""Calls that take room for bytes; names still find some."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
NOTIFIED, ALLOWED = 0x7FC00000, 0x7FFF0000
RECEIVE, SEND = 0xC0502100, 0xC0182101
CONTINUE = 1
HERE = -100
"""In a folder's place: the working folder."""


class Call(NamedTuple):
    """A call on a file below the folder."""

    name: str
    path: str

    def __str__(self) -> str:
        return f"{self.name}({self.path})"


class Ended(NamedTuple):
    """How a function ended in its own process.

    Attributes:
        code: the exit code; negative: the signal.
        said: on stdout and stderr.
        calls: those below the folder, in their order.
        hit: the one that failed; None: there were not as many.
    """

    code: int
    said: str
    calls: list[Call]
    hit: Call | None

    @property
    def told(self) -> bool:
        """Whether it did what it should, or said in a sentence why not."""
        return self.code == 0 or ("error: " in self.said.lower() and "Traceback" not in self.said)


def run(function: Callable[[], Any], folder: Path, fault: str | None = None, number: int = 0) -> Ended:
    """Run a function in a process of its own, and let one of its calls below a folder fail.

    Args:
        function: gives the exit code where it returns a number.
        fault: one of FAULTS; None: all succeed.
        number: of the call, from 0.
    """
    ours, theirs = socket.socketpair()
    output = os.memfd_create("said")
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _become(function, output, theirs)
    theirs.close()
    try:
        _, (listener, *_), _, _ = socket.recv_fds(ours, 1, 1)
    except ValueError:
        os.waitpid(child, 0)
        raise OSError(f"the calls can't be held: {os.pread(output, 10_000, 0).decode()}") from None
    with contextlib.closing(ours):
        calls, hit = _supervise(listener, child, os.path.realpath(folder), fault, number)
    _, status = os.waitpid(child, 0)
    said = os.pread(output, os.fstat(output).st_size, 0).decode("utf-8", "replace")
    for handle in (listener, output):
        os.close(handle)
    return Ended(os.waitstatus_to_exitcode(status), said, calls, hit)


def _become(function: Callable[[], Any], output: int, parent: socket.socket) -> None:
    """The child: hold its calls, then do as it is told; never returns."""
    code = 70
    try:
        os.setsid()
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (open(handle, "w", encoding="utf-8", closefd=False) for handle in (1, 2))  # noqa: SIM115
        listener = _hold()
        socket.send_fds(parent, [b"x"], [listener])
        os.close(listener)  # else it would wait for itself when it ends
        parent.close()
        result = function()
        code = result if isinstance(result, int) else 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1  # else a text
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _hold() -> int:
    """Let the kernel ask before each of CALLS of this process and its children; returns the descriptor that it asks."""
    column, machine, seccomp = MACHINES[platform.machine()]
    library = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, mode_filter, new_listener = 38, 1, 8
    program = b"".join(_instructions(column, machine))
    held = ctypes.create_string_buffer(program)
    pointer = struct.pack("@HP", len(program) // 8, ctypes.addressof(held))
    arguments = [ctypes.c_long(value) for value in (seccomp, mode_filter, new_listener)]
    if library.prctl(no_new_privileges, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    if (listener := library.syscall(*arguments, pointer)) < 0:
        raise OSError(ctypes.get_errno(), "seccomp with user notification")
    return listener


def _instructions(column: int, machine: int) -> list[bytes]:
    """The filter: ask about CALLS, of open those that write; allow all else. Offsets are of struct seccomp_data."""
    load, equal, any_bit, end = 0x20, 0x15, 0x45, 0x06
    numbers = {row[column]: name for name, row in CALLS.items() if row[column] is not None}
    code = [(load, 0, 0, 4), (equal, 1, 0, machine), (end, 0, 0, ALLOWED), (load, 0, 0, 0)]
    for number, name in numbers.items():
        flags = [(load, 0, 0, FLAGS[name]), (any_bit, 1, 0, WRITING), (end, 0, 0, ALLOWED)] if name in FLAGS else []
        code += [(equal, 0, len(flags) + 1, number), *flags, (end, 0, 0, NOTIFIED)]
    return [struct.pack("=HBBI", *instruction) for instruction in [*code, (end, 0, 0, ALLOWED)]]


def _supervise(
    listener: int, child: int, folder: str, fault: str | None, number: int
) -> tuple[list[Call], Call | None]:
    """Answer the kernel until no process is left that it asks about."""
    column = MACHINES[platform.machine()][0]
    known = {row[column]: (name, row[0]) for name, row in CALLS.items()}
    calls: list[Call] = []
    hit = None
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    while not poll.poll()[0][1] & select.POLLHUP:
        asked = bytearray(80)
        try:
            fcntl.ioctl(listener, RECEIVE, asked)
        except (FileNotFoundError, InterruptedError):  # it was killed meanwhile
            continue
        identity, pid, _, called, _, _, *arguments = struct.unpack("=QIIiIQ6Q", asked)
        name, kind = known[called]
        path = _path(pid, kind, arguments)
        error = 0
        if path == folder or path.startswith(folder + "/"):
            calls.append(Call(name, os.path.relpath(path, folder)))
            if fault and hit is None and len(calls) > number and (fault != FULL or name in FILLING):
                hit = calls[-1]
                if fault == KILL:
                    os.killpg(child, signal.SIGKILL)
                    continue
                error = errno.ENOSPC if fault == FULL else getattr(errno, fault)
            elif hit and fault == FULL and name in FILLING:
                error = errno.ENOSPC
        with contextlib.suppress(FileNotFoundError):
            fcntl.ioctl(listener, SEND, struct.pack("=QqiI", identity, 0, -error, 0 if error else CONTINUE))
    return calls, hit


def _path(pid: int, kind: str, arguments: list[int]) -> str:
    """What a call is about; of two paths the second, which it makes."""
    try:
        if kind == FILE:
            return os.readlink(f"/proc/{pid}/fd/{arguments[0]}")
        place = {PATH: 0, AT: 1, PATHS: 1, PATHS_AT: 3}[kind]
        if kind in (PATH, PATHS):
            return _joined(pid, HERE, arguments[place])
        return _joined(pid, ctypes.c_int(arguments[place - 1] & 0xFFFFFFFF).value, arguments[place])
    except OSError:  # it ended meanwhile, or the call is a wrong one
        return ""


def _joined(pid: int, folder: int, address: int) -> str:
    if not address:  # utimensat of a descriptor
        return os.readlink(f"/proc/{pid}/fd/{folder}")
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        text = b""
        while b"\0" not in text and len(text) < 4096:  # a page at most, as the next one may not be there
            memory.seek(address + len(text))
            text += memory.read(4096 - (address + len(text)) % 4096)
    path = os.fsdecode(text.split(b"\0")[0])
    base = os.readlink(f"/proc/{pid}/cwd" if folder == HERE else f"/proc/{pid}/fd/{folder}")
    return os.path.normpath(os.path.join(base, path))
