"""What exports to other engines start from: a model folder as codes, scales and factors, or as a dense folder.

Engines want one scale per block of a power of two, their own widths of codes, and every weight present: how far the
stored codes can be kept, and what must be repeated or dequantised instead, is decided here once for all formats.
It quantises nothing: a code that an engine gets has the value that the package computes with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families, inspection
from tasks.algorithms.quantisation import rounding
from tasks.models import tensor_files
from tasks.models.tokenizer_files import copy_tokenizer
from tasks.packed import reader, source_folder
from tasks.packed.packed_folder import is_packed
from tasks.packed.stored_model import Linear


@dataclass(frozen=True)
class Source:
    """A model to be exported, unpacked into memory.

    Attributes:
        folder: where it was read from.
        config: its config.json.
        blocks: per block, full module name -> Linear, in running order.
        embedding: [vocabulary, hidden].
        head: the same of an untied head; None where it is the embedding.
        rest: full parameter name -> tensor: all norms, learned positions.
    """

    folder: Path
    config: dict[str, Any]
    blocks: list[dict[str, Linear]]
    embedding: Linear
    head: Linear | None
    rest: Mapping[str, Tensor]

    @property
    def linears(self) -> dict[str, Linear]:
        """Full module name -> Linear, of all blocks."""
        return {name: linear for block in self.blocks for name, linear in block.items()}


@dataclass(frozen=True)
class Change:
    """What an engine can't express as the package has it, and what was done instead.

    Attributes:
        done: half a sentence.
        component: whose bytes it changes (`packed.layout.COMPONENTS`, or `rotary`); None: none.
        exact: whether the weights and what is computed with them are the package's, but for float32's rounding.
    """

    done: str
    component: str | None
    exact: bool = True


def windows(config: Any) -> list[bool]:
    """Per block, whether its attention has a window shorter than the context.

    Args:
        config: of transformers.
    """
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    shorter = bool(window) and window < config.max_position_embeddings
    kinds = getattr(config, "layer_types", None) or [inspection.SLIDING] * config.num_hidden_layers
    return [shorter and kind == inspection.SLIDING for kind in kinds]


def densified(source: Source) -> dict[str, Change]:
    """That pruned weights are stored, as in every format that knows no sparsity; empty where nothing is pruned."""
    pruned = {linear.pattern for linear in source.linears.values()} - {"dense"}
    return {f"zeros at {', '.join(sorted(pruned))}": Change("stored as the code of zero", "values")} if pruned else {}


def read(folder: Path, check: Callable[[Mapping[str, Any]], Any]) -> Source:
    """A packed folder, a gptqmodel checkpoint or a dense folder.

    Args:
        check: refuses a config that can't be exported, before blocks are read.

    Raises:
        InputError: it is no model folder, or a damaged one.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: name one with a packed, a quantised or a dense model")
    model = reader.load(folder) if is_packed(folder) else source_folder.read(folder)
    check(model.config)
    head = None if model.head is None else _linear(model.head)
    blocks = [dict(block) for block in model.blocks]
    return Source(folder, model.config, blocks, _linear(model.embedding), head, model.rest)


def _linear(matrix: rounding.Coded | Tensor) -> Linear:
    if not isinstance(matrix, rounding.Coded):
        return Linear(weight=matrix)
    codes = (matrix.codes.to(torch.int16) + 2 ** (matrix.bits - 1)).to(torch.uint8)
    return Linear(codes=codes, scales=matrix.scales, bits=matrix.bits, group_size=matrix.group_size)


def steps(linear: Linear) -> Tensor:
    """int16 [out_features, in_features]: what the scales are multiplied with, the code less its zero point."""
    rows, cols = linear.codes.shape
    codes = linear.codes.to(torch.int16)
    if linear.zeros is None:
        return codes - 2 ** (linear.bits - 1)
    if linear.group_index is not None:
        return codes - linear.zeros.to(torch.int16)[:, linear.group_index.long()]
    return (codes.view(rows, -1, linear.group_size) - linear.zeros.to(torch.int16).unsqueeze(2)).view(rows, cols)


def factors(linear: Linear) -> tuple[Tensor, Tensor] | None:
    """The adapter as float32 (A [rank, in_features], B [out_features, rank]); None without."""
    if linear.adapter is None:
        return None
    a, b = linear.adapter
    a = rounding.values(a) if isinstance(a, rounding.Coded) else a.float()
    b = rounding.values(b).T if isinstance(b, rounding.Coded) else b.float()
    return a, b.contiguous()


def dense(linear: Linear, merged: bool = False) -> Tensor:
    """float32 [out_features, in_features]; `merged`: with the adapter added."""
    weight, branch = linear.values().float(), factors(linear)
    return weight + branch[1] @ branch[0] if merged and branch else weight


def table(matrix: Linear) -> Tensor:
    """float32 [vocabulary, hidden] of embedding or head: rounded to float16 where coded, as the model computes."""
    return matrix.values().float() if matrix.codes is None else matrix.values().half().float()


def part(linear: Linear, rows: slice) -> Linear:
    """Some of a linear's outputs."""
    if linear.adapter is not None:
        a, b = factors(linear)
        linear = replace(linear, adapter=(a, b[rows]))
    named = ("codes", "scales", "zeros", "weight", "bias", "keep")
    given = {name: getattr(linear, name) for name in named}
    return replace(linear, **{name: values[rows] for name, values in given.items() if values is not None})


def block_size(linear: Linear, least: int, most: int) -> int | None:
    """The largest power of two that divides the linear's groups; None below `least`, or where groups aren't runs.

    Args:
        most: a power of two; larger groups become blocks of this size with the same scale.
    """
    if linear.codes is None or linear.group_index is not None:
        return None
    size = min(linear.group_size & -linear.group_size, most)
    return size if size >= least else None


def block_scales(linear: Linear, size: int) -> Tensor:
    """float16 [out_features, in_features / size]: each group's scale for all its blocks."""
    return linear.scales.repeat_interleave(linear.group_size // size, dim=1)


def write_dense(source: Source, folder: Path, merged: bool) -> None:
    """An ordinary float32 checkpoint, with the source's tokenizer; `merged`: with the adapters added.

    It is as large as the dense model: whoever builds a graph from it needs that memory once.
    """
    described = families.family(source.config)
    tensors = {f"{name}.weight": dense(linear, merged) for name, linear in source.linears.items()}
    tensors |= {
        f"{name}.bias": linear.bias.float() for name, linear in source.linears.items() if linear.bias is not None
    }
    tensors |= {name: tensor.float() for name, tensor in source.rest.items()}
    tensors[f"{described.embedding}.weight"] = table(source.embedding)
    if source.head is not None:
        tensors[f"{described.head}.weight"] = table(source.head)
    copy_tokenizer(source.folder, folder)
    tensor_files.save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(source.config | {"dtype": "float32"}), encoding="utf-8")


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below the folder, by `stat`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
