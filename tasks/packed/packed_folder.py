"""An opened packed folder: model.json and the safetensors header are checked, blobs are read when they are asked for.

Reading trusts nothing: header, description, sizes and checksums are checked before anything is allocated, and a file
that was changed is refused. What the bytes mean is `tasks.packed.decoder`'s.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from tasks.algorithms.errors import InputError
from tasks.algorithms.model.shape import shape_of_config
from tasks.packed.blob_header import checked_sizes
from tasks.packed.description import DESCRIPTION, FILE, read_description
from tasks.packed.layout import COUNTS, INDEX, Peek, Section, Spec, index_bytes, lay_out

_MOST = 2**10
"""Weights per byte of a linear, at most: entropy coded positions of an empty matrix take next to nothing."""


def is_packed(folder: Path) -> bool:
    """Whether the folder holds a packed model."""
    return (folder / DESCRIPTION).exists()


def config(folder: Path) -> dict[str, Any]:
    """The config.json of a packed model.

    Raises:
        InputError: no such model, or a damaged one.
    """
    return PackedFolder(folder).description.config


class PackedFolder:
    """An opened packed folder: everything but the blobs' content is checked.

    Attributes:
        path: model.safetensors.
        description: model.json.
        layout: how everything is stored, per linear bits, pattern, rank, ….
        sizes: bytes of each blob: "layers.0", …, "embedding", "head" where untied, "rest", "scales" where there is a
            table.

    Raises:
        InputError: a file is missing, damaged, changed or of another version; blobs aren't read for that.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.description, digest = read_description(folder / DESCRIPTION)
        self.sizes = checked_sizes(self.path, digest)
        blocks = shape_of_config(self.description.config).layers
        if blocks != sum(name.startswith("layers.") for name in self.sizes):
            raise InputError(f"{self.path} does not hold the {blocks} blocks of its config: the folder is damaged")
        self.layout = lay_out(self.description)
        if list(self.sizes) != self.layout.names or set(self.description.sha256) != set(self.sizes):
            raise InputError(f"{self.path} holds other blobs than {DESCRIPTION} describes: the folder is damaged")
        ends = itertools.accumulate(self.sizes.values(), initial=self.path.stat().st_size - sum(self.sizes.values()))
        self._starts = dict(zip(self.sizes, ends, strict=False))
        self._entropy = self.description.coding == "entropy"
        for blob, size in self.sizes.items():
            self._check_size(blob, size)

    def _check_size(self, blob: str, size: int) -> None:
        """Before anything is allocated: a blob has exactly the size that its shapes give, or the sum of its sections.

        Of what is entropy coded, positions and others, a byte can hold many weights, but not any number.
        """
        coded = self._entropy

        def peek(spec: Spec, offset: int) -> tuple[int, int]:
            nonlocal coded
            coded = True
            return 0, 0

        sections = list(self.layout.sections(blob, peek))
        expected = sum(self.index(blob), index_bytes(len(sections))) if self._entropy else sum(s.size for s in sections)
        if size < expected or (size > expected and (self._entropy or not coded)):
            raise InputError(
                f"{blob} in {self.path} has {size} bytes where its sections have {expected}: the folder is damaged"
            )
        weights = sum(spec.rows * spec.cols for spec in self._specs(blob))
        weights = max(weights, sum(section.count for section in sections))
        if coded and weights > _MOST * size:
            raise InputError(f"{blob} in {self.path} has {size} bytes for {weights} weights: the folder is damaged")

    def index(self, blob: str) -> list[int]:
        """The sizes of an entropy coded blob's sections; empty where all follow from shapes."""
        if not self._entropy:
            return []
        return self._index(blob, self._read(blob, 0, index_bytes(self.layout.number(blob))))

    def _index(self, blob: str, data: bytes) -> list[int]:
        number = self.layout.number(blob)
        if len(data) < index_bytes(number):
            raise InputError(f"{blob} in {self.path} is too short for its {number} sections: the folder is damaged")
        return np.frombuffer(data, INDEX, number).tolist()

    def _read(self, blob: str, offset: int, size: int) -> bytes:
        """Bytes of a blob, its checksum not checked."""
        with self.path.open("rb") as file:
            file.seek(self._starts[blob] + offset)
            return file.read(max(0, min(size, self.sizes[blob] - offset)))

    def blob(self, name: str) -> np.ndarray:
        """uint8, its checksum checked."""
        try:
            with safe_open(self.path, framework="np") as file:
                data = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.path} can't be read: {error}") from error
        if hashlib.sha256(data).hexdigest() != self.description.sha256[name]:
            raise InputError(f"the checksum of {name} in {self.path} is wrong: the file is damaged, fetch it again")
        return data

    def sections(self, blob: str) -> Iterator[Section]:
        """The sections of a blob, which may begin with an index; no checksum is checked.

        Raises:
            InputError: they don't fill it.
        """
        index = self.index(blob)
        offset = index_bytes(len(index))
        peek = _peeking(self.sizes[blob], lambda *place: self._read(blob, *place))
        for section in self.layout.sections(blob, peek, index):
            offset += section.size
            yield section
        self._check_end(blob, offset)

    def parts(self, name: str) -> dict[tuple[str, str], np.ndarray]:
        """(linear, part) -> its bytes, of a blob."""
        return {(section.linear, section.part): data for section, data in self.contents(name)}

    def contents(self, name: str) -> Iterator[tuple[Section, np.ndarray]]:
        """The sections of a blob and their bytes."""
        data = self.blob(name)
        index = self._index(name, data.tobytes()) if self._entropy else []
        offset = index_bytes(len(index))
        peek = _peeking(data.size, lambda start, size: data[start : start + size].tobytes())
        for section in self.layout.sections(name, peek, index):
            yield section, data[offset : offset + section.size]
            offset += section.size
        self._check_end(name, offset)

    def _check_end(self, blob: str, end: int) -> None:
        if end != self.sizes[blob]:
            raise InputError(f"{blob} in {self.path} has {self.sizes[blob]} bytes, not {end}: the folder is damaged")

    def _specs(self, blob: str) -> tuple[Spec, ...]:
        return self.layout.specs[int(blob[7:])] if blob.startswith("layers.") else ()


def _peeking(blob_size: int, read: Callable[[int, int], bytes]) -> Peek:
    """Reads the counts before entropy coded positions, checked against the blob's and the matrix's size.

    Args:
        read: (offset, size) -> bytes of the blob, fewer at its end.
    """

    def peek(spec: Spec, offset: int) -> tuple[int, int]:
        head = read(offset, COUNTS.size)
        kept, size = COUNTS.unpack(head) if len(head) == COUNTS.size else (0, blob_size)
        if kept > spec.rows * spec.cols or size > blob_size - offset - COUNTS.size:
            raise InputError(f"the positions of {spec.name} don't fit their blob: the file is damaged")
        return kept, size

    return peek
