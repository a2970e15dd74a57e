"""The blobs of a packed model while it is written: bodies in a file, scales in memory.

Only all scales together tell how they are best stored: as float16, or as indices into a table of the distinct ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from tasks.packed.description import Table, subsets
from tasks.packed.digits import CODERS
from tasks.packed.layout import INDEX
from tasks.packed.stored_model import CHUNK

_TABLE_OVERHEAD = 220
"""Bytes that a table adds to header and model.json, about."""


class Spool:
    """Blobs but for their scales, in a file; the scales in memory, until it is known how they are best stored."""

    def __init__(self, file: BinaryIO, coding: str) -> None:
        self.file, self.pack, self.indexed = file, CODERS[coding].pack, coding == "entropy"
        self.bodies: dict[str, list[int]] = {}
        self.scales: dict[str, list[tuple[str, np.ndarray]]] = {}

    def add(self, name: str, body: Iterable[np.ndarray], scales: list[tuple[str, Tensor]]) -> None:
        """Write a blob's body, a part per section; scales: (kind, float16)."""
        self.bodies[name] = [self.file.write(memoryview(part)) for part in body]
        self.scales[name] = [
            (kind, tensor.contiguous().view(torch.int16).numpy().view(np.uint16).reshape(-1)) for kind, tensor in scales
        ]

    def tails(self, table: Table | None, used: np.ndarray) -> dict[str, list[np.ndarray]]:
        """The bytes of each blob's scales, a part per section; used: the table."""
        index = np.zeros(2**16, np.uint16)
        index[used] = np.arange(used.size, dtype=np.uint16)
        return {
            name: [
                self.pack(index[values], table.values) if table and kind in table.kinds else self.pack(values, 2**16)
                for kind, values in scales
            ]
            for name, scales in self.scales.items()
        }

    def index(self, name: str, tail: Iterable[np.ndarray]) -> np.ndarray:
        """The sizes that an entropy coded blob begins with, as bytes; none of another one."""
        sizes = [*self.bodies.get(name, ()), *(part.size for part in tail)] if self.indexed else []
        return np.array(sizes, INDEX).view(np.uint8)

    def content(self, name: str, tail: Iterable[np.ndarray]) -> Iterator[np.ndarray | bytes]:
        """A blob's bytes; blobs are asked for in the order in which they were added."""
        yield self.index(name, tail)
        left = sum(self.bodies.get(name, ()))
        while left:
            part = self.file.read(min(left, CHUNK))
            left -= len(part)
            yield part
        yield from tail

    def best_table(self) -> tuple[Table | None, np.ndarray]:
        """The kinds whose scales take fewer bytes as indices into a table of those that occur; the table, sorted."""
        seen = {kind: np.zeros(2**16, bool) for kind in ("linears", "embedding", "adapter")}
        for kind, values in itertools.chain.from_iterable(self.scales.values()):
            seen[kind][values] = True
        best, least = (None, np.zeros(0, np.uint16)), self._tail_bytes(None, np.zeros(0, np.uint16))
        for kinds in subsets([kind for kind in seen if seen[kind].any()]):
            if kinds:
                used = np.logical_or.reduce([seen[kind] for kind in kinds]).nonzero()[0].astype(np.uint16)
                table = Table(values=used.size, kinds=list(kinds))
                size = 2 * used.size + _TABLE_OVERHEAD + self._tail_bytes(table, used)
                if size < least:
                    best, least = (table, used), size
        return best

    def _tail_bytes(self, table: Table | None, used: np.ndarray) -> int:
        return sum(part.size for parts in self.tails(table, used).values() for part in parts)
