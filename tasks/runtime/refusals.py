"""What the machine refuses whoever reads or writes, as one sentence with the way out; imports nothing slow."""

from __future__ import annotations

import errno
import re
import sys

DISK = {
    errno.EACCES: "permission is denied; make it yours or change its permissions (`ls -ld`, `chmod`)",
    errno.EDQUOT: "the disk quota is used up; free some space, then run again",
    errno.EFBIG: "the largest file size allowed here is too small (`ulimit -f`); raise it, then run again",
    errno.EINTR: "the system interrupted it; run again",
    errno.EIO: "the disk does not work; use another one",
    errno.ENOSPC: "the disk is full; free some space, then run again",
    errno.EPERM: "it is not permitted; make it yours or change its attributes (`lsattr`, `chattr`)",
    errno.EROFS: "the folder is read-only; make it writable, or copy the project elsewhere",
}
"""What the machine can refuse anybody, and the way out; every other number would be a mistake of this project."""
DATABASE = {
    "SQLITE_FULL": errno.ENOSPC,
    "SQLITE_IOERR": errno.EIO,
    "SQLITE_CANTOPEN": errno.EACCES,
    "SQLITE_PERM": errno.EACCES,
    "SQLITE_READONLY": errno.EROFS,
}
"""The same in the words of SQLite, in which DVC notes the hashes of files."""
TOLD = re.compile(r"(?:\(os error |\[Errno )(\d+)[)\]]")
"""An error number in the words of safetensors, tokenizers (Rust) and shutil.copytree."""


def number(error: BaseException) -> int | None:
    """The machine's number of an error, also where a library has it in its words alone; None where it is none."""
    told = TOLD.search(str(error))
    return int(told[1]) if told else _of_database(error) or getattr(error, "errno", None)


def sentence(error: BaseException, what: str) -> str | None:
    """What was refused, and the way out; None where it is nothing of DISK.

    Args:
        what: was read or written, where the error doesn't say it.
    """
    if (found := number(error)) not in DISK:
        return None
    named = getattr(error, "filename2", None) or getattr(error, "filename", None)
    if _of_database(error):
        named = "the database in which DVC notes the hashes of files"
    return f"cannot read or write {named or what}: {DISK[found]}"


def _of_database(error: BaseException) -> int | None:
    sqlite = sys.modules.get("sqlite3")  # else it isn't its error
    if sqlite is None or not isinstance(error, sqlite.Error):
        return None
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return next((found for name, found in DATABASE.items() if getattr(sqlite, name) == code), None)
