"""The packed model folder: one safetensors file and one model.json with what is in it, lossless and near its bound.

`model.safetensors` holds one blob of bytes per block, one for the embedding (one more for an untied head), one for all
norms, and, where it pays, a table of the scales that occur; `model.json` the model's config, how each linear is stored,
and the sha256 of every blob. Offsets in a blob follow from shapes, so nothing but content takes bytes. How integers and
positions are packed is `tasks.algorithms.packing`'s.

Reading trusts nothing: header, description, sizes and checksums are checked before anything is allocated, and a file
that was changed is refused. It quantises nothing and rounds nothing: what goes in comes out, bit by bit. It is no
format for kernels: weights are unpacked to float32 once, at loading.

    edgepress size FOLDER                                       what its bytes are, and the bound
    edgepress size CONFIG --bits 4 --pattern 2:4 --group-size 32   the same of a model yet to be made
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from tasks.algorithms import packing
from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families, masks
from tasks.algorithms.quantisation import rounding
from tasks.packed import file_format, writer
from tasks.packed.file_format import (
    COMPONENTS,
    DESCRIPTION,
    FILE,
    Coding,
    Description,
    Layout,
    Linear,
    Model,
    Section,
    Shapes,
    Spec,
    Table,
)
from tasks.packed.source_folder import read

__all__ = [
    "COMPONENTS",
    "DESCRIPTION",
    "FILE",
    "Linear",
    "Model",
    "PackedLinear",
    "blob_bytes",
    "bound",
    "component_bytes",
    "config",
    "copy_tokenizer",
    "is_packed",
    "layout",
    "load",
    "load_model",
    "planned",
    "planned_bytes",
    "read",
    "save",
    "stream",
]

GENERATION = "generation_config.json"
"""Transformers' settings for generation, where the folder has them."""

_MOST = 2**10
"""Weights per byte of a linear, at most: entropy coded positions of an empty matrix take next to nothing."""

_TENSORS = re.compile(r"\.(safetensors|bin|pt|pth)(\.|$)")
_MODEL_FILES = ("config.json", "quantize_config.json", "model.json", "manifest.json")
"""Of a model folder: what `copy_tokenizer` leaves, beside tensors."""


_OCTAVES = 8
"""Over which a model's scales spread, about: for plans of scales on a grid."""


def is_packed(folder: Path) -> bool:
    """Whether the folder holds a packed model."""
    return (folder / DESCRIPTION).exists()


def config(folder: Path) -> dict[str, Any]:
    """The config.json of a packed model.

    Raises:
        InputError: no such model, or a damaged one.
    """
    return _Package(folder).description.config


def load_model(folder: Path) -> PreTrainedModel:
    """The model on the CPU in float32, in evaluation mode; block by block, so that little more than it is in memory.

    Its logits are those of the folder that was packed, bit by bit, as `tasks.models.gptq_folder.load_model` loads it.

    Raises:
        InputError: a file is damaged, changed or of another version.
    """
    package = _Package(folder)
    model = file_format.skeleton(package.description.config)
    described = families.of_model(model)
    embedding = nn.Parameter(package.matrix("embedding"), requires_grad=False)
    model.get_submodule(described.embedding).weight = embedding
    head = embedding if package.description.tied else nn.Parameter(package.matrix("head"), requires_grad=False)
    model.get_submodule(described.head).weight = head
    for _, linears in package.blocks():
        for name, linear in linears.items():
            _attach(model, name, _module(linear))
    for name, tensor in package.rest().items():
        _attach(model, name, nn.Parameter(tensor.float(), requires_grad=False))
    rotary = f"{described.blocks.rpartition('.')[0]}.rotary_emb"  # its frequencies follow from the config
    _attach(model, rotary, type(model.get_submodule(rotary))(config=model.config))
    left = [name for name, t in itertools.chain(model.named_parameters(), model.named_buffers()) if t.is_meta]
    if left:
        raise RuntimeError(f"the packed model has no {left[0]}: its family isn't described fully")
    if (folder / GENERATION).exists():
        model.generation_config = _generation(folder)
    return model.eval()


def _generation(folder: Path) -> transformers.GenerationConfig:
    """The folder's settings for generation."""
    file_format.read_bytes(folder / GENERATION, "copy it again")  # refuses what is too long
    try:
        return transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # it can be wrong in as many ways as transformers reads it
        raise InputError(
            f"{folder / GENERATION} can't be read ({str(error)[:200]}): remove it or copy it again"
        ) from error


def stream(folder: Path) -> Iterator[tuple[int, dict[str, Linear]]]:
    """(block, full module name -> Linear) one after another; only that block's bytes are read, checked and unpacked.

    Raises:
        InputError: as `load_model`.
    """
    return _Package(folder).blocks()


def load(folder: Path) -> Model:
    """All that the folder holds, as it is stored: codes stay codes; blocks are read when they are asked for, once.

    Raises:
        InputError: as `load_model`.
    """
    package = _Package(folder)
    return Model(
        package.description.config,
        (linears for _, linears in package.blocks()),
        package.coded("embedding"),
        None if package.description.tied else package.coded("head"),
        package.rest(),
    )


def save(model: Model, folder: Path) -> None:
    """Write model.safetensors and model.json, one block at a time; both take their names when they are complete.

    Same content, same bytes. Memory: a block, the embedding, and all scales.

    Raises:
        InputError: tensors that don't fit the config or each other; pruned weights that are not zero; a mask that isn't
            of its pattern.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".packing") as scratch:
        writer.write(model, Path(scratch))
        _Package(Path(scratch))  # refuses what could not be read back
        for name in (FILE, DESCRIPTION):
            os.replace(Path(scratch) / name, folder / name)


def copy_tokenizer(source: Path, folder: Path) -> list[str]:
    """Copy what a model folder holds besides the model (tokenizer, generation settings); JSON in as few bytes as goes.

    A file keeps its content: blanks go, and the merges of a BPE are written as strings, if that is the same tokenizer.

    Returns:
        The names of the files.
    """
    names = []
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if not path.is_file() or path.name in _MODEL_FILES or _TENSORS.search(path.name):
            continue
        if path.suffix == ".json":
            text = path.read_text(encoding="utf-8")
            small = _small_tokenizer(text) if path.name == "tokenizer.json" else None
            (folder / path.name).write_text(small or _small_json(json.loads(text)), encoding="utf-8")
        else:
            shutil.copyfile(path, folder / path.name)
        names.append(path.name)
    return names


def component_bytes(folder: Path) -> dict[str, int]:
    """Bytes of all files below the folder by what they are for (`COMPONENTS`).

    Raises:
        InputError: as `load_model`.
    """
    package = _Package(folder)
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return _sum(package.sections(), lambda section: section.size, total)


def layout(folder: Path) -> Layout:
    """How everything is stored, from model.json and the header alone: per linear bits, pattern, rank, ….

    Raises:
        InputError: as `load_model`, but for the blobs' content.
    """
    return _Package(folder).layout


def blob_bytes(folder: Path) -> dict[str, int]:
    """Bytes of each blob: "layers.0", …, "embedding", "head" where untied, "rest", "scales" where there is a table.

    Raises:
        InputError: as `layout`.
    """
    return _Package(folder).sizes


def bound(model: Path | Model) -> dict[str, float]:
    """Bits that each component must hold, of a packed folder or of a model yet to be saved.

    log2 C(of, keep) per group, log2 C(count, kept) per unstructured matrix, the bits of kept values, of zero points,
    norms and factors; scales 16 bits, or log2 of how many distinct ones there are and 16 for each of them. Metadata: 0.

    Raises:
        InputError: as `load_model`.
    """
    if isinstance(model, Model):
        with tempfile.TemporaryDirectory() as scratch:
            save(model, Path(scratch))
            return bound(Path(scratch))
    return _sum(_Package(model).sections(), lambda section: section.bits, None)


def planned(
    config: Mapping[str, Any],
    bits: Mapping[str, int | None] | int | None = 4,
    pattern: Mapping[str, str] | str = "dense",
    group_size: int = 32,
    embedding_bits: int = 16,
    embedding_group: int = 32,
    *,
    zeros: bool = False,
    order: bool = False,
    rank: Mapping[str, int] | int = 0,
    adapter_bits: int = 16,
    adapter_group: int = 64,
    distinct_scales: int | None = None,
    kinds: Iterable[str] | None = None,
    sparsity: float = 0.5,
    dtype: str = "F16",
) -> tuple[dict[str, int], dict[str, float]]:
    """Bytes and bound of model.safetensors + model.json from a config alone, by component; no weights are made.

    Exact, but for unstructured patterns, whose entropy code depends on the masks.

    Args:
        config: the model's config.json.
        bits: of all linears, or full module name -> bits; None is not quantised.
        pattern: of all linears, or full module name -> pattern.
        group_size: inputs that share a scale; -1 is the whole row.
        embedding_bits: 4, 8 or 16 (not quantised); of an untied head, too.
        embedding_group: values of a row that share a scale.
        zeros: zero points are stored (asymmetric quantisation).
        order: the group of each input is stored (act order).
        rank: of the adapters.
        adapter_bits: 4, 8 or 16; in groups of `adapter_group` or the next smaller divisor of a row.
        distinct_scales: how many different scales the table has; None: too many for a table.
        kinds: whose scales are in the table, of "linears", "embedding", "adapter"; None: of whichever it pays.
        sparsity: share of pruned weights, for "unstructured".
        dtype: of all that isn't quantised: F16, BF16 or F32.

    Raises:
        InputError: the config's architecture isn't supported, or a pattern or group doesn't fit a linear.
    """
    if embedding_bits not in (4, 8, 16) or adapter_bits not in (4, 8, 16):
        raise InputError(f"embedding and adapters take 4, 8 or 16 bits, not {embedding_bits} and {adapter_bits}")
    config = file_format.clean(config)
    shapes = file_format.shapes_of(json.dumps(config))
    table = None if embedding_bits == 16 else Coding(bits=embedding_bits, group_size=embedding_group)
    factor = None if adapter_bits == 16 or not rank else Coding(bits=adapter_bits, group_size=adapter_group)
    names = [name for block in shapes.linears for name in block]
    description = Description(
        **file_format.HEAD,
        config=config,
        tied=shapes.tied,
        dtype=dtype,
        bits=_per_linear(bits, names, None),
        group_size=_checked_group(shapes, group_size),
        pattern=_per_linear(pattern, names, "dense"),
        zeros=zeros,
        order=order,
        rank=_per_linear(rank, names, 0),
        adapter=(factor, factor) if factor else None,
        embedding=table,
        head=None if shapes.tied else table,
        sha256={},
    )
    if not distinct_scales:
        choices = [()]
    elif kinds is None:
        choices = file_format.subsets(("linears", "embedding", "adapter"))
    else:
        choices = [tuple(kinds)]
    tables = [Table(values=distinct_scales, kinds=list(some)) if some else None for some in choices]
    total, sections = min((_size(description, one, sparsity) for one in tables), key=lambda found: found[0])
    return _sum(sections, lambda section: section.size, total), _sum(sections, lambda section: section.bits, None)


def _size(description: Description, table: Table | None, sparsity: float) -> tuple[int, list[Section]]:
    """Bytes of both files and the sections of all blobs, with the scales stored so; `description` is changed."""

    def peek(spec: Spec, offset: int) -> tuple[int, int]:
        kept = spec.rows * spec.cols - round(spec.rows * spec.cols * sparsity)
        return kept, 4 * math.ceil(packing.log2_combinations(spec.rows * spec.cols, kept) / 32 + 1)

    description.scales = table
    layout = file_format.lay_out(description)
    sections = {blob: list(layout.sections(blob, peek)) for blob in layout.names}
    sizes = {blob: sum(section.size for section in found) for blob, found in sections.items()}
    description.sha256 = dict.fromkeys(layout.names, "0" * 64)
    total = len(file_format.header(sizes, "0" * 64)) + sum(sizes.values()) + len(description.json())
    return total, list(itertools.chain.from_iterable(sections.values()))


def _per_linear(value: Any, names: list[str], default: Any) -> Any:
    """One value for all linears, or one for each, of a value or a mapping."""
    if not isinstance(value, Mapping):
        return value
    return file_format.uniform([value.get(name, default) for name in names])


def _checked_group(shapes: Shapes, group_size: int) -> int:
    lengths = [cols for block in shapes.linears for _, cols in block.values()]
    if group_size == -1:
        return max(lengths)
    wrong = next((length for length in lengths if group_size < 1 or length % group_size), None)
    if wrong:
        raise InputError(f"group_size = {group_size} doesn't divide rows of {wrong}: choose a divisor, or -1")
    return group_size


def planned_bytes(config: Mapping[str, Any], *args: Any, **settings: Any) -> int:
    """The size of model.safetensors + model.json from a config alone; arguments and errors as `planned`."""
    return sum(planned(config, *args, **settings)[0].values())


class PackedLinear(nn.Module):
    """A linear that computes in float32 what gptqmodel's torch kernel and its `Lora` compute, operation by operation.

    Attributes:
        weight: float32 [out_features, in_features], without the adapter.
        bias: float32 [out_features] or None.
        a: float32 [rank, in_features] or None.
        b: float32 [rank, out_features] or None; x a^T b is added.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, adapter: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.register_buffer("a", adapter[0] if adapter else None)
        self.register_buffer("b", adapter[1] if adapter else None)

    def forward(self, x: Tensor) -> Tensor:
        """[…, in_features] -> […, out_features]."""
        # The product of a matrix with a transposed one, the adapter after the bias: another order rounds differently.
        flat = x.reshape(-1, x.shape[-1])
        out = torch.matmul(flat, self.weight.T)
        if self.bias is not None:
            out.add_(self.bias)
        if self.a is not None:
            out.add_((flat @ self.a.T) @ self.b)
        return out.reshape(*x.shape[:-1], self.out_features)


class _Package:
    """An opened packed folder: everything but the blobs' content is checked."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        text = file_format.read_bytes(folder / DESCRIPTION, "run the stage package again")
        try:
            self.description = Description.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"])) or "its text"
            raise InputError(
                f"{folder / DESCRIPTION} describes no packed model: {place}: {first['msg']}; it is damaged or of "
                "another version of edgepress"
            ) from error
        sizes = file_format.checked_header(self.path, hashlib.sha256(text).hexdigest())
        blocks = self.description.config.get("num_hidden_layers")
        if type(blocks) is not int or blocks != sum(name.startswith("layers.") for name in sizes):
            raise InputError(f"{self.path} does not hold the {blocks} blocks of its config: the folder is damaged")
        self.layout = file_format.lay_out(self.description)
        if list(sizes) != self.layout.names or set(self.description.sha256) != set(sizes):
            raise InputError(f"{self.path} holds other blobs than {DESCRIPTION} describes: the folder is damaged")
        self.sizes = sizes
        for blob, size in sizes.items():
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
        if blob.startswith("layers."):
            weights = sum(spec.rows * spec.cols for spec in self.layout.specs[int(blob[7:])])
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
            coded = any(s.pattern == "unstructured" for s in self._specs(name))
            yield from self.layout.sections(name, _peeking(self.blob(name) if coded else None))

    def parts(self, name: str) -> dict[tuple[str, str], np.ndarray]:
        """(linear, part) -> its bytes."""
        data, parts, offset = self.blob(name), {}, 0
        for section in self.layout.sections(name, _peeking(data)):
            parts[section.linear, section.part] = data[offset : offset + section.size]
            offset += section.size
        if offset != data.size:
            raise InputError(f"{name} in {self.path} has {data.size} bytes, not {offset}: the folder is damaged")
        return parts

    def blocks(self) -> Iterator[tuple[int, dict[str, Linear]]]:
        """(block, full module name -> Linear)."""
        for index, specs in enumerate(self.layout.specs):
            parts = self.parts(f"layers.{index}")
            yield index, {spec.name: self._linear(spec, parts) for spec in specs}

    def matrix(self, name: str) -> Tensor:
        """float32 [vocabulary, hidden] of embedding or head; decoded by parts, in the memory of the result."""
        stored = self.coded(name)
        if not isinstance(stored, rounding.Coded):
            return stored.float()
        rows, cols = stored.codes.shape
        values, step = torch.empty(rows, cols), max(1, file_format.CHUNK // cols)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            values[part] = rounding.values(rounding.Coded(stored.codes[part], stored.scales[part], *stored[2:]))
        return values

    def coded(self, name: str) -> rounding.Coded | Tensor:
        """Embedding or head [vocabulary, hidden] as it is stored."""
        parts, (rows, cols) = self.parts(name), self.layout.table_shape
        coding = getattr(self.description, name)
        if coding is None:
            return _tensor(parts["", "codes"], self.layout.dtype(name), (rows, cols))
        size = file_format.divisor(cols, coding.group_size)
        codes = packing.unpack_digits(parts["", "codes"], rows * cols, 2**coding.bits).reshape(rows, cols)
        scales = self._scales(parts["", "scales"], (rows, cols // size), "embedding")
        return rounding.Coded(_signed(codes, coding.bits), scales, coding.bits, size)

    def rest(self) -> dict[str, Tensor]:
        """Full parameter name -> tensor."""
        parts = self.parts("rest")
        return {
            name: _tensor(parts["", name], self.layout.dtype(name), shape) for name, shape in self.layout.rest.items()
        }

    @functools.cached_property
    def table(self) -> Tensor:
        """float16 [distinct scales]."""
        return _tensor(self.blob("scales"), "F16", (self.description.scales.values,))

    def _specs(self, blob: str) -> tuple[Spec, ...]:
        return self.layout.specs[int(blob[7:])] if blob.startswith("layers.") else ()

    def _scales(self, data: np.ndarray, shape: tuple[int, int], kind: str) -> Tensor:
        table = self.description.scales
        if not (table and kind in table.kinds):
            return _tensor(data, "F16", shape)
        index = packing.unpack_digits(data, math.prod(shape), table.values)
        return self.table[torch.from_numpy(index.astype(np.int32)).reshape(shape)]

    def _linear(self, spec: Spec, parts: Mapping[tuple[str, str], np.ndarray]) -> Linear:
        name, shape = spec.name, (spec.rows, spec.cols)
        keep = _unpack_keep(spec, parts.get((name, "positions")))
        linear = Linear(bits=spec.bits, pattern=spec.pattern)
        linear.keep = None if keep is None else torch.from_numpy(keep)
        if spec.bits:
            self._quantised(spec, parts, keep, linear)
        else:
            dtype = self.layout.dtype(f"{name}.weight")
            values = _tensor(parts[name, "values"], dtype, (-1,))
            linear.weight = values.reshape(shape) if keep is None else torch.zeros(shape, dtype=values.dtype)
            if keep is not None:
                linear.weight[linear.keep] = values
        if spec.bias:
            linear.bias = _tensor(parts[name, "bias"], self.layout.dtype(f"{name}.bias"), (spec.rows,))
        if spec.rank:
            linear.adapter = tuple(self._factor(spec, part, parts) for part in "ab")
        return linear

    def _quantised(self, spec: Spec, parts: Mapping, keep: np.ndarray | None, linear: Linear) -> None:
        grid, base, name = (spec.rows, spec.groups), 2**spec.bits, spec.name
        linear.group_size = spec.group_size
        linear.scales = self._scales(parts[name, "scales"], grid, "linears")
        if spec.zeros:
            zeros = packing.unpack_digits(parts[name, "zeros"], math.prod(grid), base)
            linear.zeros = torch.from_numpy(zeros).reshape(grid)
        if spec.order:
            order = packing.unpack_digits(parts[name, "order"], spec.cols, spec.groups)
            linear.group_index = torch.from_numpy(order.astype(np.int32))
        kept = spec.rows * spec.cols if keep is None else int(keep.sum())
        values = packing.unpack_digits(parts[name, "values"], kept, base)
        codes = values if keep is None else file_format.zero_codes(linear, spec.rows, spec.cols)
        if keep is not None:
            codes[keep] = values
        linear.codes = torch.from_numpy(codes).reshape(spec.rows, spec.cols)

    def _factor(self, spec: Spec, part: str, parts: Mapping) -> rounding.Coded | Tensor:
        length, name = (spec.cols if part == "a" else spec.rows), spec.name
        if not self.description.adapter:
            shape = (spec.rank, length) if part == "a" else (length, spec.rank)
            return _tensor(parts[name, part], self.layout.dtype(f"{name}.{part}"), shape)
        coding = self.description.adapter["ab".index(part)]
        size = file_format.divisor(length, coding.group_size)
        codes = packing.unpack_digits(parts[name, part], spec.rank * length, 2**coding.bits).reshape(spec.rank, length)
        scales = self._scales(parts[name, f"{part}.scales"], (spec.rank, length // size), "adapter")
        return rounding.Coded(_signed(codes, coding.bits), scales, coding.bits, size)


def _peeking(data: np.ndarray | None) -> file_format.Peek:
    """Reads the counts before entropy coded positions, checked against the blob's and the matrix's size."""

    def peek(spec: Spec, offset: int) -> tuple[int, int]:
        head = data[offset : offset + file_format.COUNTS.size].tobytes()
        kept, size = file_format.COUNTS.unpack(head) if len(head) == file_format.COUNTS.size else (0, data.size)
        if kept > spec.rows * spec.cols or size > data.size - offset - file_format.COUNTS.size:
            raise InputError(f"the positions of {spec.name} don't fit their blob: the file is damaged")
        return kept, size

    return peek


def _unpack_keep(spec: Spec, data: np.ndarray | None) -> np.ndarray | None:
    """bool [out, in], or None where nothing is pruned."""
    if data is None:
        return None
    pattern = masks.parse(spec.pattern)
    if pattern:
        return packing.unpack_positions(data, spec.rows, spec.cols, *pattern)
    kept, _ = file_format.COUNTS.unpack(data[: file_format.COUNTS.size].tobytes())
    mask = packing.decode_mask(data[file_format.COUNTS.size :], spec.rows * spec.cols, kept)
    return mask.reshape(spec.rows, spec.cols)


def _tensor(data: np.ndarray, dtype: str, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(data.copy()).view(file_format.DTYPES[dtype]).reshape(shape)


def _signed(codes: np.ndarray, bits: int) -> Tensor:
    """int8 codes around zero of unsigned ones."""
    return torch.from_numpy((codes - np.uint8(2 ** (bits - 1))).view(np.int8))  # the difference wraps


def _module(linear: Linear) -> nn.Module:
    bias = None if linear.bias is None else linear.bias.float()
    weight = linear.values().float()
    if linear.codes is None and linear.adapter is None:
        with torch.device("meta"):
            module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        module.weight = nn.Parameter(weight, requires_grad=False)
        module.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return module
    adapter = None
    if linear.adapter is not None:
        a, b = linear.adapter
        a = rounding.values(a) if isinstance(a, rounding.Coded) else a.float()
        b = rounding.values(b) if isinstance(b, rounding.Coded) else b.float().T.contiguous()
        adapter = a, b
    return PackedLinear(weight, bias, adapter)


def _attach(model: nn.Module, name: str, value: nn.Module | nn.Parameter) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, value)


def _small_json(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False)


def _small_tokenizer(text: str) -> str | None:
    """A tokenizer.json whose merges are strings, not pairs; None where the library doesn't read it as the same one."""
    content = json.loads(text)
    try:
        merges = content["model"]["merges"]
        content["model"]["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        small = _small_json(content)
        same = tokenizers.Tokenizer.from_str(small).to_str() == tokenizers.Tokenizer.from_str(text).to_str()
    except Exception:  # no BPE, or one that this library can't read: what it raises has no narrower class
        return None
    return small if same else None


def _sum(sections: Iterable[Section], value: Callable[[Section], float], total: int | None) -> dict[str, Any]:
    found = dict.fromkeys(COMPONENTS, 0 if total is not None else 0.0)
    for section in sections:
        found[section.component] += value(section)
    if total is not None:
        found["metadata"] = total - sum(found.values())
    return found


def _print_table(sizes: Mapping[str, int], bits: Mapping[str, float]) -> None:
    print(f"{'component':<11}{'bytes':>14}{'bound':>17}{'ratio':>9}")
    for name in COMPONENTS:
        ratio = f"{8 * sizes[name] / bits[name]:>9.4f}" if bits[name] else ""
        print(f"{name:<11}{sizes[name]:>14}{bits[name] / 8:>17.1f}{ratio}")
    known = [name for name in COMPONENTS if bits[name]]
    content, least = sum(sizes[name] for name in known), sum(bits.values()) / 8
    print(f"{'content':<11}{content:>14}{least:>17.1f}{content / least:>9.4f}")
    print(f"{'total':<11}{sum(sizes.values()):>14}")


def main(arguments: list[str] | None = None) -> None:
    """The command: a table of bytes, of a packed folder or planned from a config."""
    parser = argparse.ArgumentParser(
        description="Bytes of a packed model, by what they are for, and the least possible"
    )
    parser.add_argument("path", type=Path, help="a packed folder, a folder with a config.json, or a config.json")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--pattern", default="dense", help="keep:of, unstructured or dense")
    parser.add_argument("--sparsity", type=float, default=0.5, help="of unstructured patterns")
    parser.add_argument("--group-size", type=int, default=32, help="-1: the whole row")
    parser.add_argument("--asymmetric", action="store_true", help="store zero points")
    parser.add_argument("--embedding-bits", type=int, choices=(4, 8, 16), default=16)
    parser.add_argument("--embedding-group", type=int, default=32)
    parser.add_argument("--rank", type=int, default=0, help="of the adapters")
    parser.add_argument("--adapter-bits", type=int, choices=(4, 8, 16), default=16)
    parser.add_argument(
        "--scale-steps", type=int, help=f"scales are powers of 2 ** (1 / steps); assumes {_OCTAVES} octaves of them"
    )
    given = parser.parse_args(arguments)
    try:
        if given.path.is_dir() and is_packed(given.path):
            _print_table(component_bytes(given.path), bound(given.path))
            return
        path = given.path / "config.json" if given.path.is_dir() else given.path
        described = json.loads(file_format.read_bytes(path, "name a packed folder or a config.json"))
        _print_table(
            *planned(
                described,
                given.bits,
                given.pattern,
                given.group_size,
                given.embedding_bits,
                given.embedding_group,
                zeros=given.asymmetric,
                rank=given.rank,
                adapter_bits=given.adapter_bits,
                distinct_scales=given.scale_steps and given.scale_steps * _OCTAVES,
                sparsity=given.sparsity,
            )
        )
    except InputError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
