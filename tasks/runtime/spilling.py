"""Hidden states that would take a large part of the free memory lie in a file in the stage's scratch folder instead.

The file is mapped into memory, so that Linux writes out what it has no room for, and has no name: it is gone with the
tensor, or with the process, whatever ends it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import streaming
from tasks.parameters import needs

SHARE = 0.25
"""Of the memory that is free when they are to be held: up to that they are."""


@contextlib.contextmanager
def spilling(folder: Path, limit: int | None = None) -> Iterator[None]:
    """Within this context the walk over a model's blocks keeps its hidden states in `folder` if they are many.

    Args:
        limit: bytes up to which they stay in memory; None: `SHARE` of what is free then.

    Raises:
        InputError: (in the walk) they have no room on the disk either.
    """

    def spill(size: int) -> Any:
        if size <= (SHARE * needs.available_memory() if limit is None else limit):
            return None
        import torch  # here, as not every stage needs it

        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if size > free:
            raise InputError(
                f"hidden states of {size} bytes are too many for memory, and on the disk of {folder} {free} are free: "
                "lower calibrate.windows or calibrate.length, or free some"
            )
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            os.truncate(file.name, size)
            return torch.from_file(
                file.name, shared=True, size=size, dtype=torch.uint8
            )  # the mapping outlives the name

    token = streaming.SPILL.set(spill)
    try:
        yield
    finally:
        streaming.SPILL.reset(token)
