"""Which failures of a stage a user can mend, and the sentence that says how; any other keeps its traceback."""

from __future__ import annotations

import errno
import itertools
import re
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

from dvc.exceptions import DvcException

from tasks.algorithms.errors import InputError
from tasks.runtime import accelerator, edits, lineage, refusals

if TYPE_CHECKING:
    from dvc.output import Output

    from tasks.runtime.stage import Stage

REFUSED = (InputError, OSError, sqlite3.Error, DvcException)
"""What a night, which has to record why it ended, catches: what this project, the machine or DVC refuses."""
ALTERED = (
    "is not what its stage wrote, and can't be used; `edgepress mend --cache` removes every damaged copy,"
    " and `dvc repro` then restores it or makes it again"
)
OUT_OF_MEMORY = re.compile(r"can(no|')t allocate memory|out of memory|can't start new thread", re.IGNORECASE)
"""How torch, the dynamic linker and Python's threads say it."""


def sentence(error: Exception, address: str, stage: Stage | None) -> str | None:
    """What a user can do about an error of a stage; None where only a developer can do something.

    Args:
        stage: None where it couldn't even be read from dvc.yaml.
    """
    if said := refusals.sentence(error, f"the outputs of stage {address}"):
        return said
    if said := accelerator.sentence(error, address):
        return said
    if isinstance(error, MemoryError) or refusals.number(error) == errno.ENOMEM or OUT_OF_MEMORY.search(str(error)):
        return (
            f"stage {address} ran out of memory; end other programs, lower its batch, length or windows,"
            " or take a smaller model"
        )
    if stage and (altered := altered_inputs(stage)):
        what = " ".join(str(error).split())[:200]
        return f"{' and '.join(altered)} {ALTERED} ({type(error).__name__}: {what})"
    return None


def refuse_misnoted(stage: Stage) -> None:
    """Raise an InputError where DVC noted an edit as what made an input; `tasks.runtime.edits`."""
    for found in edits.misnoted(stage.dvc.repo):
        outs = {Path(out.fs_path) for out in found.stage.outs}
        if made := [str(dep) for dep in stage.dvc.deps if outs & {Path(dep.fs_path), *Path(dep.fs_path).parents}]:
            raise InputError(
                f"{' and '.join(made)} can't be used: {' and '.join(found.differences)}, edited just when stage"
                f" {found.stage.addressing} had ended; `edgepress mend` forgets that, and `dvc repro` makes it again"
            )


def altered_inputs(stage: Stage) -> list[str]:
    """The inputs that another stage made and that are no longer as dvc.lock has them; every byte is read.

    DVC itself doesn't look: it trusts a file whose size and time are those of its note, and its whole cache.
    """
    made = [out for other in stage.dvc.repo.index.stages for out in other.outs if out.hash_info]
    pairs = [(dep, out) for dep in lineage.inputs(stage.dvc) for out in made if lineage.overlap(dep, out)]
    return list(dict.fromkeys(str(item) for item in itertools.starmap(_altered, pairs) if item))


def _altered(dep: Output, out: Output) -> Output | None:
    """What of an output is read and isn't what its stage wrote; None where it is."""
    part = dep if Path(out.fs_path) in Path(dep.fs_path).parents else out
    wanted = lineage.made(out, part)
    if wanted is None:  # DVC doesn't cache this output, so it knows the hash of the whole alone
        part, wanted = out, out.hash_info.value
    return part if lineage.md5(part, trust_state=False) != wanted else None
