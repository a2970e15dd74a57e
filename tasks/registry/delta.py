"""Which bytes of a tensor file an older one has, too: by the sections of a packed model, else by tensors.

A packed blob holds all of a block; its layout says where each linear's positions, values, scales and adapter are, so an
adapter that changed costs its own bytes, not its block's. Sections are matched by name, wherever they are now. No
search for similar bytes: packed content is close to random, and a section either stays or is another one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tasks.models import tensor_headers
from tasks.packed.description import FILE
from tasks.packed.layout import index_bytes
from tasks.packed.packed_folder import PackedFolder, is_packed

CHUNK = 2**20
"""Bytes that are compared at once."""


class Segment(NamedTuple):
    """A named run of bytes of a file; component: what it is for (`tasks.packed.layout.COMPONENTS`)."""

    name: tuple[str, ...]
    component: str
    start: int
    size: int


class Piece(NamedTuple):
    """Bytes of the new file: from `start` of the old one, or new (None)."""

    start: int | None
    size: int


def pieces(old: Path, new: Path) -> tuple[list[Piece], dict[str, int]]:
    """What the new file is made of, in its order; and of the new bytes how many are for what.

    Raises:
        InputError: one is no safetensors file.
    """
    known = {segment.name: segment for segment in segments(old)}
    found: list[Piece] = []
    sizes: dict[str, int] = {}
    with old.open("rb") as before, new.open("rb") as after:
        for segment in segments(new):
            own = known.get(segment.name)
            same = own is not None and own.size == segment.size and _equal(before, own, after, segment)
            _add(found, own.start if same else None, segment.size)
            if not same:
                sizes[segment.component] = sizes.get(segment.component, 0) + segment.size
    return found, sizes


def segments(path: Path) -> Iterator[Segment]:
    """The segments of a safetensors file, which together are all of it.

    Raises:
        InputError: it is none.
    """
    tensors = {name: entry["data_offsets"] for name, entry in tensor_headers.header(path)[1].items()}
    first = path.stat().st_size - sum(stop - start for start, stop in tensors.values())  # they fill the file
    yield Segment(("header",), "metadata", 0, first)
    package = PackedFolder(path.parent) if path.name == FILE and is_packed(path.parent) else None
    for name, (start, stop) in sorted(tensors.items(), key=lambda item: item[1]):
        if package:
            yield from _sections(package, name, first + start)
        else:
            yield Segment((name,), "tensors", first + start, stop - start)


def adapter_parameters(folder: Path) -> tuple[int, int]:
    """Parameters of the adapters of a packed model, and of the model without them.

    Raises:
        InputError: it is none.
    """
    layout = PackedFolder(folder).layout
    specs = [spec for block in layout.specs for spec in block]
    rows, cols = layout.table_shape
    table = rows * cols * (1 if layout.description.tied else 2)
    rest = sum(math.prod(shape) for shape in layout.rest.values())
    biases = sum(spec.rows for spec in specs if spec.bias)
    own = sum(spec.rows * spec.cols for spec in specs) + table + rest + biases
    return sum(spec.rank * (spec.rows + spec.cols) for spec in specs), own


def _sections(package: PackedFolder, blob: str, start: int) -> Iterator[Segment]:
    """The sections of a packed blob that begins at `start`, and before them their sizes, where it has those."""
    head = index_bytes(len(package.index(blob)))
    yield Segment((blob, "", "index"), "metadata", start, head)
    offset = start + head
    for section in package.sections(blob):
        yield Segment((blob, section.linear, section.part), section.component, offset, section.size)
        offset += section.size


def _equal(before: BinaryIO, one: Segment, after: BinaryIO, other: Segment) -> bool:
    before.seek(one.start)
    after.seek(other.start)
    left = one.size
    while left:
        size = min(left, CHUNK)
        if before.read(size) != after.read(size):
            return False
        left -= size
    return True


def _add(found: list[Piece], start: int | None, size: int) -> None:
    """Append a piece, or lengthen the last one where it goes on."""
    last = found[-1] if found else None
    if last and (last.start is None) == (start is None) and (start is None or last.start + last.size == start):
        found[-1] = Piece(last.start, last.size + size)
    elif size:
        found.append(Piece(start, size))
