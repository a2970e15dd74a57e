"""The tensors of a model folder, in one file or several: known by their headers, read one by one.

A file is mapped into memory, and what has been read of a mapping counts as the process's until it is closed: so it is
open for `PIECE` bytes and no longer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tasks.algorithms.errors import InputError
from tasks.models import model_files, tensor_files, tensor_headers
from tasks.models.tensor_headers import Entry

NOT_WEIGHTS = "rotary_emb.inv_freq"
"""Old Llama checkpoints store this buffer; transformers computes it."""
PIECE = 2**25
"""Bytes that are read from an open file."""

Shapes = Mapping[str, tuple[int, ...]]


class StoredTensors:
    """The tensors of a model folder.

    Attributes:
        folder: theirs.
        entries: name -> what the header says of it; of a turned one, with its sides the other way round.

    Args:
        turned: names of matrices that the files keep as [in, out], and that are to be read as [out, in].

    Raises:
        InputError: there are no weights as safetensors, or a file is missing or damaged.
    """

    def __init__(self, folder: Path, turned: Collection[str] = ()) -> None:
        self.folder, self._turned = folder, frozenset(turned)
        self.entries: dict[str, Entry] = {
            name: turn(entry) if name in self._turned else entry
            for name, entry in tensor_headers.entries(folder).items()
        }
        self._places = {name: path for path in model_files.tensors(folder) for name in tensor_headers.header(path)[1]}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> dimensions."""
        return {name: tuple(entry.shape) for name, entry in self.entries.items()}

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor on the CPU, in memory of its own; in the type that it is stored in, or in another.

        Raises:
            InputError: its file can't be read.
        """
        shape = self.shapes[name]
        if name in self._turned:
            shape = shape[::-1]
        found = torch.empty(shape, dtype=dtype or tensor_files.DTYPES[self.entries[name].dtype])
        rows = shape[0] if shape else 1
        step = max(1, PIECE * rows // max(1, self.entries[name].size))
        try:
            for start in range(0, rows, step):
                with safe_open(self._places[name], framework="pt") as file:
                    if shape:
                        found[start : start + step] = file.get_slice(name)[start : start + step]
                    else:
                        found.copy_(file.get_tensor(name))
        except SafetensorError as error:
            raise InputError(f"{self._places[name]} can't be read ({error}); write it again") from error
        return found.T.contiguous() if name in self._turned else found

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def get(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """The tensor, of this shape.

        Raises:
            InputError: it is missing, or has another.
        """
        if name not in self:
            raise InputError(f"{self.folder} has no tensor {name}, which its config asks for: run the stages again")
        found = tuple(self.entries[name].shape)
        if shape is not None and found != tuple(shape):
            raise InputError(f"{name} of {self.folder} is {found}, its config says {tuple(shape)}")
        return self.read(name)


def turn(entry: Entry) -> Entry:
    """The entry of a matrix with its sides the other way round."""
    return entry._replace(shape=entry.shape[::-1])


def compare(shapes: Shapes, expected: Shapes, tied: tuple[str, ...] = ()) -> None:
    """Refuse names and shapes that differ from those that a config calls for.

    Args:
        tied: embedding and head where they are one matrix; one copy serves both, under either name.

    Raises:
        InputError: a tensor is missing, unexpected or of another shape.
    """
    extra = [name for name in shapes if name not in expected and not name.endswith(NOT_WEIGHTS)]
    stored = any(name in shapes for name in tied)
    _refuse("lack", [name for name in expected if name not in shapes and not (stored and name in tied)])
    _refuse("have unexpected", extra)
    for name, sizes in expected.items():
        if shapes.get(name, sizes) != sizes:
            raise InputError(
                f"the weights' {name} is {list(shapes[name])}, config.json makes it {list(sizes)};"
                " weights and config don't belong together"
            )


def some(names: list[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _refuse(verb: str, names: list[str]) -> None:
    if names:
        raise InputError(f"the weights {verb} {some(names)}; weights and config.json don't belong together")
