"""Write a model as a packed folder, one block at a time.

Blobs are spooled to a file without their scales, because only all scales together tell how they are best stored: as
float16 or as indices into a table of the distinct ones. It reads nothing back; `tasks.packed.reader.save` does.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from tasks.algorithms import packing
from tasks.algorithms.errors import InputError
from tasks.algorithms.model import masks
from tasks.algorithms.quantisation import rounding
from tasks.packed import file_format
from tasks.packed.file_format import DESCRIPTION, FILE, Coding, Description, Linear, Model, Shapes, Spec, Table

_TABLE_OVERHEAD = 220
"""Bytes that a table adds to header and model.json, about."""

_NAMES = {dtype: name for name, dtype in file_format.DTYPES.items()}


def write(model: Model, folder: Path) -> None:
    """Write model.safetensors and model.json into an existing folder; arguments and errors as `reader.save`."""
    with (folder / "bodies").open("w+b") as bodies:
        spool = _Spool(bodies)
        description = _spool(model, spool)
        with (folder / FILE).open("wb") as file:
            text = _write(description, spool, file)
    (folder / "bodies").unlink()
    (folder / DESCRIPTION).write_bytes(text)


class _Spool:
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
            part = self.file.read(min(left, file_format.CHUNK))
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
        for kinds in file_format.subsets([kind for kind in seen if counts[kind]]):
            if kinds:
                found = int(np.logical_or.reduce([seen[kind] for kind in kinds]).sum())
                size = 2 * found + _TABLE_OVERHEAD
                for kind, sizes in counts.items():
                    size += sum(packing.digits_bytes(n, found) if kind in kinds else 2 * n for n in sizes)
                if size < least:
                    best, least = Table(values=found, kinds=list(kinds)), size
        used = np.logical_or.reduce([seen[kind] for kind in best.kinds]) if best else np.zeros(0, bool)
        return best, used.nonzero()[0].astype(np.uint16)


@dataclass
class _Facts:
    """What is found out about a model while its blobs are spooled, for its description."""

    specs: list[Spec] = field(default_factory=list)
    dtypes: dict[str, str] = field(default_factory=dict)
    factors: list[tuple[rounding.Coded, rounding.Coded] | None] = field(default_factory=list)

    def raw(self, name: str, tensor: Tensor) -> np.ndarray:
        """A tensor's bytes; its type is noted."""
        if tensor.dtype not in _NAMES:
            raise InputError(f"{name} is {tensor.dtype}; float16, bfloat16 and float32 can be stored")
        self.dtypes[name] = _NAMES[tensor.dtype]
        return _raw(tensor)


def _spool(model: Model, spool: _Spool) -> Description:
    """Write all bodies; the description, but for scales and checksums."""
    config = file_format.clean(model.config)
    shapes, facts = file_format.shapes_of(json.dumps(config)), _Facts()
    count = 0
    for block, expected in zip(model.blocks, shapes.linears, strict=False):
        if {name: linear.shape for name, linear in block.items()} != expected:
            raise InputError(f"the linears of block {count} are not those of the config: run the stages again")
        body, scales = [], []
        for name, linear in block.items():
            body += _pack_linear(name, linear, facts, scales, name in shapes.biases)
        spool.add(f"layers.{count}", body, scales)
        count += 1
    if count != len(shapes.linears):
        raise InputError(f"the model has {count} blocks, its config {len(shapes.linears)}: run the stages again")
    if shapes.tied != (model.head is None):
        raise InputError("the config ties the head to the embedding, the model doesn't, or the reverse: one is wrong")
    codings = {}
    for name, matrix in (("embedding", model.embedding), ("head", model.head)):
        if matrix is not None:
            codings[name] = _pack_matrix(name, matrix, shapes.table, facts, spool)
    if {name: tuple(tensor.shape) for name, tensor in model.rest.items()} != shapes.rest:
        raise InputError("the norms of the model are not those of its config: run the stages again")
    spool.add("rest", [facts.raw(name, model.rest[name]) for name in shapes.rest], [])
    return _describe(config, shapes, facts, codings)


def _describe(
    config: dict[str, Any], shapes: Shapes, facts: _Facts, codings: Mapping[str, Coding | None]
) -> Description:
    specs, names = facts.specs, list(facts.dtypes.values())
    dtype = max(sorted(set(names)), key=names.count)
    factors = [pair for pair in facts.factors if pair]
    adapter = tuple(_common_coding([pair[side] for pair in factors]) for side in (0, 1)) if factors else None
    return Description(
        **file_format.HEAD,
        config=config,
        tied=shapes.tied,
        dtype=dtype,
        dtypes={name: found for name, found in facts.dtypes.items() if found != dtype},
        bits=file_format.uniform([spec.bits for spec in specs]),
        group_size=_group([spec.cols for spec in specs], [spec.group_size for spec in specs]),
        pattern=file_format.uniform([spec.pattern for spec in specs]),
        zeros=file_format.uniform([spec.zeros for spec in specs]),
        order=file_format.uniform([spec.order for spec in specs]),
        rank=file_format.uniform([spec.rank for spec in specs]),
        adapter=adapter,
        embedding=codings["embedding"],
        head=codings.get("head"),
        sha256={},
    )


def _common_coding(found: list[rounding.Coded]) -> Coding:
    """The coding of all factors of one side.

    Raises:
        InputError: they have none in common.
    """
    size = _group([coded.codes.shape[1] for coded in found], [coded.group_size for coded in found])
    if isinstance(size, list) or len({coded.bits for coded in found}) > 1:
        raise InputError("the factors of the adapters differ in bits or in the rule for their groups: run eora again")
    return Coding(bits=found[0].bits, group_size=size)


def _group(lengths: list[int], sizes: list[int]) -> int | list[int]:
    """One size that gives all of these as their rows' divisors, or the list."""
    largest = max(sizes)
    fits = all(file_format.divisor(length, largest) == size for length, size in zip(lengths, sizes, strict=True))
    return largest if fits else sizes


def _pack_matrix(
    name: str, matrix: rounding.Coded | Tensor, shape: tuple[int, int], facts: _Facts, spool: _Spool
) -> Coding | None:
    found = tuple((matrix.codes if isinstance(matrix, rounding.Coded) else matrix).shape)
    if found != shape:
        raise InputError(f"the {name} is {found}, the config says {shape}: run the stages again")
    if isinstance(matrix, rounding.Coded):
        codes = packing.pack_digits(_unsigned(matrix), 2**matrix.bits)
        spool.add(name, [codes], [("embedding", matrix.scales)])
        return Coding(bits=matrix.bits, group_size=matrix.group_size)
    spool.add(name, [facts.raw(name, matrix)], [])
    return None


def _pack_linear(
    name: str, linear: Linear, facts: _Facts, scales: list[tuple[str, Tensor]], biased: bool
) -> list[np.ndarray]:
    """The body of a linear in the order of `Layout._body`; its scales are added to `scales`."""
    _check_linear(name, linear, biased)
    (rows, cols), body = linear.shape, []
    keep = None if linear.keep is None else linear.keep.numpy()
    if keep is not None:
        body += _pack_keep(keep, linear.pattern)
    if linear.codes is None:
        values = linear.weight if keep is None else linear.weight[linear.keep]
        body.append(facts.raw(f"{name}.weight", values))
    else:
        codes = linear.codes.numpy()
        body.append(packing.pack_digits(codes if keep is None else codes[keep], 2**linear.bits))
        scales.append(("linears", linear.scales))
    if linear.zeros is not None:
        body.append(packing.pack_digits(linear.zeros.numpy(), 2**linear.bits))
    if linear.group_index is not None:
        body.append(packing.pack_digits(linear.group_index.numpy(), cols // linear.group_size))
    if linear.bias is not None:
        body.append(facts.raw(f"{name}.bias", linear.bias))
    if linear.adapter is not None:
        body += _pack_adapter(name, linear, facts, scales)
    flags = linear.zeros is not None, linear.group_index is not None
    size = linear.group_size or cols
    facts.specs.append(Spec(name, rows, cols, linear.bits, size, linear.pattern, *flags, linear.rank, biased))
    return body


def _pack_keep(keep: np.ndarray, pattern: str) -> list[np.ndarray]:
    parsed = masks.parse(pattern)
    if parsed:
        return [packing.pack_positions(keep, *parsed)]
    code = packing.encode_mask(keep)
    return [np.frombuffer(file_format.COUNTS.pack(int(keep.sum()), code.size), np.uint8), code]


def _pack_adapter(name: str, linear: Linear, facts: _Facts, scales: list[tuple[str, Tensor]]) -> list[np.ndarray]:
    pair = linear.adapter
    coded = [isinstance(factor, rounding.Coded) for factor in pair]
    if any(coded) != all(coded) or (facts.factors and all(coded) != (facts.factors[0] is not None)):
        raise InputError(f"of the adapters' factors some are coded, some not, first at {name}: run eora again")
    facts.factors.append(pair if all(coded) else None)
    if not all(coded):
        return [facts.raw(f"{name}.{side}", factor) for side, factor in zip("ab", pair, strict=True)]
    scales += [("adapter", factor.scales) for factor in pair]
    return [packing.pack_digits(_unsigned(factor), 2**factor.bits) for factor in pair]


def _check_linear(name: str, linear: Linear, biased: bool) -> None:
    """Raise InputError for what would not come back as it went in."""
    rows, cols = linear.shape
    if (linear.keep is None) != (linear.pattern == "dense"):
        raise InputError(f"{name} has the pattern {linear.pattern} and {'no' if linear.keep is None else 'a'} mask")
    if linear.keep is not None and tuple(linear.keep.shape) != (rows, cols):
        raise InputError(
            f"the mask of {name} is {tuple(linear.keep.shape)}, its weight {(rows, cols)}: run wanda again"
        )
    if biased != (linear.bias is not None):
        raise InputError(f"{name} has a bias where its config has none, or the reverse: run the stages again")
    sides = [part.codes if isinstance(part, rounding.Coded) else part for part in linear.adapter or ()]
    expected = [
        (linear.rank, cols),
        (linear.rank, rows)
        if linear.adapter and isinstance(linear.adapter[1], rounding.Coded)
        else (rows, linear.rank),
    ]
    if sides and [tuple(side.shape) for side in sides] != expected:
        raise InputError(f"the adapter of {name} has factors {[tuple(side.shape) for side in sides]}, not {expected}")
    if linear.codes is None:
        alive = 0 if linear.keep is None else masks.revived(linear.weight, linear.keep)
    else:
        grid = (rows, cols // linear.group_size)
        for what, tensor in (("scales", linear.scales), ("zero points", linear.zeros)):
            if tensor is not None and tuple(tensor.shape) != grid:
                raise InputError(f"the {what} of {name} are {tuple(tensor.shape)}, not {grid}: run stage gptq again")
        if linear.scales.dtype != torch.float16:
            raise InputError(f"the scales of {name} are {linear.scales.dtype}, not float16: run stage gptq again")
        alive = 0
        if linear.keep is not None:
            alive = int(
                (linear.codes.numpy() != file_format.zero_codes(linear, rows, cols))[~linear.keep.numpy()].sum()
            )
    if alive:
        raise InputError(f"{alive} pruned weights of {name} are not zero: package without masks, or run gptq again")


def _write(description: Description, spool: _Spool, file: BinaryIO) -> bytes:
    """Write the safetensors file; the bytes of model.json."""
    table, used = spool.best_table()
    description.scales = table
    index = np.zeros(2**16, np.uint16)
    index[used] = np.arange(len(used), dtype=np.uint16)
    sizes = {name: body + spool.tail_bytes(name, table) for name, body in spool.bodies.items()}
    sizes |= {"scales": 2 * len(used)} if table else {}
    file.write(file_format.header(sizes, "0" * 64))
    spool.file.seek(0)
    for name, size in sizes.items():
        digest = hashlib.sha256()
        parts = [used.astype("<u2").view(np.uint8)] if name == "scales" else spool.content(name, table, index)
        written = 0
        for part in parts:
            digest.update(part)
            written += file.write(part)
        if written != size:
            raise RuntimeError(f"{name} was planned with {size} bytes and has {written}")
        description.sha256[name] = digest.hexdigest()
    text = description.json()
    file.seek(0)
    file.write(file_format.header(sizes, hashlib.sha256(text).hexdigest()))
    return text


def _raw(tensor: Tensor) -> np.ndarray:
    """uint8: the tensor's bytes."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def _unsigned(coded: rounding.Coded) -> np.ndarray:
    """uint8 codes from 0: the sum wraps, so that int8 needs no wider type on the way."""
    return coded.codes.contiguous().numpy().view(np.uint8) + np.uint8(2 ** (coded.bits - 1))
