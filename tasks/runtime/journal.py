"""The journal of a stage on disk: what a long stage had finished when it was killed, so that the next run goes on.

It lies outside the stage's outputs, which DVC removes before it starts a stage, in a folder that is named by a hash of
everything that the result depends on: inputs, code, parameters, versions of the libraries, and of the machine what
changes rounding, as they were when the stage began. Once an input was written meanwhile, nothing is added: nobody knows
which of its bytes a later entry would be of. A journal of another fingerprint is discarded, never read. The stage
runner removes the journal when the outputs are in place.

An entry is one safetensors file, `<key>.<number>.<SHA-256 of its bytes>.safetensors`, with its JSON in the metadata:
no pickle. It is written under another name, flushed to the disk and renamed, so an unfinished one is never read. One
whose bytes don't have its hash is named on stderr and dropped, and its work is done again; of each key the entry before
the last is kept too, for that case. What can't be written is no failure of the stage: it goes on without a journal.

Entries are written at most every `INTERVAL` seconds, and so seldom that writing takes at most `SHARE` of the time. A
stage that takes less than `INTERVAL` writes none.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tasks.algorithms.model.checkpoints import Entry, Saved
from tasks.runtime import files

if TYPE_CHECKING:
    from tasks.runtime.edits import Start

FORMAT = 1
"""Of the entries: raised when an algorithm's entries change their meaning while its code's hash doesn't see it."""
INTERVAL = 30.0
"""Seconds between two writes: what a kill can cost."""
SECONDS = "EDGEPRESS_JOURNAL_SECONDS"
"""Environment variable in the place of `INTERVAL`; 0 writes every entry at once. It can't change a result."""
SHARE = 0.02
"""Of the time, at most, that may go into writing."""
SHORT = 20
"""Characters of a fingerprint in a folder's name."""
ENTRY = re.compile(r"(?P<key>[\w.@+-]+)\.(?P<number>\d{8})\.(?P<digest>[0-9a-f]{64})\.safetensors")
KEY = re.compile(r"[\w.@+-]+")
UNFINISHED = ".unfinished"


class Journal:
    """A folder of entries; see `tasks.algorithms.model.checkpoints.Saved`. It may be used by several threads.

    Args:
        folder: made with the first entry.
        interval: seconds between two writes; 0: every entry at once.
        clock: seconds, rising.
        pure: whether what is kept so far comes of what the folder is named by; else it isn't written.

    Attributes:
        goes_on: whether an earlier run had left something.
    """

    def __init__(
        self,
        folder: Path,
        interval: float = INTERVAL,
        clock: Callable[[], float] = time.monotonic,
        pure: Callable[[], bool] = lambda: True,
    ) -> None:
        self.folder, self.interval, self.clock, self.pure = folder, interval, clock, pure
        self.lock = threading.RLock()
        self.files: dict[str, dict[int, Path]] = {}  # key -> number -> file
        self.pending: dict[str, tuple[Mapping[str, Tensor], Any]] = {}
        self.dropped: set[Path] = set()
        self.next = clock() + interval
        self.writes = True
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if found := ENTRY.fullmatch(path.name):
                self.files.setdefault(found["key"], {})[int(found["number"])] = path
            elif path.name.startswith(UNFINISHED):
                path.unlink()
        self.goes_on = bool(self.files)

    def load(self, key: str) -> Entry | None:
        """The last entry of this key that is whole; None if there is none. Damaged ones are named and removed."""
        with self.lock:
            if key in self.pending:
                tensors, values = self.pending[key]
                return Entry(dict(tensors), values)
            written = self.files.get(key, {})
            for number in sorted(written, reverse=True):
                try:
                    return _read(written[number])
                except (OSError, ValueError, SafetensorError) as error:
                    path = written.pop(number)
                    why = " ".join(str(error).split())
                    print(f"{path}: this entry of the journal is damaged ({why}); it is dropped", file=sys.stderr)
                    path.unlink(missing_ok=True)
        return None

    def save(self, key: str, tensors: Mapping[str, Tensor], values: Any = None) -> None:
        """Keep an entry; when writing is due, write all that are kept.

        Raises:
            ValueError: the key can't be part of a file's name.
        """
        if not KEY.fullmatch(key):
            raise ValueError(f"`{key}` is no key of a journal")
        with self.lock:
            if not self.writes:
                return
            self.pending[key] = tensors, values
            if self.due():
                self.flush()

    def due(self) -> bool:
        """Whether the time for the next write has come."""
        return self.writes and self.clock() >= self.next

    def flush(self) -> None:
        """Write all entries that are kept; where that fails, say so, and keep none from here on."""
        with self.lock:
            started = self.clock()
            if not self.pure():
                self.writes = False
                self.pending.clear()
                return
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                for key, (tensors, values) in self.pending.items():
                    self._write(key, tensors, values)
                files.sync(self.folder)
                while self.dropped:
                    self.dropped.pop().unlink(missing_ok=True)
            except OSError as error:
                print(f"the journal can't be written ({error}): the stage goes on without one", file=sys.stderr)
                self.writes = False
                self.files.clear()
                shutil.rmtree(self.folder, ignore_errors=True)  # the room may be what the outputs need
            self.pending.clear()
            now = self.clock()
            self.next = now + (max(self.interval, (now - started) / SHARE) if self.interval else 0.0)

    def part(self, name: str) -> Saved:
        """This journal for keys of their own."""
        return _Part(self, name)

    def forget(self) -> None:
        """Remove every entry."""
        self.forget_keys("")

    def forget_keys(self, prefix: str) -> None:
        """Remove the entries whose keys begin so, with the next write: what was saved instead may still wait for it."""
        with self.lock:
            for key in [key for key in self.pending if key.startswith(prefix)]:
                del self.pending[key]
            for key in [key for key in self.files if key.startswith(prefix)]:
                self.dropped |= set(self.files.pop(key).values())

    def _write(self, key: str, tensors: Mapping[str, Tensor], values: Any) -> None:
        written = self.files.setdefault(key, {})
        number = max(written, default=0) + 1
        unfinished = self.folder / f"{UNFINISHED}.{number}"
        try:
            # safetensors stores contiguous tensors; of others the strides are noted, as products round by layout
            strides = {name: list(tensor.stride()) for name, tensor in tensors.items() if _strided(tensor)}
            described = json.dumps({"values": values, "strides": strides})
            held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(held, unfinished, {"journal": described})
        except SafetensorError as error:  # a full disk, in the words of Rust
            raise OSError(str(error)) from error
        path = self.folder / f"{key}.{number:08d}.{files.sha256(unfinished)}.safetensors"
        files.put(unfinished, path)
        written[number] = path
        self.dropped.discard(path)
        for old in [old for old in written if old < number - 1]:
            written.pop(old).unlink(missing_ok=True)


class _Part:
    """A journal's entries under keys that begin with a part's name."""

    def __init__(self, journal: Journal, prefix: str) -> None:
        if not KEY.fullmatch(prefix):
            raise ValueError(f"`{prefix}` is no name for a part of a journal")
        self.journal, self.prefix = journal, prefix

    def load(self, key: str) -> Entry | None:
        return self.journal.load(f"{self.prefix}+{key}")

    def save(self, key: str, tensors: Mapping[str, Tensor], values: Any = None) -> None:
        self.journal.save(f"{self.prefix}+{key}", tensors, values)

    def due(self) -> bool:
        return self.journal.due()

    def part(self, name: str) -> Saved:
        return _Part(self.journal, f"{self.prefix}+{name}")

    def forget(self) -> None:
        self.journal.forget_keys(f"{self.prefix}+")


def open_for(start: Start, folder: Path, parameters: bool = True) -> Journal:
    """The journal of a stage for the state that its inputs, parameters, code and libraries were in when it began.

    Args:
        folder: of this stage's journals; those of other fingerprints are removed.
        parameters: False: whatever the parameters; what the entries depend on of them has to be in their keys.
    """
    name = fingerprint(start, parameters)
    for other in sorted(folder.iterdir()) if folder.is_dir() else ():
        if other.name != name:
            print(f"{other}: the journal of other inputs, parameters or code is discarded", file=sys.stderr)
            shutil.rmtree(other, ignore_errors=True) if other.is_dir() else other.unlink()
    journal = Journal(folder / name, float(os.environ.get(SECONDS, INTERVAL)), pure=start.inputs_are_same)
    if journal.files:
        left = "what an interrupted run has left" if parameters else "the answers that earlier runs have left"
        print(f"{start.stage.addressing}: goes on with {left} in {journal.folder}", flush=True)
    return journal


def fingerprint(start: Start, parameters: bool = True) -> str:
    """A hash of everything that the result of the stage depends on; without its parameters where that is asked."""
    described = {"format": FORMAT, "stage": start.stage.addressing, "machine": machine(), **start.identity}
    if not parameters:  # two devices round differently: no answer of one is one of the other
        described["parameters"] = {"device": described["parameters"].get("device")}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:SHORT]


def machine() -> dict[str, Any]:
    """What of this machine changes how results are rounded."""
    return {
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _read(path: Path) -> Entry:
    """The entry in this file.

    Raises:
        ValueError: its bytes don't have the hash of its name.
    """
    if files.sha256(path) != ENTRY.fullmatch(path.name)["digest"]:
        raise ValueError("its bytes don't have the hash that it was written with")
    with safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["journal"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dict
    strides = described["strides"]
    return Entry({name: _own(tensor, strides.get(name)) for name, tensor in tensors.items()}, described["values"])


def _own(tensor: Tensor, strides: list[int] | None) -> Tensor:
    """A copy in memory, aligned as torch's own, with these strides."""
    if strides is None:
        return tensor.clone()
    return torch.empty_strided(tuple(tensor.shape), tuple(strides), dtype=tensor.dtype).copy_(tensor)


def _strided(tensor: Tensor) -> bool:
    """Whether it lies in memory in another order, each value in a place of its own."""
    return not tensor.is_contiguous() and 0 not in tensor.stride()
