"""The format of a packed model: its description (model.json), and where each byte of its blobs is.

`Description` is model.json; with the shapes that the model's config gives it fixes a `Layout`, the sections of every
blob. Reader (`tasks.packed.reader`), writer (`tasks.packed.writer`) and plans from a config alone follow the same one.
What a file says is checked here as far as it can be without the blobs' content.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import transformers
from pydantic import BaseModel, ConfigDict, Field, JsonValue
from torch import Tensor
from transformers import PreTrainedModel

from tasks.algorithms import packing
from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families, masks
from tasks.algorithms.quantisation import rounding

FILE = "model.safetensors"
DESCRIPTION = "model.json"
COMPONENTS = ("positions", "values", "scales", "zeros", "embedding", "norms", "adapter", "metadata")
"""What bytes are for. `scales` includes the table and the group of each input (act order); `norms` biases."""
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
"""Of what isn't quantised, by the names that safetensors gives them."""
SIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
HEAD: dict[str, Any] = {"format": "edgepress-packed", "version": 1}
"""What every description begins with."""
COUNTS = struct.Struct("<II")
"""Before entropy coded positions: kept weights, bytes of code."""
LIMIT = 2**24
"""Bytes of model.json and of the safetensors header, at most."""
CHUNK = 2**24
"""Values, or bytes, that are worked on at once."""
UNSAFE = ("quantization_config", "auto_map", "attn_implementation", "experts_implementation", "dtype", "torch_dtype")
"""Of a config: what would change how it is loaded."""
UNUSED = ("num_labels", "id2label", "label2id")
"""What a language model has no use for."""


@dataclass
class Linear:
    """One linear of a block: quantised (codes, scales, bits, …) or not (weight).

    Attributes:
        codes: uint8 [out_features, in_features], the zero point where pruned; None where not quantised.
        scales: float16 [out_features, groups].
        zeros: uint8 [out_features, groups]; None: the middle code 2 ** (bits - 1) everywhere.
        bits: 2 to 8.
        group_size: inputs that share a scale; in_features for whole rows.
        group_index: int [in_features], the group of each input; None: consecutive inputs.
        weight: float [out_features, in_features], 0 where pruned; None where quantised.
        bias: float [out_features] or None.
        keep: bool [out_features, in_features]; None where nothing is pruned.
        pattern: "2:4" (keep : of), "unstructured" or "dense".
        adapter: (A, B), added as B A: float [rank, in_features] and [out_features, rank], or Coded of A and of B^T
            [rank, out_features]; None without.
    """

    codes: Tensor | None = None
    scales: Tensor | None = None
    zeros: Tensor | None = None
    bits: int | None = None
    group_size: int | None = None
    group_index: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    keep: Tensor | None = None
    pattern: str = "dense"
    adapter: tuple[rounding.Coded | Tensor, rounding.Coded | Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return tuple((self.weight if self.codes is None else self.codes).shape)

    @property
    def rank(self) -> int:
        """Of the adapter; 0 without."""
        if self.adapter is None:
            return 0
        a = self.adapter[0]
        return len(a.codes if isinstance(a, rounding.Coded) else a)

    def values(self) -> Tensor:
        """The weight [out_features, in_features], without adapter: float32(scale) * (code - zero), or as stored."""
        if self.codes is None:
            return self.weight
        rows, cols = self.codes.shape
        if self.group_index is None:
            steps = self.codes.to(torch.int16).view(rows, -1, self.group_size)
            steps -= 2 ** (self.bits - 1) if self.zeros is None else self.zeros.to(torch.int16).unsqueeze(2)
            return (self.scales.float().unsqueeze(2) * steps).view(rows, cols)
        index, steps = self.group_index.long(), self.codes.to(torch.int16)
        steps -= 2 ** (self.bits - 1) if self.zeros is None else self.zeros.to(torch.int16)[:, index]
        return self.scales.float()[:, index] * steps


@dataclass
class Model:
    """What a packed folder holds.

    Attributes:
        config: the model's config.json.
        blocks: per block, full module name -> Linear in running order; read once, so an iterator will do.
        embedding: [vocabulary, hidden], of a float type or coded.
        head: the same of an untied head; None where it is the embedding.
        rest: full parameter name -> tensor: all norms.
    """

    config: dict[str, Any]
    blocks: Iterable[Mapping[str, Linear]]
    embedding: rounding.Coded | Tensor
    head: rounding.Coded | Tensor | None
    rest: Mapping[str, Tensor] = field(default_factory=dict)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


_Count = Annotated[int, Field(ge=0, lt=2**31)]
Width = Annotated[int, Field(ge=2, le=8)]
_Size = Annotated[int, Field(ge=1, lt=2**31)]
Dtype = Literal["F16", "BF16", "F32"]
Pattern = Annotated[str, Field(pattern="^(dense|unstructured|[0-9]{1,2}:[0-9]{1,2})$")]
Kind = Literal["linears", "embedding", "adapter"]


class Coding(_Strict):
    """A coded matrix; its groups have the largest size that divides its rows and is at most `group_size`."""

    bits: Width
    group_size: _Size


class Table(_Strict):
    """The distinct scales of some kinds of matrices are stored once, and each scale as an index."""

    values: Annotated[int, Field(ge=1, le=2**16)]
    kinds: list[Kind]


class Description(_Strict):
    """model.json. Fields that differ between linears hold a list with one entry per linear, in running order."""

    format: Literal["edgepress-packed"]
    version: Literal[1]
    config: dict[str, JsonValue]
    tied: bool
    dtype: Dtype
    dtypes: dict[str, Dtype] = {}
    bits: Width | None | list[Width | None]
    group_size: _Size | list[_Size]
    pattern: Pattern | list[Pattern]
    zeros: bool | list[bool] = False
    order: bool | list[bool] = False
    rank: _Count | list[_Count] = 0
    adapter: tuple[Coding, Coding] | None = None
    embedding: Coding | None = None
    head: Coding | None = None
    scales: Table | None = None
    sha256: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]]

    def json(self) -> bytes:
        """The file's bytes."""
        content = self.model_dump(mode="json", exclude_defaults=True)
        return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()


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
    """A run of bytes in a blob. `bits`: the information in it, at least."""

    linear: str
    part: str
    component: str
    size: int
    bits: float


Peek = Callable[[Spec, int], tuple[int, int]]
"""(a linear with entropy coded positions, offset in its blob) -> kept weights, bytes of code."""


class Shapes(NamedTuple):
    """What a config says of the sizes: per block, linear -> (out, in); which have a bias; of the rest, the shapes."""

    linears: tuple[dict[str, tuple[int, int]], ...]
    biases: frozenset[str]
    rest: dict[str, tuple[int, ...]]
    table: tuple[int, int]
    tied: bool


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

    def sections(self, blob: str, peek: Peek) -> Iterator[Section]:
        """The sections of a blob in their order."""
        if blob.startswith("layers."):
            yield from self._block(self.specs[int(blob[7:])], peek)
        elif blob in ("embedding", "head"):
            yield from self._matrix(blob)
        elif blob == "scales":
            size = 2 * self.description.scales.values
            yield Section("", "scales", "scales", size, 8 * size)
        else:
            for name, shape in self.rest.items():
                size = math.prod(shape) * SIZES[self.dtype(name)]
                yield Section("", name, "norms", size, 8 * size)

    def _block(self, specs: Iterable[Spec], peek: Peek) -> Iterator[Section]:
        offset = 0
        for spec in specs:
            for section in self._body(spec, offset, peek):
                offset += section.size
                yield section
        for spec in specs:
            if spec.bits:
                yield self._scales(spec.name, "scales", "scales", spec.rows * spec.groups, "linears")
            if spec.rank and self.description.adapter:
                for part, length, coding in zip("ab", (spec.cols, spec.rows), self.description.adapter, strict=True):
                    count = spec.rank * (length // divisor(length, coding.group_size))
                    yield self._scales(spec.name, f"{part}.scales", "adapter", count, "adapter")

    def _body(self, spec: Spec, offset: int, peek: Peek) -> Iterator[Section]:
        count, name = spec.rows * spec.cols, spec.name
        kept, pattern = count, masks.parse(spec.pattern)
        if pattern:
            keep, of = pattern
            kept = count // of * keep
            size, bits = packing.positions_bytes(count, keep, of), count // of * math.log2(packing.cases(keep, of))
            yield Section(name, "positions", "positions", size, bits)
        elif spec.pattern == "unstructured":
            kept, size = peek(spec, offset)
            bits = packing.log2_combinations(count, kept)
            yield Section(name, "positions", "positions", COUNTS.size + size, bits)
        if spec.bits:
            yield _digits(name, "values", "values", kept, 2**spec.bits)
        else:
            size = kept * SIZES[self.dtype(f"{name}.weight")]
            yield Section(name, "values", "values", size, 8 * size)
        if spec.zeros:
            yield _digits(name, "zeros", "zeros", spec.rows * spec.groups, 2**spec.bits)
        if spec.order:
            yield _digits(name, "order", "scales", spec.cols, spec.groups)
        if spec.bias:
            size = spec.rows * SIZES[self.dtype(f"{name}.bias")]
            yield Section(name, "bias", "norms", size, 8 * size)
        if spec.rank:
            yield from self._factors(spec)

    def _factors(self, spec: Spec) -> Iterator[Section]:
        codings = self.description.adapter or (None, None)
        for part, length, coding in zip("ab", (spec.cols, spec.rows), codings, strict=True):
            if coding:
                yield _digits(spec.name, part, "adapter", spec.rank * length, 2**coding.bits)
            else:
                size = spec.rank * length * SIZES[self.dtype(f"{spec.name}.{part}")]
                yield Section(spec.name, part, "adapter", size, 8 * size)

    def _matrix(self, blob: str) -> Iterator[Section]:
        rows, cols = self.table_shape
        coding = getattr(self.description, blob)
        if coding:
            yield _digits("", "codes", "embedding", rows * cols, 2**coding.bits)
            count = rows * (cols // divisor(cols, coding.group_size))
            yield self._scales("", "scales", "embedding", count, "embedding")
        else:
            size = rows * cols * SIZES[self.dtype(blob)]
            yield Section("", "codes", "embedding", size, 8 * size)

    def _scales(self, name: str, part: str, component: str, count: int, kind: str) -> Section:
        table = self.description.scales
        if table and kind in table.kinds:
            return _digits(name, part, component, count, table.values)
        return Section(name, part, component, 2 * count, 16 * count)


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
    shapes = shapes_of(json.dumps(description.config))
    if description.tied != shapes.tied or (description.tied and description.head):
        raise InputError("embedding and head are tied by the config or by the file, not by both: the folder is damaged")
    count = sum(map(len, shapes.linears))
    names = ("bits", "group_size", "pattern", "zeros", "order", "rank")
    columns = {name: _spread(name, getattr(description, name), count) for name in names}
    rows = iter(zip(*columns.values(), strict=True))
    specs = tuple(
        tuple(_spec(name, shape, name in shapes.biases, *next(rows)) for name, shape in block.items())
        for block in shapes.linears
    )
    return Layout(description, specs, shapes.rest, shapes.table)


@functools.lru_cache(maxsize=8)
def shapes_of(config: str) -> Shapes:
    """The sizes that a config gives, as JSON to be remembered.

    Raises:
        InputError: it describes no model that can be.
    """
    model = skeleton(json.loads(config))
    described = families.of_model(model)
    parameters = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    blocks = families.linears_by_block(model)
    linears = tuple({name: (m.out_features, m.in_features) for name, m in block.items()} for block in blocks)
    names = {name for block in linears for name in block}
    biases = frozenset(name for name in names if f"{name}.bias" in parameters)
    table = f"{described.embedding}.weight"
    taken = {f"{name}.{part}" for name in names for part in ("weight", "bias")} | {table, f"{described.head}.weight"}
    rest = {name: shape for name, shape in parameters.items() if name not in taken}
    sizes = [side for shape in (*parameters.values(), parameters[table]) for side in shape]
    if not 0 < min(sizes) <= max(sizes) < 2**31:
        raise InputError(f"the config has sizes from {min(sizes)} to {max(sizes)}: it describes no model")
    return Shapes(linears, biases, rest, parameters[table], bool(model.config.tie_word_embeddings))


def skeleton(config: Mapping[str, Any]) -> PreTrainedModel:
    """The model without weights, on the meta device: no memory, no random numbers.

    Raises:
        InputError: the config has entries that none needs here, or makes no model.
    """
    unsafe = [key for key in config if key in UNSAFE + UNUSED or key.startswith("_")]
    if unsafe:
        raise InputError(f"the config of a packed model has the entry {unsafe[0]!r}: the folder is damaged")
    try:
        kind = getattr(transformers, families.family(config).architecture)
        with torch.device("meta"):
            parsed = kind.config_class.from_dict(dict(config))
            return transformers.AutoModelForCausalLM.from_config(parsed, dtype=torch.float32)
    except InputError:
        raise
    except Exception as error:  # a config can be wrong in as many ways as transformers reads it
        raise InputError(f"the config makes no model that is known here: {str(error)[:200]}") from error


def clean(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without the entries that `skeleton` refuses."""
    return {key: value for key, value in config.items() if key not in UNSAFE + UNUSED and not key.startswith("_")}


def zero_codes(linear: Linear, rows: int, cols: int) -> np.ndarray:
    """uint8 [out, in]: the code of the value zero."""
    if linear.zeros is None:
        return np.full((rows, cols), 2 ** (linear.bits - 1), np.uint8)
    zeros = linear.zeros.numpy()
    if linear.group_index is None:
        return np.repeat(zeros, linear.group_size, axis=1)
    return zeros[:, linear.group_index.numpy()]


def header(sizes: Mapping[str, int], digest: str) -> bytes:
    """The safetensors header, length included, of blobs of these sizes; digest: sha256 of model.json."""
    entries, start = {"__metadata__": {DESCRIPTION: digest}}, 0
    for name, size in sizes.items():
        entries[name] = {"dtype": "U8", "shape": [size], "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text


def checked_header(path: Path, digest: str) -> dict[str, int]:
    """Blob -> bytes of a file whose header is the one that `save` writes.

    Raises:
        InputError: it isn't, the file is longer or shorter, or belongs to another model.json.
    """
    damaged = InputError(
        f"{path} is no packed model or is damaged: its header is not the one that its content asks for"
    )
    try:
        total = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(LIMIT, total - 8):
                raise damaged
            text = file.read(length)
        entries = json.loads(text)
        found = entries.pop("__metadata__")[DESCRIPTION]
        sizes = {name: entry["shape"][0] for name, entry in entries.items()}
        expected = header(sizes, found)
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}): run the stage package again") from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise damaged from error
    if expected[8:] != text or any(type(size) is not int or size < 0 for size in sizes.values()):
        raise damaged
    if found != digest:
        raise InputError(f"{path} belongs to another {DESCRIPTION}: one of them was changed; fetch the folder again")
    if total != len(expected) + sum(sizes.values()):
        raise InputError(
            f"{path} has {total} bytes, its header gives {len(expected) + sum(sizes.values())}: truncated?"
        )
    return sizes


def read_bytes(path: Path, hint: str) -> bytes:
    """A small file's content.

    Raises:
        InputError: it can't be read, with the hint; or it is too long for what it should be.
    """
    try:
        if path.stat().st_size > LIMIT:
            raise InputError(f"{path} has {path.stat().st_size} bytes, more than {LIMIT}: it is no {path.name}")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}): {hint}") from error


def uniform(values: list[Any]) -> Any:
    """The value that all share, or the list."""
    return values[0] if all(value == values[0] for value in values) else values


def subsets(kinds: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """All of them, the empty one first."""
    kinds = tuple(kinds)
    return itertools.chain.from_iterable(itertools.combinations(kinds, n) for n in range(len(kinds) + 1))


def _spec(
    name: str,
    shape: tuple[int, int],
    bias: bool,
    bits: int | None,
    group_size: int,
    pattern: str,
    zeros: bool,
    order: bool,
    rank: int,
) -> Spec:
    parsed = masks.parse(pattern)
    if parsed and (packing.cases(*parsed) < 2 or shape[1] % parsed[1]):
        raise InputError(f"{name} has {shape[1]} inputs, not divisible by groups of {pattern}")
    if rank > min(shape):
        raise InputError(f"the adapter of {name} has rank {rank}, above the smaller side of {shape}")
    return Spec(
        name,
        *shape,
        bits,
        divisor(shape[1], group_size),
        pattern,
        zeros and bool(bits),
        order and bool(bits),
        rank,
        bias,
    )


def _spread(name: str, value: Any, count: int) -> list[Any]:
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise InputError(f"{DESCRIPTION} has {len(value)} entries in {name} for {count} linears: the folder is damaged")
    return value


def _digits(name: str, part: str, component: str, count: int, base: int) -> Section:
    return Section(name, part, component, packing.digits_bytes(count, base), count * math.log2(base))
