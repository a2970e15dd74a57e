"""What a model folder holds, as hardware fit counts it: every matrix with its format, from headers and descriptions.

A folder is packed, quantised by gptqmodel, or dense; a model that is only planned is `planned_contents`'s. No weights
are read, so of zeros it knows what a packed folder says: in other folders they count as weights. It says nothing of
devices.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tasks.algorithms.device_fit.footprint import Matrix, Model, Part
from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families, masks
from tasks.algorithms.model.shape import shape_of_config
from tasks.models import model_files, tensor_headers, tokenizer_archive
from tasks.models.tensor_headers import Entry
from tasks.packed.description import SIZES, read_bytes
from tasks.packed.layout import Layout, Spec, divisor
from tasks.packed.packed_folder import PackedFolder, is_packed
from tasks.packed.sizes import component_bytes

CONFIG = "config.json"
DTYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
GPTQ_TENSORS = (".qweight", ".qzeros", ".scales", ".g_idx")
"""Tensors of a GPTQ linear: one matrix together."""
_WORD = 32
"""Bits of an integer into which gptqmodel packs codes."""


def read(folder: Path) -> Model:
    """The model of a folder.

    Raises:
        InputError: it has no config.json, no tensor file, a damaged one, or an architecture that isn't described.
    """
    if is_packed(folder):
        layout = PackedFolder(folder).layout
        config, parts, components = layout.description.config, layout_parts(layout), component_bytes(folder)
    else:
        config = config_of(folder)
        parts, components = _tensor_parts(folder, config), tensor_headers.component_bytes(folder)
    stored = model_files.stored_bytes(folder)
    weights = sum(path.stat().st_size for path in model_files.tensors(folder))
    beside = stored - weights + tokenizer_archive.added_bytes(folder)  # as a device has them in its memory
    return Model(shape_of_config(config), parts, beside, stored, components)


def layout_parts(layout: Layout) -> tuple[Part, ...]:
    """A packed model's matrices, block by block."""
    description = layout.description
    parts = []
    for index, specs in enumerate(layout.specs):
        matrices = [matrix for spec in specs for matrix in _spec_matrices(layout, spec)]
        biases = sum(spec.rows * SIZES[layout.dtype(f"{spec.name}.bias")] for spec in specs if spec.bias)
        prefix = f".{index}."
        parts.append(Part(f"layers.{index}", tuple(matrices), biases + _rest_bytes(layout, prefix)))
    rows, cols = layout.table_shape
    for name in ("embedding",) if description.tied else ("embedding", "head"):
        coding, looked_up = getattr(description, name), name == "embedding" and not description.tied
        if coding:
            size = divisor(cols, coding.group_size)
            named = _coded(coding.bits, size, cols)
            matrix = Matrix("embedding", rows, cols, named, size, looked_up=looked_up)
        else:
            matrix = Matrix("embedding", rows, cols, DTYPES[layout.dtype(name)], looked_up=looked_up)
        parts.append(Part(name, (matrix,)))
    return (*parts, Part("norms", norms=_rest_bytes(layout, None)))


def _spec_matrices(layout: Layout, spec: Spec) -> Iterable[Matrix]:
    """A linear and its adapter's two factors."""
    pattern = masks.parse(spec.pattern)
    named = _coded(spec.bits, spec.group_size, spec.cols) if spec.bits else DTYPES[layout.dtype(f"{spec.name}.weight")]
    yield Matrix(
        "values",
        spec.rows,
        spec.cols,
        named,
        spec.group_size if spec.bits else 0,
        pattern,
        unstructured=spec.pattern == "unstructured",
        zero_points=spec.zeros,
        ordered=spec.order,
    )
    if not spec.rank:
        return
    codings = layout.description.adapter or (None, None)
    for part, length, coding in zip("ab", (spec.cols, spec.rows), codings, strict=True):
        if coding:
            size = divisor(length, coding.group_size)
            yield Matrix("adapter", spec.rank, length, _coded(coding.bits, size, length), size)
        else:
            yield Matrix("adapter", spec.rank, length, DTYPES[layout.dtype(f"{spec.name}.{part}")])


def _rest_bytes(layout: Layout, block: str | None) -> int:
    """Bytes of the norms of a block (".3."), or of those that are in none."""
    blocks = [f".{index}." for index in range(len(layout.specs))]
    sizes = {name: math.prod(shape) * SIZES[layout.dtype(name)] for name, shape in layout.rest.items()}
    if block:
        return sum(size for name, size in sizes.items() if block in name)
    return sum(size for name, size in sizes.items() if not any(one in name for one in blocks))


def _tensor_parts(folder: Path, config: Mapping[str, Any]) -> tuple[Part, ...]:
    """Of a folder with a tensor per matrix."""
    entries, family = tensor_headers.entries(folder), families.family(config)
    place = re.compile(re.escape(family.blocks) + r"\.(\d+)\.")
    untied = any(name.startswith(family.head + ".") for name in entries)
    matrices: dict[str, list[Matrix]] = {}
    norms: dict[str, int] = {}
    for name, entry in entries.items():
        found = place.search(name)
        part = f"layers.{found[1]}" if found else _table_name(name, family)
        if name.endswith(".qweight"):
            matrix = _gptq_matrix(name.removesuffix(".qweight"), entries, config)
            matrices.setdefault(part, []).append(matrix)
        elif len(entry.shape) > 1 and not name.endswith(GPTQ_TENSORS):
            if not math.prod(entry.shape):
                continue
            looked_up = part == "embedding" and untied
            matrices.setdefault(part, []).append(_matrix(name, entry, part, looked_up))
        elif not name.endswith(GPTQ_TENSORS):
            norms[part] = norms.get(part, 0) + entry.size
    blocks = sorted((name for name in {*matrices, *norms} if name.startswith("layers.")), key=lambda n: int(n[7:]))
    names = [*blocks, *(name for name in ("embedding", "head", "norms") if name in {*matrices, *norms})]
    return tuple(Part(name, tuple(matrices.get(name, ())), norms.get(name, 0)) for name in names)


def _table_name(name: str, family: families.Family) -> str:
    if name.startswith(family.embedding + "."):
        return "embedding"
    return "head" if name.startswith(family.head + ".") else "norms"


def _matrix(name: str, entry: Entry, part: str, looked_up: bool) -> Matrix:
    if entry.dtype not in DTYPES:
        raise InputError(
            f"{name} is stored as {entry.dtype}; hardware fit knows {', '.join(DTYPES)} and GPTQ's tensors"
        )
    component = "adapter" if ".lora_" in name else "values" if part.startswith("layers.") else "embedding"
    rows = entry.shape[0]
    return Matrix(component, rows, math.prod(entry.shape) // rows, DTYPES[entry.dtype], looked_up=looked_up)


def _gptq_matrix(name: str, entries: Mapping[str, Entry], config: Mapping[str, Any]) -> Matrix:
    """Bits and groups follow from the sizes of gptqmodel's tensors, as its folders may mix them."""
    quantisation = config.get("quantization_config") or {}
    if "bits" not in quantisation or f"{name}.scales" not in entries:
        raise InputError(
            f"{name} has packed GPTQ codes, but no scales beside them or no `quantization_config.bits` in config.json"
        )
    linears = shape_of_config(config).linears
    cols = next((cols for linear, (_, cols) in linears.items() if name.endswith(linear)), None)
    words, rows = entries[f"{name}.qweight"].shape
    groups = entries[f"{name}.scales"].shape[0]
    if not cols or words * _WORD % cols or cols % groups:
        raise InputError(f"{name} has packed codes of {words} x {rows}, which is no linear of its config.json")
    bits, size = words * _WORD // cols, cols // groups
    return Matrix(
        "values",
        rows,
        cols,
        _coded(bits, size, cols),
        size,
        zero_points=not quantisation.get("sym", True),
        ordered=bool(quantisation.get("desc_act")),
    )


def _coded(bits: int, group_size: int, columns: int) -> str:
    return f"int{bits}-{'channel' if group_size == columns else 'group'}"


def config_of(path: Path, hint: str = "name a model folder or a config.json") -> dict[str, Any]:
    """A config.json, given by itself or by its folder; the hint is for what can't be read.

    Raises:
        InputError: there is none, or it is no JSON object.
    """
    path = path / CONFIG if path.is_dir() else path
    content = read_bytes(path, hint)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds {type(found).__name__}, expected a model's config")
    return found
