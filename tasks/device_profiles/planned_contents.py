"""A model yet to be made, as hardware fit counts it: from a config.json and a plan of how it is to be stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tasks.algorithms.device_fit.footprint import Model
from tasks.algorithms.errors import InputError
from tasks.algorithms.model.shape import shape_of_config
from tasks.device_profiles.contents import layout_parts
from tasks.packed import plan as packed_plan
from tasks.packed.plan import MATRIX_BITS, Plan


def planned(config: Mapping[str, Any], plan: Plan) -> Model:
    """The model that the plan makes. It has no metadata; `stored` is what its packed file would take.

    Half of the weights of an unstructured pattern are zero, as the plan has it; `embedding_group` -1 is the whole row.

    Raises:
        InputError: the config's architecture isn't supported, or bits, pattern or group don't fit its linears.
    """
    if not (plan.bits is None or 2 <= plan.bits <= 8) or plan.embedding_bits not in MATRIX_BITS:
        raise InputError(f"bits = {plan.bits} must be 2 to 8 and the embedding's {plan.embedding_bits} one of 4, 8, 16")
    shape = shape_of_config(config)
    row = shape.hidden if plan.embedding_group == -1 else plan.embedding_group
    if plan.embedding_bits < 16 and (row < 1 or shape.hidden % row):
        raise InputError(f"embedding_group = {plan.embedding_group} doesn't divide rows of {shape.hidden}")
    layout, sizes, _ = packed_plan.planned(config, replace(plan, embedding_group=row))
    return Model(shape, layout_parts(layout), 0, sum(sizes.values()), sizes)
