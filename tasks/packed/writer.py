"""Write a model as a packed folder, one block at a time.

Blobs are spooled to a file without their scales, which are stored once it is known how they are best stored
(`tasks.packed.spool`). What was written is opened as a reader opens it before it takes its name.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
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
from tasks.packed.blob_header import header_bytes
from tasks.packed.description import DESCRIPTION, FILE, HEAD, Coding, Description, uniform
from tasks.packed.digits import CODERS
from tasks.packed.layout import COUNTS, Spec, divisor
from tasks.packed.model_config import clean
from tasks.packed.packed_folder import PackedFolder
from tasks.packed.shapes import Shapes, shapes_of
from tasks.packed.spool import Spool
from tasks.packed.stored_model import DTYPES, Linear, Model, zero_codes

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_DIGITS = {2: np.uint16, 4: np.uint32}
"""Values that aren't quantised as digits, by their bytes."""


def save(model: Model, folder: Path, coding: str = "fixed") -> None:
    """Write model.safetensors and model.json, one block at a time; both take their names when they are complete.

    Same content, same bytes. Memory: a block, the embedding, and all scales.

    Args:
        coding: "fixed" or "entropy".

    Raises:
        InputError: tensors that don't fit the config or each other; pruned weights that are not zero; a mask that isn't
            of its pattern.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".packing") as path:
        scratch = Path(path)
        with (scratch / "bodies").open("w+b") as bodies, (scratch / FILE).open("wb") as file:
            spool = Spool(bodies, coding)
            text = _write(_spool_blobs(model, spool, _Facts(CODERS[coding].pack, coding)), spool, file)
        (scratch / DESCRIPTION).write_bytes(text)
        PackedFolder(scratch)  # refuses what could not be read back
        for name in (FILE, DESCRIPTION):
            os.replace(scratch / name, folder / name)


@dataclass
class _Facts:
    """What is found out about a model while its blobs are spooled, for its description.

    Attributes:
        pack: codes digits.
    """

    pack: packing.Pack
    coding: str
    specs: list[Spec] = field(default_factory=list)
    dtypes: dict[str, str] = field(default_factory=dict)
    factors: list[tuple[rounding.Coded, rounding.Coded] | None] = field(default_factory=list)

    def raw(self, name: str, tensor: Tensor) -> np.ndarray:
        """A tensor's bytes, coded; its type is noted."""
        if tensor.dtype not in _NAMES:
            raise InputError(f"{name} is {tensor.dtype}; float16, bfloat16 and float32 can be stored")
        self.dtypes[name] = _NAMES[tensor.dtype]
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        return self.pack(flat.view(_DIGITS[tensor.dtype.itemsize]), 2 ** (8 * tensor.dtype.itemsize))


def _spool_blobs(model: Model, spool: Spool, facts: _Facts) -> Description:
    """Write all bodies; the description, but for scales and checksums."""
    config = clean(model.config)
    shapes = shapes_of(config)
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
    dtype = max(sorted(set(names)), key=names.count, default="F16")  # OLMo's norms have no weights
    factors = [pair for pair in facts.factors if pair]
    adapter = tuple(_common_coding([pair[side] for pair in factors]) for side in (0, 1)) if factors else None
    return Description(
        **HEAD,
        coding=facts.coding,
        config=config,
        tied=shapes.tied,
        dtype=dtype,
        dtypes={name: found for name, found in facts.dtypes.items() if found != dtype},
        bits=uniform([spec.bits for spec in specs]),
        group_size=_group([spec.cols for spec in specs], [spec.group_size for spec in specs]),
        pattern=uniform([spec.pattern for spec in specs]),
        zeros=uniform([spec.zeros for spec in specs]),
        order=uniform([spec.order for spec in specs]),
        rank=uniform([spec.rank for spec in specs]),
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
    fits = all(divisor(length, largest) == size for length, size in zip(lengths, sizes, strict=True))
    return largest if fits else sizes


def _pack_matrix(
    name: str, matrix: rounding.Coded | Tensor, shape: tuple[int, int], facts: _Facts, spool: Spool
) -> Coding | None:
    found = tuple((matrix.codes if isinstance(matrix, rounding.Coded) else matrix).shape)
    if found != shape:
        raise InputError(f"the {name} is {found}, the config says {shape}: run the stages again")
    if isinstance(matrix, rounding.Coded):
        codes = facts.pack(_unsigned(matrix), 2**matrix.bits)
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
        body.append(_pack_keep(keep, linear.pattern, facts.pack))
    if linear.codes is None:
        values = linear.weight if keep is None else linear.weight[linear.keep]
        body.append(facts.raw(f"{name}.weight", values))
    else:
        codes = linear.codes.numpy()
        body.append(facts.pack(codes if keep is None else codes[keep], 2**linear.bits))
        scales.append(("linears", linear.scales))
    if linear.zeros is not None:
        body.append(facts.pack(linear.zeros.numpy(), 2**linear.bits))
    if linear.group_index is not None:
        body.append(facts.pack(linear.group_index.numpy(), cols // linear.group_size))
    if linear.bias is not None:
        body.append(facts.raw(f"{name}.bias", linear.bias))
    if linear.adapter is not None:
        body += _pack_adapter(name, linear, facts, scales)
    flags = linear.zeros is not None, linear.group_index is not None
    size = linear.group_size or cols
    facts.specs.append(Spec(name, rows, cols, linear.bits, size, linear.pattern, *flags, linear.rank, biased))
    return body


def _pack_keep(keep: np.ndarray, pattern: str, pack: packing.Pack) -> np.ndarray:
    parsed = masks.parse(pattern)
    if parsed:
        return packing.pack_positions(keep, *parsed, pack)
    code = packing.encode_mask(keep)
    return np.concatenate([np.frombuffer(COUNTS.pack(int(keep.sum()), code.size), np.uint8), code])


def _pack_adapter(name: str, linear: Linear, facts: _Facts, scales: list[tuple[str, Tensor]]) -> list[np.ndarray]:
    pair = linear.adapter
    coded = [isinstance(factor, rounding.Coded) for factor in pair]
    if any(coded) != all(coded) or (facts.factors and all(coded) != (facts.factors[0] is not None)):
        raise InputError(f"of the adapters' factors some are coded, some not, first at {name}: run eora again")
    facts.factors.append(pair if all(coded) else None)
    if not all(coded):
        return [facts.raw(f"{name}.{side}", factor) for side, factor in zip("ab", pair, strict=True)]
    scales += [("adapter", factor.scales) for factor in pair]
    return [facts.pack(_unsigned(factor), 2**factor.bits) for factor in pair]


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
    if linear.adapter:
        _check_adapter(name, linear)
    if linear.codes is not None:
        _check_scales(name, linear)
    alive = 0 if linear.keep is None else _revived(linear)
    if alive:
        raise InputError(f"{alive} pruned weights of {name} are not zero: package without masks, or run gptq again")


def _check_adapter(name: str, linear: Linear) -> None:
    rows, cols = linear.shape
    coded = isinstance(linear.adapter[1], rounding.Coded)
    expected = [(linear.rank, cols), (linear.rank, rows) if coded else (rows, linear.rank)]
    sides = [part.codes if isinstance(part, rounding.Coded) else part for part in linear.adapter]
    shapes = [tuple(side.shape) for side in sides]
    if shapes != expected:
        raise InputError(f"the adapter of {name} has factors {shapes}, not {expected}")


def _check_scales(name: str, linear: Linear) -> None:
    rows, cols = linear.shape
    grid = (rows, cols // linear.group_size)
    for what, tensor in (("scales", linear.scales), ("zero points", linear.zeros)):
        if tensor is not None and tuple(tensor.shape) != grid:
            raise InputError(f"the {what} of {name} are {tuple(tensor.shape)}, not {grid}: run stage gptq again")
    if linear.scales.dtype != torch.float16:
        raise InputError(f"the scales of {name} are {linear.scales.dtype}, not float16: run stage gptq again")


def _revived(linear: Linear) -> int:
    """How many pruned weights are not zero."""
    if linear.codes is None:
        return masks.revived(linear.weight, linear.keep)
    return int((linear.codes.numpy() != zero_codes(linear, *linear.shape))[~linear.keep.numpy()].sum())


def _write(description: Description, spool: Spool, file: BinaryIO) -> bytes:
    """Write the safetensors file; the bytes of model.json."""
    table, used = spool.best_table()
    description.scales = table
    tails = spool.tails(table, used)
    tails |= {"scales": [spool.pack(used, 2**16)]} if table else {}
    sizes = {
        name: sum((*spool.bodies.get(name, ()), *(part.size for part in tail)), spool.index(name, tail).size)
        for name, tail in tails.items()
    }
    file.write(header_bytes(sizes, "0" * 64))
    spool.file.seek(0)
    for name, size in sizes.items():
        digest = hashlib.sha256()
        written = 0
        for part in spool.content(name, tails[name]):
            digest.update(part)
            written += file.write(part)
        if written != size:
            raise RuntimeError(f"{name} was planned with {size} bytes and has {written}")
        description.sha256[name] = digest.hexdigest()
    text = description.json()
    file.seek(0)
    file.write(header_bytes(sizes, hashlib.sha256(text).hexdigest()))
    return text


def _unsigned(coded: rounding.Coded) -> np.ndarray:
    """uint8 codes from 0: the sum wraps, so that int8 needs no wider type on the way."""
    return coded.codes.contiguous().numpy().view(np.uint8) + np.uint8(2 ** (coded.bits - 1))
