"""The size of a packed model that is yet to be made, from its config alone; no weights are made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import ValidationError

from tasks.algorithms import packing
from tasks.algorithms.errors import InputError
from tasks.packed.blob_header import header_bytes
from tasks.packed.description import HEAD, Coding, Description, Table, subsets, uniform
from tasks.packed.layout import Layout, Section, Spec, bits_by_component, bytes_by_component, lay_out
from tasks.packed.model_config import clean
from tasks.packed.shapes import Shapes, shapes_of

MATRIX_BITS = (4, 8, 16)
"""Of embedding, head and adapters; 16 is not quantised."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a model is to be stored.

    Attributes:
        bits: of all linears, or full module name -> bits; None is not quantised.
        pattern: of all linears, or full module name -> pattern.
        group_size: inputs that share a scale; -1 is the whole row.
        embedding_bits: of `MATRIX_BITS`; of an untied head, too.
        embedding_group: values of a row that share a scale.
        zeros: zero points are stored (asymmetric quantisation).
        order: the group of each input is stored (act order).
        rank: of the adapters.
        adapter_bits: of `MATRIX_BITS`; in groups of `adapter_group` or the next smaller divisor of a row.
        distinct_scales: how many different scales the table has; None: too many for a table.
        kinds: whose scales are in the table, of "linears", "embedding", "adapter"; None: of whichever it pays.
        sparsity: share of pruned weights, for "unstructured".
        dtype: of all that isn't quantised: F16, BF16 or F32.
    """

    bits: Mapping[str, int | None] | int | None = 4
    pattern: Mapping[str, str] | str = "dense"
    group_size: int = 32
    embedding_bits: int = 16
    embedding_group: int = 32
    zeros: bool = False
    order: bool = False
    rank: Mapping[str, int] | int = 0
    adapter_bits: int = 16
    adapter_group: int = 64
    distinct_scales: int | None = None
    kinds: Sequence[str] | None = None
    sparsity: float = 0.5
    dtype: str = "F16"


class Planned(NamedTuple):
    """What a plan comes to: where everything will be, and by component bytes and bits of information."""

    layout: Layout
    sizes: dict[str, int]
    bound: dict[str, float]

    @property
    def total(self) -> int:
        """Bytes of model.safetensors and model.json."""
        return sum(self.sizes.values())


def planned(config: Mapping[str, Any], plan: Plan) -> Planned:
    """What model.safetensors and model.json of a model with this config.json will take.

    Exact, but for unstructured patterns, whose entropy code depends on the masks.

    Raises:
        InputError: the config's architecture isn't supported, or a pattern or group doesn't fit a linear.
    """
    description = _described(config, plan)
    return min((_counted(description, table, plan) for table in _tables(plan)), key=lambda counted: counted.total)


def planned_bytes(config: Mapping[str, Any], plan: Plan) -> int:
    """The size of model.safetensors and model.json; arguments and errors as `planned`."""
    return planned(config, plan).total


def _described(config: Mapping[str, Any], plan: Plan) -> Description:
    """model.json, but for the table of scales and the checksums."""
    if plan.embedding_bits not in MATRIX_BITS or plan.adapter_bits not in MATRIX_BITS:
        raise InputError(
            f"embedding and adapters take 4, 8 or 16 bits, not {plan.embedding_bits} and {plan.adapter_bits}"
        )
    config = clean(config)
    shapes = shapes_of(config)
    names = [name for block in shapes.linears for name in block]
    group_size = _group_size(shapes, plan.group_size)
    try:
        table = _coding(plan.embedding_bits, plan.embedding_group)
        factor = _coding(plan.adapter_bits, plan.adapter_group) if plan.rank else None
        return Description(
            **HEAD,
            config=config,
            tied=shapes.tied,
            dtype=plan.dtype,
            bits=_per_linear(plan.bits, names, None),
            group_size=group_size,
            pattern=_per_linear(plan.pattern, names, "dense"),
            zeros=plan.zeros,
            order=plan.order,
            rank=_per_linear(plan.rank, names, 0),
            adapter=(factor, factor) if factor else None,
            embedding=table,
            head=None if shapes.tied else table,
            sha256={},
        )
    except ValidationError as error:
        raise _refusal(error) from error


def _tables(plan: Plan) -> list[Table | None]:
    """The tables of scales to choose from; None is no table."""
    if not plan.distinct_scales:
        return [None]
    choices = subsets(("linears", "embedding", "adapter")) if plan.kinds is None else [plan.kinds]
    try:
        return [Table(values=plan.distinct_scales, kinds=list(kinds)) if kinds else None for kinds in choices]
    except ValidationError as error:
        raise _refusal(error) from error


def _refusal(error: ValidationError) -> InputError:
    first = error.errors(include_url=False)[0]
    return InputError(
        f"no model can be packed with {first['loc'][0]} = {first['input']!r:.80}: {first['msg'][:1].lower()}"
        f"{first['msg'][1:]}"
    )


def _counted(description: Description, table: Table | None, plan: Plan) -> Planned:
    """Bytes and bits with the scales stored so."""

    def peek(spec: Spec, offset: int) -> tuple[int, int]:
        count = spec.rows * spec.cols
        kept = count - round(count * plan.sparsity)
        return kept, 4 * math.ceil(packing.log2_combinations(count, kept) / 32 + 1)

    layout = lay_out(description.model_copy(update={"scales": table}))
    blobs = {blob: list(layout.sections(blob, peek)) for blob in layout.names}
    sections: list[Section] = [section for blob in blobs.values() for section in blob]
    sizes = {blob: sum(section.size for section in found) for blob, found in blobs.items()}
    text = layout.description.model_copy(update={"sha256": dict.fromkeys(layout.names, "0" * 64)}).json()
    total = len(header_bytes(sizes, "0" * 64)) + sum(sizes.values()) + len(text)
    return Planned(layout, bytes_by_component(sections, total), bits_by_component(sections))


def _coding(bits: int, group_size: int) -> Coding | None:
    return None if bits == 16 else Coding(bits=bits, group_size=group_size)


def _per_linear(value: Any, names: list[str], default: Any) -> Any:
    """One value for all linears, or one for each, of a value or a mapping."""
    if not isinstance(value, Mapping):
        return value
    return uniform([value.get(name, default) for name in names])


def _group_size(shapes: Shapes, group_size: int) -> int:
    lengths = [cols for block in shapes.linears for _, cols in block.values()]
    if group_size == -1:
        return max(lengths)
    wrong = next((length for length in lengths if group_size < 1 or length % group_size), None)
    if wrong:
        raise InputError(f"group_size = {group_size} doesn't divide rows of {wrong}: choose a divisor, or -1")
    return group_size
