"""The sizes of every tensor of a packed model, from its config: those of its `ModelShape`, named, and all else.

Which biases and norms there are is asked of transformers' own model, made without weights.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families
from tasks.algorithms.model.shape import shape_of_model
from tasks.packed.model_config import skeleton


class Shapes(NamedTuple):
    """What a config says of the sizes: per block, linear -> (out, in); which have a bias; of the rest, the shapes."""

    linears: tuple[dict[str, tuple[int, int]], ...]
    biases: frozenset[str]
    rest: dict[str, tuple[int, ...]]
    table: tuple[int, int]
    tied: bool


def shapes_of(config: Mapping[str, Any]) -> Shapes:
    """The sizes that a config gives; remembered, because they take a model without weights.

    Raises:
        InputError: it describes no model that can be.
    """
    return _shapes_of(json.dumps(config))


@functools.lru_cache(maxsize=8)
def _shapes_of(config: str) -> Shapes:
    model = skeleton(json.loads(config))
    described = families.of_model(model)
    parameters = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    shape = shape_of_model(model)
    linears = tuple(
        {f"{described.blocks}.{index}.{name}": sides for name, sides in shape.linears.items()}
        for index in range(shape.layers)
    )
    names = {name for block in linears for name in block}
    if any(parameters.get(f"{name}.weight") != sides for block in linears for name, sides in block.items()):
        raise InputError("the config's sizes contradict each other: it describes no model")
    biases = frozenset(name for name in names if f"{name}.bias" in parameters)
    table = f"{described.embedding}.weight"
    taken = {f"{name}.{part}" for name in names for part in ("weight", "bias")} | {table, f"{described.head}.weight"}
    rest = {name: shape for name, shape in parameters.items() if name not in taken}
    sizes = [side for parameter in parameters.values() for side in parameter]
    if not 0 < min(sizes) <= max(sizes) < 2**31:
        raise InputError(f"the config has sizes from {min(sizes)} to {max(sizes)}: it describes no model")
    return Shapes(linears, biases, rest, (shape.vocabulary, shape.hidden), shape.tied)
