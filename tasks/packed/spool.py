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

from tasks.algorithms import packing
from tasks.packed.description import Table, subsets
from tasks.packed.stored_model import CHUNK

_TABLE_OVERHEAD = 220
"""Bytes that a table adds to header and model.json, about."""


class Spool:
    """Blobs but for their scales, in a file; the scales in memory, until it is known how they are best stored."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.bodies: dict[str, int] = {}
        self.scales: dict[str, list[tuple[str, np.ndarray]]] = {}

    def add(self, name: str, body: Iterable[np.ndarray], scales: list[tuple[str, Tensor]]) -> None:
        """Write a blob's body; scales: (kind, float16)."""
        self.bodies[name] = sum(self.file.write(memoryview(part)) for part in body)
        self.scales[name] = [
            (kind, tensor.contiguous().view(torch.int16).numpy().view(np.uint16).reshape(-1)) for kind, tensor in scales
        ]

    def tail(self, name: str, table: Table | None, index: np.ndarray | None) -> Iterator[np.ndarray]:
        """The bytes of a blob's scales."""
        for kind, values in self.scales[name]:
            if table and kind in table.kinds:
                yield packing.pack_digits(index[values], table.values)
            else:
                yield values.astype("<u2").view(np.uint8)

    def tail_bytes(self, name: str, table: Table | None) -> int:
        """How many bytes `tail` has."""
        return sum(
            packing.digits_bytes(values.size, table.values) if table and kind in table.kinds else 2 * values.size
            for kind, values in self.scales[name]
        )

    def content(self, name: str, table: Table | None, index: np.ndarray) -> Iterator[np.ndarray | bytes]:
        """A blob's bytes; blobs are asked for in the order in which they were added."""
        left = self.bodies[name]
        while left:
            part = self.file.read(min(left, CHUNK))
            left -= len(part)
            yield part
        yield from self.tail(name, table, index)

    def best_table(self) -> tuple[Table | None, np.ndarray]:
        """The kinds whose scales take fewer bytes as indices into a table of those that occur; the table, sorted."""
        seen = {kind: np.zeros(2**16, bool) for kind in ("linears", "embedding", "adapter")}
        counts: dict[str, list[int]] = {kind: [] for kind in seen}
        for kind, values in itertools.chain.from_iterable(self.scales.values()):
            seen[kind][values] = True
            counts[kind].append(values.size)
        best, least = None, sum(2 * sum(sizes) for sizes in counts.values())
        for kinds in subsets([kind for kind in seen if counts[kind]]):
            if kinds:
                found = int(np.logical_or.reduce([seen[kind] for kind in kinds]).sum())
                size = 2 * found + _TABLE_OVERHEAD
                for kind, sizes in counts.items():
                    size += sum(packing.digits_bytes(n, found) if kind in kinds else 2 * n for n in sizes)
                if size < least:
                    best, least = Table(values=found, kinds=list(kinds)), size
        used = np.logical_or.reduce([seen[kind] for kind in best.kinds]) if best else np.zeros(0, bool)
        return best, used.nonzero()[0].astype(np.uint16)
