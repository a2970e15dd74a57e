"""An opened packed folder: model.json and the safetensors header are checked, blobs are read when they are asked for.

Reading trusts nothing: header, description, sizes and checksums are checked before anything is allocated, and a file
that was changed is refused. What the bytes mean is `tasks.packed.decoder`'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from tasks.algorithms.errors import InputError
from tasks.algorithms.model.shape import shape_of_config
from tasks.packed.blob_header import checked_sizes
from tasks.packed.description import DESCRIPTION, FILE, read_description
from tasks.packed.layout import COUNTS, Peek, Section, Spec, lay_out

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
        for blob, size in self.sizes.items():
            self._check_size(blob, size)

    def _check_size(self, blob: str, size: int) -> None:
        """Before anything is allocated: blobs without entropy code have exactly the sizes that the shapes give."""
        coded = False

        def peek(spec: Spec, offset: int) -> tuple[int, int]:
            nonlocal coded
            coded = True
            return 0, 0

        expected = sum(section.size for section in self.layout.sections(blob, peek))
        if size < expected or (size > expected and not coded):
            raise InputError(
                f"{blob} in {self.path} has {size} bytes where its shapes give {expected}: the folder is damaged"
            )
        weights = sum(spec.rows * spec.cols for spec in self._specs(blob))
        if weights > _MOST * size:
            raise InputError(f"{blob} in {self.path} has {size} bytes for {weights} weights: the folder is damaged")

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

    def sections(self) -> Iterator[Section]:
        """All sections of the file."""
        for name in self.layout.names:
            coded = any(spec.pattern == "unstructured" for spec in self._specs(name))
            yield from self.layout.sections(name, _peeking(self.blob(name) if coded else None))

    def parts(self, name: str) -> dict[tuple[str, str], np.ndarray]:
        """(linear, part) -> its bytes, of a blob."""
        data, parts, offset = self.blob(name), {}, 0
        for section in self.layout.sections(name, _peeking(data)):
            parts[section.linear, section.part] = data[offset : offset + section.size]
            offset += section.size
        if offset != data.size:
            raise InputError(f"{name} in {self.path} has {data.size} bytes, not {offset}: the folder is damaged")
        return parts

    def _specs(self, blob: str) -> tuple[Spec, ...]:
        return self.layout.specs[int(blob[7:])] if blob.startswith("layers.") else ()


def _peeking(data: np.ndarray | None) -> Peek:
    """Reads the counts before entropy coded positions, checked against the blob's and the matrix's size."""

    def peek(spec: Spec, offset: int) -> tuple[int, int]:
        head = data[offset : offset + COUNTS.size].tobytes()
        kept, size = COUNTS.unpack(head) if len(head) == COUNTS.size else (0, data.size)
        if kept > spec.rows * spec.cols or size > data.size - offset - COUNTS.size:
            raise InputError(f"the positions of {spec.name} don't fit their blob: the file is damaged")
        return kept, size

    return peek
