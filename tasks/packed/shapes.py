"""The sizes that a packed model's config gives: of its linears, of embedding and head, and of all else."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families
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
