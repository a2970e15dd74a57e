"""Where each byte of a packed model's blobs is: the sections that follow from its description and its config.

Reader (`tasks.packed.packed_folder`), writer (`tasks.packed.writer`) and plans from a config alone
(`tasks.packed.plan`) follow the same `Layout`.
"""

from __future__ import annotations

import functools
import itertools
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tasks.algorithms import packing
from tasks.algorithms.errors import InputError
from tasks.algorithms.model import masks
from tasks.packed.description import DESCRIPTION, SIZES, Description
from tasks.packed.shapes import shapes_of

COMPONENTS = ("positions", "values", "scales", "zeros", "embedding", "norms", "adapter", "metadata")
"""What bytes are for. `scales` includes the table and the group of each input (act order); `norms` biases."""
COUNTS = struct.Struct("<II")
"""Before entropy coded positions: kept weights, bytes of code."""
INDEX = np.dtype("<u4")
"""An entropy coded blob begins with the size of each of its sections."""


@dataclass(frozen=True)
class Spec:
    """How one linear is stored: what of it isn't its content."""

    name: str
    rows: int
    cols: int
    bits: int | None
    group_size: int
    pattern: str
    zeros: bool
    order: bool
    rank: int
    bias: bool

    @property
    def groups(self) -> int:
        return self.cols // self.group_size


class Section(NamedTuple):
    """A run of bytes in a blob: `count` digits below `base`, or the entropy coded positions of an unstructured mask.

    Attributes:
        size: bytes; those of coding `fixed` where an entropy code's aren't known.
        bits: the information in it, at most.
        count: digits; values that aren't quantised are the digits of their bytes.
        base: 0 of unstructured positions.
    """

    linear: str
    part: str
    component: str
    size: int
    bits: float
    count: int = 0
    base: int = 0


Peek = Callable[[Spec, int], tuple[int, int]]
"""(a linear with entropy coded positions, offset in its blob) -> kept weights, bytes of code."""


@dataclass(frozen=True)
class Layout:
    """Where everything is, from a description and the shapes that its config gives."""

    description: Description
    specs: tuple[tuple[Spec, ...], ...]
    rest: Mapping[str, tuple[int, ...]]
    table_shape: tuple[int, int]

    @property
    def names(self) -> list[str]:
        """The blobs, in the order of the file."""
        found = [f"layers.{index}" for index in range(len(self.specs))] + ["embedding"]
        found += [] if self.description.tied else ["head"]
        return found + ["rest"] + (["scales"] if self.description.scales else [])

    def dtype(self, name: str) -> str:
        return self.description.dtypes.get(name, self.description.dtype)

    def sections(self, blob: str, peek: Peek, index: Sequence[int] = ()) -> Iterator[Section]:
        """The sections of a blob in their order; index: their sizes, where they are entropy coded."""
        offset = index_bytes(len(index))
        sizes = iter(index)

        def counts(spec: Spec) -> tuple[int, int]:  # asked for when the linear's sections begin, which is here then
            return peek(spec, offset)

        for section in self._sections(blob, counts):
            found = section._replace(size=next(sizes)) if index else section
            if not found.base and found.size != section.size:
                raise InputError(f"the positions of {found.linear} don't fit their blob: the file is damaged")
            offset += found.size
            yield found

    def number(self, blob: str) -> int:
        """How many sections a blob has."""
        return sum(1 for _ in self._sections(blob, lambda _: (0, 0)))

    def _sections(self, blob: str, peek: Callable[[Spec], tuple[int, int]]) -> Iterator[Section]:
        if blob.startswith("layers."):
            yield from self._block(self.specs[int(blob[7:])], peek)
        elif blob in ("embedding", "head"):
            yield from self._matrix(blob)
        elif blob == "scales":
            yield _raw("", "scales", "scales", self.description.scales.values, "F16")
        else:
            for name, shape in self.rest.items():
                yield _raw("", name, "norms", math.prod(shape), self.dtype(name))

    def _block(self, specs: Iterable[Spec], peek: Callable[[Spec], tuple[int, int]]) -> Iterator[Section]:
        for spec in specs:
            yield from self._body(spec, peek)
        for spec in specs:
            if spec.bits:
                yield self._scales(spec.name, "scales", "scales", spec.rows * spec.groups, "linears")
            if spec.rank and self.description.adapter:
                for part, length, coding in zip("ab", (spec.cols, spec.rows), self.description.adapter, strict=True):
                    count = spec.rank * (length // divisor(length, coding.group_size))
                    yield self._scales(spec.name, f"{part}.scales", "adapter", count, "adapter")

    def _body(self, spec: Spec, peek: Callable[[Spec], tuple[int, int]]) -> Iterator[Section]:
        count, name = spec.rows * spec.cols, spec.name
        kept, pattern = count, masks.parse(spec.pattern)
        if pattern:
            keep, of = pattern
            kept = count // of * keep
            yield _digits(name, "positions", "positions", count // of, packing.cases(keep, of))
        elif spec.pattern == "unstructured":
            kept, size = peek(spec)
            bits = packing.log2_combinations(count, kept)
            yield Section(name, "positions", "positions", COUNTS.size + size, bits)
        if spec.bits:
            yield _digits(name, "values", "values", kept, 2**spec.bits)
        else:
            yield _raw(name, "values", "values", kept, self.dtype(f"{name}.weight"))
        if spec.zeros:
            yield _digits(name, "zeros", "zeros", spec.rows * spec.groups, 2**spec.bits)
        if spec.order:
            yield _digits(name, "order", "scales", spec.cols, spec.groups)
        if spec.bias:
            yield _raw(name, "bias", "norms", spec.rows, self.dtype(f"{name}.bias"))
        if spec.rank:
            yield from self._factors(spec)

    def _factors(self, spec: Spec) -> Iterator[Section]:
        codings = self.description.adapter or (None, None)
        for part, length, coding in zip("ab", (spec.cols, spec.rows), codings, strict=True):
            if coding:
                yield _digits(spec.name, part, "adapter", spec.rank * length, 2**coding.bits)
            else:
                yield _raw(spec.name, part, "adapter", spec.rank * length, self.dtype(f"{spec.name}.{part}"))

    def _matrix(self, blob: str) -> Iterator[Section]:
        rows, cols = self.table_shape
        coding = getattr(self.description, blob)
        if coding:
            yield _digits("", "codes", "embedding", rows * cols, 2**coding.bits)
            count = rows * (cols // divisor(cols, coding.group_size))
            yield self._scales("", "scales", "embedding", count, "embedding")
        else:
            yield _raw("", "codes", "embedding", rows * cols, self.dtype(blob))

    def _scales(self, name: str, part: str, component: str, count: int, kind: str) -> Section:
        table = self.description.scales
        if table and kind in table.kinds:
            return _digits(name, part, component, count, table.values)
        return _raw(name, part, component, count, "F16")


@functools.lru_cache(maxsize=1024)
def divisor(length: int, group_size: int) -> int:
    """The largest divisor of `length` that is at most `group_size`: the groups that a row of that length has."""
    small = [size for size in range(1, math.isqrt(length) + 1) if length % size == 0]
    return max(size for size in (*small, *(length // size for size in small)) if size <= group_size)


def lay_out(description: Description) -> Layout:
    """The layout of a description.

    Raises:
        InputError: it doesn't fit its own config.
    """
    shapes = shapes_of(description.config)
    if description.tied != shapes.tied or (description.tied and description.head):
        raise InputError("embedding and head are tied by the config or by the file, not by both: the folder is damaged")
    count = sum(map(len, shapes.linears))
    columns = [_spread(name, getattr(description, name), count) for name in _Stored._fields]
    rows = itertools.starmap(_Stored, zip(*columns, strict=True))
    specs = tuple(
        tuple(_spec(name, shape, name in shapes.biases, next(rows)) for name, shape in block.items())
        for block in shapes.linears
    )
    return Layout(description, specs, shapes.rest, shapes.table)


class _Stored(NamedTuple):
    """What a description says of one linear, by the names of its fields."""

    bits: int | None
    group_size: int
    pattern: str
    zeros: bool
    order: bool
    rank: int


def _spec(name: str, shape: tuple[int, int], bias: bool, stored: _Stored) -> Spec:
    rows, cols = shape
    pattern = masks.parse(stored.pattern)
    if pattern and (packing.cases(*pattern) < 2 or cols % pattern[1]):
        raise InputError(f"{name} has {cols} inputs, not divisible by groups of {stored.pattern}")
    if stored.rank > min(shape):
        raise InputError(f"the adapter of {name} has rank {stored.rank}, above the smaller side of {shape}")
    coded = bool(stored.bits)
    settled = stored._replace(
        group_size=divisor(cols, stored.group_size), zeros=stored.zeros and coded, order=stored.order and coded
    )
    return Spec(name, rows, cols, *settled, bias)


def _spread(name: str, value: Any, count: int) -> list[Any]:
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise InputError(f"{DESCRIPTION} has {len(value)} entries in {name} for {count} linears: the folder is damaged")
    return value


def _digits(name: str, part: str, component: str, count: int, base: int) -> Section:
    return Section(name, part, component, packing.digits_bytes(count, base), count * math.log2(base), count, base)


def _raw(name: str, part: str, component: str, count: int, dtype: str) -> Section:
    return _digits(name, part, component, count, 2 ** (8 * SIZES[dtype]))


def index_bytes(number: int) -> int:
    """Bytes of the sizes that an entropy coded blob of so many sections begins with."""
    return number * INDEX.itemsize


def bytes_by_component(sections: Iterable[Section], total: int) -> dict[str, int]:
    """Bytes by what they are for, of `total` in all files; what isn't in a section is metadata."""
    sizes = dict.fromkeys(COMPONENTS, 0)
    for section in sections:
        sizes[section.component] += section.size
    return sizes | {"metadata": total - sum(sizes.values())}


def bits_by_component(sections: Iterable[Section]) -> dict[str, float]:
    """Bits of information by what they are for, at least; metadata: 0."""
    bits = dict.fromkeys(COMPONENTS, 0.0)
    for section in sections:
        bits[section.component] += section.bits
    return bits
