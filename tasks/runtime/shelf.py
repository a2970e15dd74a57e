"""What several stages compute alike: whoever comes first leaves it on this machine, for the others and for later runs.

A shelf is a folder that is named by a hash of all that its entries depend on: inputs, what else is given, code,
versions of the libraries, and of the machine what changes rounding. So nothing of it changes a result: an entry is what
the one who finds it would have computed. An entry is one safetensors file, `<key>.<SHA-256 of its bytes>.safetensors`,
written under another name and renamed; several stages may write the same one. What can't be read is computed again,
what can't be written is not kept: a full disk, or more than `ROOM` bytes, is no failure. Once an input was written
meanwhile nothing is added, as in a journal. It lies outside the outputs; a folder of another hash is removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from tasks.algorithms.model.checkpoints import Entry
from tasks.runtime import code, files, journal, locks

if TYPE_CHECKING:
    from tasks.runtime.edits import Start

FORMAT = 1
"""Of the entries."""
ROOM = 2**30
"""Bytes that a shelf takes at most; no more than a tenth of what the disk has free, either."""
ENDING = ".safetensors"


class Shelf:
    """Entries by key, as `tasks.algorithms.model.checkpoints.Saved` has them, but of tensors alone.

    Args:
        folder: made with the first entry.
        pure: whether what is kept now comes of what the folder is named by; else it isn't written.
    """

    def __init__(self, folder: Path, pure: Callable[[], bool] = lambda: True) -> None:
        self.folder, self.pure = folder, pure

    def load(self, key: str) -> Entry | None:
        """The entry of this key, whoever wrote it; None if there is none whose bytes are whole."""
        for path in self.folder.glob(f"{key}.*{ENDING}"):
            with contextlib.suppress(OSError, SafetensorError):
                content = path.read_bytes()
                if path.name == _name(key, content):
                    return Entry(load(content), None)
        return None

    def save(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep an entry, if there is room for it."""
        content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            held = sum(path.stat().st_size for path in self.folder.iterdir())
            if held + len(content) <= min(ROOM, shutil.disk_usage(self.folder).free // 10) and self.pure():
                files.write_bytes(self.folder / _name(key, content), content)

    def once(self, key: str, compute: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """The tensors of this key; where there are none, they are computed, while others who want them wait."""
        if found := self.load(key):
            return found.tensors
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # where nothing can be written nobody waits
                stack.enter_context(locks.held(self.folder.with_suffix(".lock"), "the shelf is in use", wait=True))
            if found := self.load(key):
                return found.tensors
            tensors = compute()
            self.save(key, tensors)
            return tensors


def open_for(start: Start, purpose: Path, module: str, inputs: Mapping[str, str | None], **given: Any) -> Shelf:
    """The shelf of what these inputs and facts give; those of others with the same purpose are removed.

    Args:
        purpose: folder of the shelves of this purpose.
        module: of `tasks`, whose code the entries depend on, by all that it imports ("compression/recovery_training").
        inputs: name -> hash.
        given: what else the entries depend on.
    """
    described = {
        "format": FORMAT,
        "code": code.listing(module, Path(start.stage.repo.root_dir)),
        "inputs": dict(inputs),
        "given": given,
        "machine": journal.machine(),
        "packages": start.identity["packages"],
    }
    name = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[: journal.SHORT]
    for other in purpose.iterdir() if purpose.is_dir() else ():
        if other.stem != name:
            shutil.rmtree(other, ignore_errors=True) if other.is_dir() else other.unlink(missing_ok=True)
    files.remove_dead(purpose / name)
    return Shelf(purpose / name, pure=start.inputs_are_same)


def _name(key: str, content: bytes) -> str:
    return f"{key}.{hashlib.sha256(content).hexdigest()}{ENDING}"
