"""Files that are written whole or not at all, in the one form that texts, tables and hashes have here; without torch.

Bytes go to a temporary file, the disk has them, and then the file takes its name in one step: whoever reads sees the
old file or the new one, whenever this is interrupted.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    import pandas as pd


@contextlib.contextmanager
def replacing(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """A path to write to: what lies there at the end takes the place of `path`; after an exception it is removed.

    Args:
        folder: where it lies meanwhile, on the same file system; None: beside `path`.
    """
    unfinished = (path.parent if folder is None else folder) / f".{path.name}.{os.getpid()}.tmp"
    try:
        yield unfinished
        put(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def remove_left(path: Path) -> None:
    """Remove what those who were killed left of a file that they were `replacing`; only where nobody writes it now."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        left.unlink(missing_ok=True)


def remove_dead(folder: Path) -> None:
    """Remove what killed processes left in a folder of files that they were `replacing`; others may write there now."""
    for left in folder.glob(".*.tmp"):
        process = left.name.split(".")[-2]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            left.unlink(missing_ok=True)


def put(unfinished: Path, path: Path) -> None:
    """Give a file its name, once the disk has its bytes; a file of that name is replaced."""
    sync(unfinished)
    os.replace(unfinished, path)


def sync(path: Path) -> None:
    """Wait until the disk has the bytes of a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes as they are."""
    with replacing(path) as unfinished:
        unfinished.write_bytes(content)


def json_text(content: Any) -> str:
    """JSON whose bytes depend on its content alone."""
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def write_json(path: Path, content: Any) -> None:
    """Write JSON whose bytes depend on its content alone."""
    write_text(path, json_text(content))


def write_csv(
    path: Path, table: pd.DataFrame, float_format: str | None = None, columns: Sequence[str] | None = None
) -> None:
    """Write a table without its index, lines ended by a single line feed.

    Args:
        float_format: "%.9g", say; None: as many digits as a number has.
        columns: these alone, in this order; None: all.
    """
    chosen = None if columns is None else list(columns)
    with replacing(path) as unfinished:
        table.to_csv(unfinished, columns=chosen, index=False, lineterminator="\n", float_format=float_format)


def write_header(path: Path, columns: Sequence[str]) -> None:
    """Write the bytes of `write_csv` for a table without rows, and without pandas."""
    write_text(path, ",".join(columns) + "\n")


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
